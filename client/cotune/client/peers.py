"""Newest signed ledger heads of other sites: what a coordinator forgets, or would rather forget, sites remember."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cotune.shared.chain import SignedHead, head_is_genuine
from cotune.shared.errors import StorageError
from cotune.shared.files import write_json

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
        if not self.path.exists():
            return {}
        try:
            known = json.loads(self.path.read_bytes())
            return {site: SignedHead.model_validate(head) for site, head in known.items()}
        except (OSError, ValueError, ValidationError, AttributeError):
            raise StorageError(
                "E-HEADS",
                f"{self.path}: the heads of other sites cannot be read",
                hint="restore the file from a backup, or remove it: other sites hold copies",
            ) from None

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
            write_json(self.path, {site: head.model_dump() for site, head in sorted(known.items())})
