"""Whether a federation's coordinator can be reached: the address, the certificate that was pinned, the clock."""

from __future__ import annotations

import hashlib
import http.client
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

from cotune.client.coordinators import Coordinator
from cotune.client.courier_folder import CourierFolder
from cotune.shared.errors import CotuneError

Verdict = Literal["ok", "note", "fault"]
ANSWER_S = 10.0
# Flower takes a call whose time stamp is at most five seconds ahead of its own clock, or five minutes behind.
MOST_AHEAD_S, MOST_BEHIND_S, NOTED_S = 5.0, 300.0, 3.0
EXPIRY_NOTED_S = 14 * 86_400.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: Of what.
        verdict: `fault`: rounds will fail. `note`: they will not, but somebody should know.
        text: What was found.
        hint: What mends it.
    """

    name: str
    verdict: Verdict
    text: str
    hint: str | None = None


def fault(name: str, error: CotuneError) -> Check:
    """An error as a check that failed."""
    return Check(name, "fault", f"{error.code}  {error.message}", error.hint)


def reach(folder: CourierFolder, coordinator: Coordinator | None) -> Iterator[Check]:
    """Every check of one federation, from the file on this disk to the clock at the other end.

    Edge cases: the first that fails is the last, as those after it lean on it. Nothing that names the site is sent.

    Args:
        folder: The courier's.
        coordinator: What the site's own home knows of it.
    """
    name = folder.path.name
    try:
        ca = folder.ca.decode(errors="replace")
        host, _, port = folder.settings.address.rpartition(":")
        pinned = hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca)).hexdigest()
        context = ssl.create_default_context(cadata=ca)
    except CotuneError as error:
        yield fault(name, error)
        return
    except (ValueError, ssl.SSLError):
        yield Check(name, "fault", "the courier's ca.crt is damaged", "cotune site join INVITE")
        return
    if coordinator is None or coordinator.ca_sha256 != pinned:
        text = "the courier's ca.crt is not the certificate this site joined with"
        yield Check(name, "fault", text, "cotune site join INVITE")
        return
    yield Check(name, "ok", f"certificate pinned, sha256 {pinned[:16]}")
    yield from _asked(name, host.strip("[]"), int(port), context)


def _asked(name: str, host: str, port: int, context: ssl.SSLContext) -> Iterator[Check]:
    connection = http.client.HTTPSConnection(host, port, timeout=ANSWER_S, context=context)
    try:
        began = time.time()
        connection.request("GET", "/health")
        certificate = connection.sock.getpeercert() or {}
        answer = connection.getresponse()
        answer.read(1000)
        ours = (began + time.time()) / 2
    except ssl.SSLCertVerificationError as error:
        what = f"{host}:{port}: its certificate is not vouched for by the pinned one ({error.verify_message})"
        yield Check(name, "fault", what, "ask the coordinator whether its authority changed; join again if so")
        return
    except (OSError, http.client.HTTPException) as error:
        what = f"{host}:{port} does not answer ({getattr(error, 'strerror', None) or type(error).__name__})"
        yield Check(name, "fault", what, "the network, a firewall, or the coordinator: cotune fed up")
        return
    finally:
        connection.close()
    yield _health(name, f"{host}:{port}", answer.status)
    yield _expiry(name, str(certificate.get("notAfter", "")))
    yield _clock(name, answer.headers.get("Date", ""), ours)


def _health(name: str, address: str, status: int) -> Check:
    if status == http.client.OK:
        return Check(name, "ok", f"{address} answers over TLS")
    return Check(
        name, "fault", f"{address} says {status}: nothing behind its gateway", "at the coordinator: cotune fed up"
    )


def _expiry(name: str, until: str) -> Check:
    left_s = ssl.cert_time_to_seconds(until) - time.time() if until else 0.0
    text = f"the coordinator's certificate holds for {left_s / 86_400:.0f} days"
    if left_s > EXPIRY_NOTED_S:
        return Check(name, "ok", text)
    return Check(name, "note", text, "at the coordinator: cotune fed down, then cotune fed up, which renews it")


def _clock(name: str, date: str, ours: float) -> Check:
    try:
        ahead_s = ours - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return Check(name, "note", "the coordinator does not say what time it is there")
    way = "ahead of" if ahead_s > 0 else "behind"
    text = f"this clock is {abs(ahead_s):.0f} s {way} the coordinator's"
    if ahead_s > MOST_AHEAD_S or -ahead_s > MOST_BEHIND_S:
        return Check(
            name, "fault", f"{text}: it lets nobody in whose clock is so", "set the clock: timedatectl set-ntp true"
        )
    return Check(name, "note" if abs(ahead_s) > NOTED_S else "ok", text)
