"""A run's facts in the shape that data protection law asks for, as Markdown: what only a controller knows is marked."""

from __future__ import annotations

from importlib import resources
from typing import Literal

from cotune.shared.exports.facts import BLANK, Facts
from cotune.shared.report.card import markdown_environment

Document = Literal["dpia", "record"]


def document(kind: Document, facts: Facts) -> str:
    """`dpia`: facts for an impact assessment, GDPR Art. 35(7); `record`: of processing, Art. 30.

    It says what a run did and what its claim promises. Whether that is lawful, necessary or enough, it does not say.
    """
    from markupsafe import Markup

    text = (resources.files("cotune.shared") / "exports" / "templates" / f"{kind}.md.j2").read_text(encoding="utf-8")
    blank = Markup(f"**{BLANK}**")  # noqa: S704 - a constant
    return markdown_environment().from_string(text).render(f=facts, c=facts.claim, blank=blank)
