"""The run's report: one HTML file that needs nothing else, for people who must decide about the run.

It has three parts in one page, each under a heading that says whom it is for: everyone, the privacy officer, the
engineer. One page, because the parts rest on the same figures and a reader who doubts one must be able to follow it
down; its first screen alone answers who is protected, against whom, how strongly, and what is not.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.report import wording
from cotune.shared.report.attacks import measured_charts
from cotune.shared.report.content import build_charts, build_content
from cotune.shared.report.evidence import read_evidence
from cotune.shared.runs import RunFolder


def write_report(run: RunFolder, page: str = "") -> Path:
    """Write ``report/index.html`` from what the run has recorded so far, and return its path.

    Works on a run in any state; what is missing is said to be missing. Equal records give equal bytes.

    Args:
        run: The run.
        page: The page, where it has been rendered already.

    Raises:
        JobError: A file of the run is damaged.
        StorageError: The page could not be written.
    """
    page = page or render(run)
    path = run.path / "report" / "index.html"
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def render(run: RunFolder) -> str:
    """The report as HTML text; every name in it is escaped, and no character in it acts on whoever reads it."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        finalize=only_readable,
        loader=FunctionLoader(read_template),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    evidence = read_evidence(run)
    drawn = {"charts": build_charts(evidence), "attack_charts": measured_charts(evidence)}
    return environment.get_template("report.html.j2").render(c=build_content(evidence), **drawn) + "\n"


def only_readable(value: object) -> object:
    """A value without control characters; what this package drew itself passes."""
    from markupsafe import Markup

    return wording.plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def read_template(name: str) -> str:
    """A template's text, from the source tree or an installed package alike."""
    folder = resources.files("cotune.shared.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")
