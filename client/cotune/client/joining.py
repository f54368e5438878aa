"""Joining a federation and leaving it: what the site sends out, what it takes in, and what its ledger says of both."""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256

from cotune.client.coordinators import JOIN, LEAVE, Coordinator, joined_keys
from cotune.client.courier_folder import CourierFolder, CourierSettings, courier_folder, furnish_courier
from cotune.client.home import SiteHome
from cotune.shared.errors import CotuneError, JobError, RefusedError, did_you_mean
from cotune.shared.files import write_atomic
from cotune.shared.invitation import ASK_AGAIN, Invite, JoinRequest
from cotune.shared.plan import cotune_version

REQUEST = "request.json"


def write_request(home: SiteHome) -> JoinRequest:
    """Make what a site needs to join, as far as it is not there, and the request it sends to a coordinator.

    The request holds names, public keys and hashes; nothing of any record, and no path.

    Raises:
        StorageError: Home or courier folder cannot be written, or the node key cannot be used.
    """
    request = JoinRequest(
        site=home.name,
        public_key=home.ledger.head.public_key,
        node_key=furnish_courier(courier_folder(home.path)),
        policy_sha256=sha256((home.path / "policy.toml").read_bytes()).hexdigest(),
        cotune=cotune_version(),
    ).signed(home.ledger.sign)
    write_atomic(home.path / REQUEST, request.to_json().encode())
    return request


def join(home: SiteHome, invite: Invite) -> Coordinator:
    """Take up an invitation. Nothing is sent; the site's courier goes to the address when the site is up.

    Guarantee: the coordinator's key is in the ledger before the courier knows its address; from then on a job runs
    only if such a coordinator signed it, or a signer that the policy lists.

    Edge cases: an invitation that a crash left half taken up is finished when it is given again; a new one of a
    federation that is joined already moves its address or certificate, never its coordinator.

    Raises:
        RefusedError: E-INVITE-SITE, E-INVITE-KEY: it is for another site or key. E-INVITE-USED: it was taken up
            before. E-FEDERATION-NAME: a federation of that name, with another coordinator, is joined already.
        StorageError: Home or courier folder cannot be written.
    """
    _require_for(home, invite)
    folder = CourierFolder(courier_folder(home.path) / invite.federation)
    if _is_used(home, invite):
        if invite.federation in home.coordinators.all() or invite.federation not in joined(home):
            raise RefusedError("E-INVITE-USED", "this invitation was taken up before", param="INVITE", hint=ASK_AGAIN)
    else:
        fields = {"federation": invite.federation, "coordinator": invite.coordinator_key, "invite": invite.sha256()}
        home.ledger.append(JOIN, **fields)
    furnish_courier(folder.path.parent)
    folder.write(_settings(folder, invite), invite.ca)
    coordinator = Coordinator(
        name=invite.federation,
        address=invite.address,
        public_key=invite.coordinator_key,
        ca_sha256=invite.ca_sha256,
        joined=datetime.now(UTC),
    )
    home.coordinators.keep(coordinator)
    return coordinator


def leave(home: SiteHome, federation: str) -> None:
    """Leave a federation: its jobs run no more, and what the courier knew of it is removed. The spending stays.

    Raises:
        JobError: The site is not in it (E-FEDERATION-UNKNOWN).
        RefusedError: Its courier is at work (E-COURIER-RUNNING); nothing was changed.
        StorageError: Home or courier folder cannot be written.
    """
    keys = joined(home)
    folder = CourierFolder(courier_folder(home.path) / federation)
    if federation not in keys and federation not in home.coordinators.all():
        raise JobError(
            "E-FEDERATION-UNKNOWN",
            f"{home.name} is in no federation {federation[:40]!a}.{did_you_mean(federation, keys)}",
            param="FEDERATION",
            hint="cotune site status",
        )
    if not folder.path.exists():
        _forget(home, federation)
        return
    with folder.alone():
        _forget(home, federation)
        folder.remove()


def joined(home: SiteHome) -> dict[str, str]:
    """The keys of the coordinators the site is joined to, by federation."""
    return joined_keys(home.ledger.entries) or {}


def _forget(home: SiteHome, federation: str) -> None:
    key = joined(home).get(federation)
    if key:
        home.ledger.append(LEAVE, federation=federation, coordinator=key)
    home.coordinators.forget(federation)


def _require_for(home: SiteHome, invite: Invite) -> None:
    if invite.site != home.name:
        raise _refused("E-INVITE-SITE", f"the invitation is for {invite.site}, this is {home.name}")
    if invite.site_key != home.ledger.head.public_key:
        raise _refused("E-INVITE-KEY", f"the invitation is for another key of {home.name} than this home's")
    known = joined(home).get(invite.federation)
    if known not in (None, invite.coordinator_key):
        raise _refused(
            "E-FEDERATION-NAME",
            f"{home.name} is in a federation {invite.federation} already, with another coordinator",
            f"cotune site leave {invite.federation}",
        )


def _is_used(home: SiteHome, invite: Invite) -> bool:
    return any(entry.action == JOIN and entry.fields["invite"] == invite.sha256() for entry in home.ledger.entries)


def _settings(folder: CourierFolder, invite: Invite) -> CourierSettings:
    """The courier's settings: those that were set before, at the new address."""
    said = {"federation": invite.federation, "address": invite.address, "site": invite.site}
    try:
        before = folder.settings.model_dump(exclude_unset=True)
    except CotuneError:  # none, or one nobody can read
        before = {}
    return CourierSettings.model_validate({**before, **said})


def _refused(code: str, message: str, hint: str = ASK_AGAIN) -> RefusedError:
    return RefusedError(code, message, param="INVITE", hint=hint)
