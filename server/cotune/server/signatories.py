"""Who signs a run's claim: the coordinator, and every site that finds its own entry in it right."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from cotune.server.fleet import Fleet
from cotune.server.trust import Trust
from cotune.shared.chain import SignedHead
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.keyfile import SigningKey
from cotune.shared.plan import MAX_CLAIM, ClaimRequest
from cotune.shared.privacy.claim import claim_bytes
from cotune.shared.privacy.claim_form import json_schema, read_claim
from cotune.shared.runs import RunFolder
from cotune.shared.signers import COORDINATOR, NAMESPACE, signature_path, signers_path, signers_text
from cotune.shared.signing import verify
from cotune.shared.update import SiteFailure


class Signatories:
    """The coordinator's key, and the sites of a run.

    Args:
        run: The run whose claim is signed.
        fleet: Its sites.
        trust: Holds the coordinator's key; without one, a key is made for the run, and the claim says so.
    """

    def __init__(self, run: RunFolder, fleet: Fleet, trust: Trust) -> None:
        self._run, self._fleet = run, fleet
        self._simulated = trust.key is None
        self._key = trust.key or _key_of(run)

    def coordinator(self) -> dict[str, Any]:
        """What the claim says of the coordinator."""
        return {"public_key": self._key.public, "simulated": self._simulated}

    def sign(self, claim: Mapping[str, Any]) -> None:
        """Write the claim with its schema, the coordinator's signature, and those of the sites that took part.

        Guarantee: a signature that is kept is one of the key whose ledger head the claim names, over the exact
        bytes of claim.json.

        Edge cases: who does not answer, or refuses, leaves no signature; the run says so and `cotune verify` names
        it. Signatures of an earlier claim of this run are removed first.

        Raises:
            JobError: The claim has not its form; nothing was signed.
            StorageError: A file could not be written.
        """
        content, privacy = claim_bytes(claim), self._run.privacy
        read_claim(content)
        folder = signature_path(self._run, COORDINATOR).parent
        with storage_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        write_atomic(privacy / "claim.json", content)
        write_atomic(privacy / "claim.schema.json", json_schema().encode())
        write_atomic(signature_path(self._run, COORDINATOR), self._key.sign(NAMESPACE, content).encode())
        heads = {site["id"]: site["ledger_head"] for site in claim["sites"] if site["ledger_head"]}
        keys = {site: SignedHead.model_validate(head).public_key for site, head in heads.items()}
        write_atomic(signers_path(self._run), signers_text({**keys, COORDINATOR: self._key.public}).encode())
        self._countersigned(content, {site: key for site, key in keys.items() if site != COORDINATOR})

    def _countersigned(self, content: bytes, keys: Mapping[str, str]) -> None:
        if len(content) > MAX_CLAIM:
            self._say(keys, f"was not asked to sign the claim of {len(content):,} bytes; the most is {MAX_CLAIM:,}")
            return
        text = content.decode()
        requests = [ClaimRequest(run_id=self._run.run_id, site=site, claim=text) for site in sorted(keys)]
        for site, answer in self._fleet.countersign(requests):
            if isinstance(answer, SiteFailure):
                self._say([site], f"did not sign the claim: {answer.message} ({answer.code})")
            elif site not in keys or not verify(keys[site], NAMESPACE, content, answer):
                self._say([site], "its signature of the claim is not by its own key")
            else:
                write_atomic(signature_path(self._run, site), answer.encode())

    def _say(self, sites: Iterable[str], what: str) -> None:
        for site in sites:
            self._run.emit("privacy", f"{site}: {what}", "warn", site=site)


def _key_of(run: RunFolder) -> SigningKey:
    """The key a simulation makes for its coordinator; it ends with the run, as its sites' do."""
    path = run.sites / "coordinator.key"
    with storage_errors(path):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    return SigningKey.load(path) if path.exists() else SigningKey.create(path)
