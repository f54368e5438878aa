"""Signed heads of the sites' ledgers, kept so that no site can go back to an older ledger unnoticed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cotune.server.trust import ON_FIRST_USE, Trust
from cotune.shared.chain import WITNESSES, SignedHead, head_is_genuine, read_heads, write_heads
from cotune.shared.update import UpdateHeader


class Witness:
    """The newest head of every site, on disk; each site is asked to hold those of the next three sites too.

    What one coordinator forgets, sites remember: a plan hands a site its own newest head, and a site that is
    behind it refuses to train. Where a coordinator and a site are both set back, the other sites still know.
    """

    def __init__(self, path: Path, trust: Trust = ON_FIRST_USE) -> None:
        self._path, self._trust = path, trust
        self._heads = read_heads(path, "restore the file from a backup")

    def heads_for(self, site: str, sites: Sequence[str]) -> tuple[SignedHead, ...]:
        """The heads that go with a site's plan: its own first, then those it is asked to hold."""
        start = sites.index(site)
        ring = [sites[(start + step) % len(sites)] for step in range(min(WITNESSES + 1, len(sites)))]
        return tuple(self._heads[name] for name in ring if name in self._heads)

    def reason(self, header: UpdateHeader) -> str | None:
        """Why the head that came with an update is not acceptable; None if it is.

        A site's key is the one it is enrolled with; where there is no enrolment, the one it first signed with.
        """
        return self._reason(header.head, header.site)

    def keep(self, header: UpdateHeader) -> None:
        """Take the heads that came with an admitted update.

        A witnessed head counts only if it is genuine, by the key known for that site, and newer.
        """
        self._heads[header.site] = header.head
        for head in header.witnessed:
            if head.site in self._heads and self._reason(head, head.site) is None:
                self._heads[head.site] = head

    def save(self) -> None:
        """Write the heads down; once a round is enough, as each site checks the heads of the round before."""
        write_heads(self._path, self._heads)

    def _reason(self, head: SignedHead, site: str) -> str | None:
        known = self._heads.get(site)
        if head.site != site or not head_is_genuine(head):
            return "its ledger head is not signed by its own key"
        if self._trust.key_of(site) not in (None, head.public_key):
            return "its ledger head is not signed by the key it is enrolled with"
        if known is None:
            return None
        if head.public_key != known.public_key:
            return "its ledger head is signed by another key than before"
        if head.seq < known.seq or (head.seq == known.seq and head.sha256 != known.sha256):
            return "its ledger is older than one it signed before"
        return None
