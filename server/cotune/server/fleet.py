"""The sites, however they are reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from cotune.shared.codec import Payload
from cotune.shared.plan import ClaimRequest, LedgerRequest, RoundPlan
from cotune.shared.update import Answer, SiteFailure

CRASHED = "E-SITE-CRASH"  # whoever was to answer died before it did; asked again, a site gives the same bytes


class Request(NamedTuple):
    """A plan and the encoded global adapter that goes with it; many requests share one."""

    plan: RoundPlan
    adapter: Payload


class Fleet(Protocol):
    """The sites of a run."""

    def sites(self) -> Sequence[str]:
        """Names of the sites that could be asked now, in order; it may change from round to round."""
        ...

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Send each site its request; yield answers one at a time, as they come.

        A caller that has enough may stop listening: what comes later is dropped.
        """
        ...

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """Ask sites for their ledgers; yield those that come, by site."""
        ...

    def countersign(self, requests: Sequence[ClaimRequest]) -> Iterator[tuple[str, str | SiteFailure]]:
        """Ask sites to sign a claim; yield by site the signature, or why there is none."""
        ...
