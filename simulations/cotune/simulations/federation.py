"""A federation in one process, without Flower: the same functions in the same order, no wire."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cotune.client.answering import failure_of
from cotune.server.conduct import conduct
from cotune.server.fleet import Request
from cotune.shared.errors import CotuneError
from cotune.shared.plan import ClaimRequest, LedgerRequest
from cotune.shared.runs import RunFolder
from cotune.shared.update import Answer, SiteFailure
from cotune.simulations.scenario import answer_plan, begin, read_ledger, sign_claim, site_names


class InlineFleet:
    """A `Fleet` of simulated sites that train one after the other."""

    def __init__(self, run: RunFolder) -> None:
        self._names = tuple(site_names(run.job()))

    def sites(self) -> Sequence[str]:
        """Names of the sites of this run, in order."""
        return self._names

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Train each site in turn."""
        for plan, adapter in requests:
            yield answer_plan(plan, adapter)

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """Each site's ledger."""
        for request in requests:
            yield request.site, read_ledger(request)

    def countersign(self, requests: Sequence[ClaimRequest]) -> Iterator[tuple[str, str | SiteFailure]]:
        """Each site's signature of the claim, or why it does not sign."""
        for request in requests:
            try:
                yield request.site, sign_claim(request)
            except CotuneError as error:
                yield request.site, failure_of(request.site, error)


def run_inline(run: RunFolder, kept: Path | None = None) -> None:
    """Run a prepared run in this process. Raises as `conduct` does.

    Args:
        run: The run.
        kept: For a run that is compared with others, see `conduct`: a private folder in which runs on the same
            base find what its lower layers make of records.
    """
    begin(run, kept)
    conduct(run, InlineFleet(run), "inline", kept)
