"""A run's facts in the shape that data protection law asks for, as Markdown: what only a controller knows is marked."""

from __future__ import annotations

from importlib import resources
from typing import Literal

from cotune.shared.exports.facts import BLANK, Facts
from cotune.shared.report.card import escape_markdown

Document = Literal["dpia", "record"]


def document(kind: Document, facts: Facts) -> str:
    """`dpia`: facts for an impact assessment, GDPR Art. 35(7); `record`: of processing, Art. 30.

    It says what a run did and what its claim promises. Whether that is lawful, necessary or enough, it does not say.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(  # noqa: S701 - Markdown: `finalize` escapes every value
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = (resources.files("cotune.shared") / "exports" / "templates" / f"{kind}.md.j2").read_text(encoding="utf-8")
    blank = Markup(f"**{BLANK}**")  # noqa: S704 - a constant
    return environment.from_string(text).render(f=facts, c=facts.claim, blank=blank)
