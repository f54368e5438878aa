"""The run's report: one HTML file that needs nothing else, for people who must decide about the run."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.report.content import build_content
from cotune.shared.report.evidence import read_evidence
from cotune.shared.runs import RunFolder


def write_report(run: RunFolder) -> Path:
    """Write ``report/index.html`` from what the run has recorded so far, and return its path.

    Works on a run in any state; what is missing is said to be missing. Equal records give equal bytes.

    Raises:
        JobError: A file of the run is damaged.
        StorageError: The page could not be written.
    """
    page = render(run)
    path = run.path / "report" / "index.html"
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def render(run: RunFolder) -> str:
    """The report as HTML text; every name in it is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(read_template("report.html.j2"))
    return template.render(c=build_content(read_evidence(run))) + "\n"


def read_template(name: str) -> str:
    """A template's text, from the source tree or an installed package alike."""
    folder = resources.files("cotune.shared.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")
