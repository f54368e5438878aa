"""The gateway as a configuration of nginx, for a coordinator that has one already."""

from __future__ import annotations

from importlib import resources

from cotune.server.gateway import Gate


def nginx_text(gate: Gate) -> str:
    """What nginx includes in its http section to be this gate: the same request lines pass, and nothing else.

    It is weaker in one point: nginx limits the pause between two pieces of a body, not how long all of it takes.
    """
    return render("nginx.conf.j2", gate=gate)


def render(template: str, **values: object) -> str:
    """A generated file: a value that a template asks for and does not get is an error."""
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("cotune.server") / "templates" / template).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - no HTML
    return environment.from_string(text).render(values)
