"""Whether a federation's coordinator can be reached, and is the one that was joined."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cotune.client.coordinators import Coordinator
from cotune.client.courier_folder import CourierFolder
from cotune.shared.errors import CotuneError
from cotune.shared.reaching import look_at

Verdict = Literal["ok", "note", "fault"]
JOIN_AGAIN = "cotune site join INVITE"


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
    """Every check of one federation, from the files on this disk to the clock at the other end.

    Edge cases: an authority in the courier's folder that is not the one the site's own home knows is asked nothing.
    Nothing that names the site is sent.

    Args:
        folder: The courier's.
        coordinator: What the site's home knows of it.
    """
    name = folder.path.name
    try:
        ca, address = folder.ca.decode(errors="replace"), folder.settings.address
        pinned = hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca)).hexdigest()
        if coordinator is None or coordinator.ca_sha256 != pinned:
            text = "the courier's ca.crt is not the certificate this site joined with"
            yield Check(name, "fault", text, JOIN_AGAIN)
            return
        found = look_at(address, ca)
    except CotuneError as error:
        yield fault(name, error)
        return
    except ValueError:
        yield Check(name, "fault", "the courier's ca.crt is damaged", JOIN_AGAIN)
        return
    yield from (Check(name, "fault", f"{each.code}  {each.what}", each.mend) for each in found)
    if not found:
        yield Check(name, "ok", f"{address} answers, with the certificate that was pinned and the same time of day")
