"""Newest signed ledger heads of other sites: what a coordinator forgets, or would rather forget, sites remember."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cotune.shared.chain import SignedHead, head_is_genuine, read_heads, write_heads

MAX_PEERS = 1000


@dataclass(frozen=True)
class Peers:
    """The heads this site holds of others, in one file."""

    path: Path

    def heads(self) -> dict[str, SignedHead]:
        """The newest head of each site.

        Raises:
            StorageError: The file is damaged.
        """
        return read_heads(self.path, "restore the file from a backup, or remove it: other sites hold copies")

    def keep(self, heads: Iterable[SignedHead]) -> None:
        """Take in heads that are genuine and newer.

        Guarantee: a head that is held is only ever replaced by a genuine, newer one of the same key; so nobody
        can make this site forget how far another's ledger had got.

        Edge cases: a site's key is the one its first head came with; a forged, older or foreign head, and one
        of a site beyond the thousandth, is passed over.
        """
        known = self.heads()
        before = dict(known)
        for head in heads:
            held = known.get(head.site)
            if held is None and len(known) >= MAX_PEERS:
                continue
            newer = held is None or (head.public_key == held.public_key and head.seq > held.seq)
            if newer and head_is_genuine(head):
                known[head.site] = head
        if known != before:
            write_heads(self.path, known)
