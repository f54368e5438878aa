"""`cotune fed`: a federation's coordinator, for whoever looks after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from cotune.server.files_commands import files
from cotune.shared.cli import show
from cotune.shared.errors import ConnectionFailed
from cotune.shared.finding import coordinators_folder

if TYPE_CHECKING:
    from cotune.server.enrolment import Enrolled
    from cotune.server.fedhome import FedHome

fed = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="A federation's coordinator: start, sites."
)
fed.command()(files)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")]
HomeOption = Annotated[
    Path | None, typer.Option(help="The coordinator's home. [$COTUNE_FED, ~/.local/share/cotune/fed]")
]


@fed.command()
def init(
    name: Annotated[str, typer.Option(help="The federation's public name.")],
    address: Annotated[str, typer.Option(help="HOST:PORT at which sites reach the gateway.")],
    bind: Annotated[str, typer.Option(help="HOST:PORT on which the gateway listens.")] = "0.0.0.0:8443",
    gateway: Annotated[str, typer.Option(help="embedded; nginx: the machine's own; none.")] = "embedded",
    port: Annotated[int, typer.Option(help="Of Flower's SuperLink, on loopback alone.")] = 9080,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Make a coordinator's home: keys, a certificate authority, settings. Nothing is started."""
    from cotune.server.fedhome import FED_FILE, FedHome
    from cotune.shared.jobfile import validate

    settings = {
        "federation": {"name": name, "address": address},
        "gateway": {"kind": gateway, "bind": bind},
        "superlink": {"port": port},
    }
    made = FedHome.create(_path(home), validate(settings, FED_FILE, origin="options"))
    data = _described(made)
    text = (
        f"{made.name}: made {made.path}\n"
        f"  sites reach it at {address}; who joins can compare these by telephone:\n"
        f"  coordinator's key  {data['key']}\n  authority  SHA256 {data['ca_sha256']}\n"
        "  back up coordinator.key and tls/ca.key: without them every site has to join anew\n"
        "next: cotune fed up"
    )
    show(data, as_json=as_json, text=text)


@fed.command()
def up(home: HomeOption = None, as_json: AsJson = False) -> None:
    """Start the coordinator and keep it running until Ctrl-C, SIGTERM or `cotune fed down`."""
    from cotune.server.up import keep_up

    opened = _open(home)
    keep_up(opened, lambda line: click.echo(line, err=True))
    show({**_described(opened), "state": "stopped"}, as_json=as_json, text=f"{opened.name}: stopped")


@fed.command()
def down(
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for it to end.")] = 60.0,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Stop a coordinator that runs. Runs that are under way go on from their last round at the next `cotune fed up`."""
    from cotune.shared.supervision import stop_running

    opened = _open(home)
    did_run = stop_running(opened.path, timeout)
    text = f"{opened.name}: {'stopped' if did_run else 'was not running'}"
    show({**_described(opened), "state": "stopped", "did_run": did_run}, as_json=as_json, text=text)


@fed.command()
def approve(
    request: Annotated[Path, typer.Argument(help="The request.json that a site sent.")],
    days: Annotated[int, typer.Option(min=1, max=365, help="How long the invitation may be taken up.")] = 14,
    out: Annotated[Path | None, typer.Option(help="Write the invitation to this file.")] = None,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Let a site in and print its invitation, one line. Compare the key's fingerprint with the site first."""
    from cotune.server.control import Control
    from cotune.server.enrolment import approve as let_in
    from cotune.shared.files import write_atomic
    from cotune.shared.invitation import read_request
    from cotune.shared.signing import key_fingerprint

    opened = _open(home)
    asked = read_request(request)
    invite = let_in(opened, asked, days, Control(opened.flwr_environment()))
    if out:
        write_atomic(out, f"{invite.text()}\n".encode())
    fingerprint = key_fingerprint(asked.public_key)
    data = {
        "federation": opened.name,
        "site": asked.site,
        "key": fingerprint,
        "expires": invite.expires.isoformat(),
        "invite": invite.text(),
    }
    text = (
        f"{asked.site} is in, with key {fingerprint}\n"
        f"it joins until {invite.expires:%Y-%m-%d %H:%M} UTC with: cotune site join INVITE\n{invite.text()}"
    )
    show(data, as_json=as_json, text=text)


@fed.command()
def sites(home: HomeOption = None, as_json: AsJson = False) -> None:
    """The sites that were let in, and whether their couriers are there."""
    from cotune.server.enrolment import enrolled

    opened = _open(home)
    known = enrolled(opened.path)
    nodes, why = _nodes(opened) if known else ({}, None)
    rows = [_row(site, nodes, why) for site in known.values()]
    about = _described(opened)
    head = f"{opened.name} at {about['address']}, coordinator's key {about['key']}"
    lines = [f"{row['site']:<24} {row['state']:<9} {row['courier']:<11} {row['key']}" for row in rows]
    lines = lines or ["no site was let in yet: cotune fed approve request.json"]
    text = "\n".join([head, *lines, *([why] if why else [])])
    show({**about, "sites": rows, "fault": why}, as_json=as_json, text=text)


@fed.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The site's name.")], home: HomeOption = None, as_json: AsJson = False
) -> None:
    """Shut a site out: it is asked nothing more, and an answer that is still under way is refused."""
    from cotune.server.control import Control
    from cotune.server.enrolment import revoke as shut_out
    from cotune.server.enrolment import withdraw

    opened = _open(home)
    shut_out(opened, site)
    told, text = True, f"{site} is out"
    try:
        withdraw(opened, Control(opened.flwr_environment()))
    except ConnectionFailed as error:
        told, text = False, f"{text}; Flower will be told when it runs ({error.message})"
    show({"federation": opened.name, "site": site, "state": "revoked", "told": told}, as_json=as_json, text=text)


def _row(site: Enrolled, nodes: dict[int, str], why: str | None) -> dict[str, Any]:
    from cotune.shared.signing import key_fingerprint

    missing = "unknown" if why else "gone"
    return {
        "site": site.name,
        "state": site.state,
        "courier": nodes.get(site.node_id, missing),
        "key": key_fingerprint(site.public_key),
        "node_id": site.node_id,
        "cotune": site.cotune,
        "approved": site.approved.isoformat(),
        "revoked": site.revoked.isoformat() if site.revoked else None,
    }


def _nodes(home: FedHome) -> tuple[dict[int, str], str | None]:
    """The couriers' state by Flower's number; or none, and why it is not known."""
    from cotune.server.control import Control
    from cotune.server.up import is_healthy

    if not is_healthy(home):
        return {}, "the coordinator is not running: whether couriers are there is not known"
    try:
        return Control(home.flwr_environment()).nodes(), None
    except ConnectionFailed as error:
        return {}, f"{error.message}: whether couriers are there is not known"


def _described(home: FedHome) -> dict[str, Any]:
    from cryptography.hazmat.primitives.hashes import SHA256

    from cotune.server.authority import read_certificate
    from cotune.shared.signing import key_fingerprint

    return {
        "federation": home.name,
        "home": str(home.path),
        "address": home.settings.federation.address,
        "key": key_fingerprint(home.key.public),
        "ca_sha256": read_certificate(home.tls / "ca.crt").fingerprint(SHA256()).hex(),
    }


def _path(home: Path | None) -> Path:
    return (home or coordinators_folder()).expanduser()


def _open(home: Path | None) -> FedHome:
    from cotune.server.fedhome import FedHome

    return FedHome.open(_path(home))
