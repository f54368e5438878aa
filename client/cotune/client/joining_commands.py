"""`cotune site request`, `join` and `leave`: how a site comes into a federation and out of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from cotune.client.courier_folder import courier_folder, retire_node_key
from cotune.client.joining import join, joined, leave, write_request
from cotune.client.site_options import AsJson, HomeOption, open_home
from cotune.client.site_views import request_view, view_of, view_text
from cotune.shared.cli import show
from cotune.shared.errors import RefusedError
from cotune.shared.invitation import read_invite
from cotune.shared.signing import key_fingerprint


def request(
    new_node_key: Annotated[
        bool, typer.Option("--new-node-key", help="After a coordinator revoked this site, or the courier was stolen.")
    ] = False,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Write request.json again, which a coordinator approves; a node key that is gone is made anew."""
    opened = open_home(home)
    if new_node_key:
        retire_node_key(courier_folder(opened.path))
    data, text = request_view(opened, write_request(opened))
    show(data, as_json=as_json, text=text)


def join_federation(
    invite: Annotated[str, typer.Argument(help="The coordinator's invitation: the line itself, or a file with it.")],
    fingerprint: Annotated[
        str | None, typer.Option(help="SHA256:... of the coordinator's key, as the coordinator told you otherwise.")
    ] = None,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Take up a coordinator's invitation. Works offline; `cotune site up` connects."""
    opened = open_home(home)
    read = read_invite(invite, datetime.now(UTC))
    found = key_fingerprint(read.coordinator_key)
    if fingerprint is not None and fingerprint.strip() != found:
        raise RefusedError(
            "E-INVITE-COORDINATOR",
            f"the invitation is of the coordinator {found}, not of the one you named",
            param="--fingerprint",
            hint="ask the coordinator for its fingerprint by another way than the invitation came",
        )
    coordinator = join(opened, read)
    data = {
        **view_of(opened),
        "federation": coordinator.name,
        "address": coordinator.address,
        "coordinator": found,
        "ca_sha256": coordinator.ca_sha256,
        "courier": str(courier_folder(opened.path) / coordinator.name),
    }
    compare = "" if fingerprint else "  (compare it with what the coordinator reads from `cotune fed sites`)"
    lines = [
        view_text(opened),
        f"joined {coordinator.name} at {coordinator.address}",
        f"  its coordinator  {found}{compare}",
        f"  its certificate  sha256 {coordinator.ca_sha256}",
        "  only jobs it signed are let in, or those of signers that policy.toml lists",
        "next",
        "  cotune site status      whether it can be reached",
        "  cotune site up          take part",
    ]
    show(data, as_json=as_json, text="\n".join(lines))


def leave_federation(
    federation: Annotated[str, typer.Argument(help="Its name.")], home: HomeOption = None, as_json: AsJson = False
) -> None:
    """Leave a federation: its jobs run no more here. What was spent stays spent, in the ledger."""
    opened = open_home(home)
    leave(opened, federation)
    left = sorted(joined(opened))
    text = f"{view_text(opened)}\nleft {federation}; still in: {', '.join(left) or 'no federation'}"
    show({**view_of(opened), "left": federation, "federations": left}, as_json=as_json, text=text)
