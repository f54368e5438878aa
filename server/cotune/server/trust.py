"""What coordinator and sites know each other by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cotune.shared.keyfile import SigningKey

KeyOf = Callable[[str], str | None]


def _first_seen(_site: str) -> str | None:
    return None


@dataclass(frozen=True)
class Trust:
    """The coordinator's word for a job, and the sites' keys.

    Attributes:
        signature: SSH signature over the job's hash, namespace `cotune-job`, that goes with every plan.
        key_of: The public key a site is enrolled with; None where the first it signs with is taken for its own.
        key: With which the coordinator signs the run's claim; None: one that is made for the run.
    """

    signature: str | None = None
    key_of: KeyOf = _first_seen
    key: SigningKey | None = None


ON_FIRST_USE = Trust()
