"""Who is enrolled: a file for each site, read by whoever asks sites anything, at the moment it asks."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field, ValidationError

from cotune.server.control import Control
from cotune.server.fedhome import FedHome
from cotune.shared.chain import PublicKey
from cotune.shared.errors import JobError, RefusedError, StorageError, did_you_mean
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.invitation import Invite, JoinRequest, NodeKey
from cotune.shared.sections import Section, Sha256, SiteName

NEW_NODE_KEY = "ask the site for a request with a new node key; its signing key and ledger stay"


class Enrolled(Section):
    """A site as the coordinator knows it.

    Attributes:
        name: Its public name.
        public_key: With which it signs updates and ledger heads.
        node_key: With which its courier authenticates.
        node_id: Flower's number for that key.
        policy_sha256: Of the policy it had when it asked.
        cotune: Its version then.
        state: Whether it is asked anything, and listened to.
        approved: When it was let in last.
        revoked: When it was shut out, if it is.
        withdrawn: Numbers of nodes that Flower has still to be told to let in no more.
    """

    name: SiteName
    public_key: PublicKey
    node_key: NodeKey
    node_id: int = Field(ge=1)
    policy_sha256: Sha256
    cotune: str
    state: Literal["approved", "revoked"]
    approved: AwareDatetime
    revoked: AwareDatetime | None = None
    withdrawn: tuple[int, ...] = ()


def enrolled(home: Path) -> dict[str, Enrolled]:
    """The sites of a coordinator's home by name, revoked ones too.

    Raises:
        StorageError: A file is damaged (E-ENROLMENT): nobody is forgotten silently, least of all who was revoked.
    """
    found: dict[str, Enrolled] = {}
    for path in sorted((home / "sites").glob("*.json")):
        try:
            site = Enrolled.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            site = None
        if site is None or site.name != path.stem:
            raise StorageError("E-ENROLMENT", f"{path}: damaged", hint="restore it, or remove it and approve anew")
        found[site.name] = site
    return found


def approve(home: FedHome, request: JoinRequest, valid_days: int, control: Control) -> Invite:
    """Let a site in, and make the invitation it joins with. A site that is in already gets a new invitation.

    Args:
        home: The coordinator's.
        request: As `read_request` gave it: signed by the key it names.
        valid_days: How long the invitation may be taken up.
        control: The SuperLink that learns the site's node key.

    Edge cases: a second site of the name, another site's key, and a node key that was withdrawn are refused by
    name; a crash after Flower learnt the key and before we wrote it down is made good by approving again.

    Raises:
        RefusedError: E-SITE-NAME, E-SITE-KEY or E-SITE-REVOKED.
        ConnectionFailed: The SuperLink cannot be reached, or refuses.
    """
    now = datetime.now(UTC)
    with _one_at_a_time(home.path):
        sites = enrolled(home.path)
        _refuse_doubles(request, sites)
        known = sites.get(request.site)
        stays = known is not None and known.node_key == request.node_key
        node_id = known.node_id if known and stays else _register(request.node_key, sites, control)
        withdrawn = known.withdrawn if known else ()
        if known and not stays and known.state == "approved":
            withdrawn = (*withdrawn, known.node_id)
        shared = request.model_dump(include={"public_key", "node_key", "policy_sha256", "cotune"})
        _write(
            home.path,
            Enrolled(name=request.site, node_id=node_id, state="approved", approved=now, withdrawn=withdrawn, **shared),
        )
    return Invite(
        federation=home.name,
        address=home.settings.federation.address,
        ca=(home.tls / "ca.crt").read_text(encoding="ascii"),
        coordinator_key=home.key.public,
        site=request.site,
        site_key=request.public_key,
        expires=(now + timedelta(days=valid_days)).replace(microsecond=0),
    ).signed(home.key.sign)


def revoke(home: FedHome, name: str) -> Enrolled:
    """Shut a site out, durably before this returns, whether the SuperLink runs or not; see `withdraw`.

    Raises:
        JobError: There is no such site (E-SITE-UNKNOWN).
    """
    with _one_at_a_time(home.path):
        sites = enrolled(home.path)
        if name not in sites:
            what = f"no site is called `{name}`.{did_you_mean(name, sites)}"
            raise JobError("E-SITE-UNKNOWN", what, param="SITE", hint="cotune fed sites")
        site = sites[name]
        if site.state == "approved":
            change = {"state": "revoked", "revoked": datetime.now(UTC), "withdrawn": (*site.withdrawn, site.node_id)}
            site = site.model_copy(update=change)
            _write(home.path, site)
    return site


def withdraw(home: FedHome, control: Control) -> None:
    """Tell Flower of every node that was withdrawn and that it has not been told of.

    Raises:
        ConnectionFailed: The SuperLink cannot be reached, or refuses.
    """
    if not any(site.withdrawn for site in enrolled(home.path).values()):
        return
    with _one_at_a_time(home.path):
        registered = control.nodes()
        for site in enrolled(home.path).values():
            for node_id in site.withdrawn:
                if node_id in registered:
                    control.unregister(node_id)
            if site.withdrawn:
                _write(home.path, site.model_copy(update={"withdrawn": ()}))


def _refuse_doubles(request: JoinRequest, sites: dict[str, Enrolled]) -> None:
    for site in sites.values():
        is_it = site.name == request.site
        if is_it and site.public_key != request.public_key:
            what = f"a site called `{site.name}` is enrolled, with another key"
            raise RefusedError("E-SITE-NAME", what, param="REQUEST", hint="the newcomer takes another name")
        if not is_it and (site.public_key == request.public_key or site.node_key == request.node_key):
            what = f"the key of this request is that of `{site.name}`"
            raise RefusedError("E-SITE-KEY", what, param="REQUEST", hint="cotune site init makes keys of its own")
        if is_it and site.state == "revoked" and site.node_key == request.node_key:
            what = f"`{site.name}` was revoked, and Flower takes its node key no more"
            raise RefusedError("E-SITE-REVOKED", what, param="REQUEST", hint=NEW_NODE_KEY)


def _register(node_key: str, sites: dict[str, Enrolled], control: Control) -> int:
    """Flower's number for a key: a new one, or the one it was given just before a crash."""
    if (node_id := control.register(node_key)) is not None:
        return node_id
    accounted = {site.node_id for site in sites.values()} | {n for site in sites.values() for n in site.withdrawn}
    strays = control.nodes().keys() - accounted
    if len(strays) != 1:  # Flower does not say whose key is whose
        raise RefusedError("E-SITE-KEY", "Flower knows this node key already", param="REQUEST", hint=NEW_NODE_KEY)
    return strays.pop()


def _write(home: Path, site: Enrolled) -> None:
    write_atomic(home / "sites" / f"{site.name}.json", (site.model_dump_json(indent=2) + "\n").encode())


@contextlib.contextmanager
def _one_at_a_time(home: Path) -> Generator[None]:
    """Whoever changes enrolments waits for who is doing so."""
    with storage_errors(home / "sites"):
        descriptor = os.open(home / "sites", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
