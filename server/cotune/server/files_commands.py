"""`cotune fed files`: what a coordinator's machine needs to keep it running."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cotune.shared.cli import show
from cotune.shared.finding import coordinators_folder

if TYPE_CHECKING:
    from cotune.server.fedhome import FedHome
    from cotune.shared.units import Service

LEAST_FREE_PORT = 1024


def files(
    out: Annotated[Path, typer.Option(help="The folder they are written to.")] = Path("cotune-fed-files"),
    user: Annotated[str | None, typer.Option(help="Who the coordinator runs as; else the home's owner.")] = None,
    home: Annotated[
        Path | None, typer.Option(help="The coordinator's home. [$COTUNE_FED, ~/.local/share/cotune/fed]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")] = False,
) -> None:
    """Write a hardened systemd unit, a compose file and an nginx configuration for this coordinator."""
    from cotune.server.fedhome import FedHome
    from cotune.server.gateway import gate_of
    from cotune.server.nginx import nginx_text
    from cotune.shared.units import compose_text, owner_of, unit_text, write_files

    opened = FedHome.open((home or coordinators_folder()).expanduser())
    service = service_of(opened, owner_of(opened.path, user))
    texts = {f"{service.name}.service": unit_text(service), "nginx.conf": nginx_text(gate_of(opened))}
    if service.port:  # the machine's own nginx could not reach into a container's loopback
        texts["compose.yaml"] = compose_text(service)
    written = write_files(out, texts)
    use = 'each says at its top how it is installed; nginx.conf goes with gateway.kind = "nginx" in fed.toml'
    text = "\n".join([*map(str, written), use])
    show({"files": [str(path) for path in written]}, as_json=as_json, text=text)


def service_of(home: FedHome, user: str) -> Service:
    """`cotune fed up` as a service. Behind nginx it talks to this machine alone."""
    from cotune.shared.packages import cache_dir
    from cotune.shared.units import Service

    gateway = home.settings.gateway
    port = int(gateway.bind.rpartition(":")[2]) if gateway.kind == "embedded" else None
    rights = ("CAP_NET_BIND_SERVICE",) if port and port < LEAST_FREE_PORT else ()
    return Service(
        name="cotune-fed",
        description=f"cotune coordinator of {home.name}",
        arguments=("fed", "up", "--home", str(home.path)),
        user=user,
        writable=(home.path, cache_dir()),
        port=port,
        peers=None if gateway.kind == "embedded" else (),
        capabilities=rights,
        ambient=rights,
    )
