"""The gateway as a configuration of nginx, for a coordinator that has one already."""

from __future__ import annotations

from cotune.server.gateway import Gate
from cotune.shared.errors import JobError
from cotune.shared.units import render

READ_OTHERWISE = set('"$\\\n')


def nginx_text(gate: Gate) -> str:
    """What nginx includes in its http section to be this gate: the same request lines pass, and nothing else.

    It is weaker in one point: nginx limits the pause between two pieces of a body, not how long all of it takes.

    Raises:
        JobError: A path holds what nginx would not take for a part of its name (E-NGINX-PATH).
    """
    for path in (gate.certificate, gate.key, gate.ca):
        if READ_OTHERWISE & set(str(path)):
            what = f"{path}: nginx reads a quotation mark, a dollar sign or a backslash in a path otherwise"
            raise JobError("E-NGINX-PATH", what, param="--home", hint="move the coordinator's home")
    return render("cotune.server", "nginx.conf.j2", gate=gate)
