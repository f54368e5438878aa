"""A run's claim held against this site's own ledger, and signed if that bears it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from cotune.client.home import SiteHome
from cotune.shared.chain import Entry, SignedHead, require_agreement, require_own, reserved
from cotune.shared.errors import CotuneError, RefusedError
from cotune.shared.job import Job
from cotune.shared.plan import ClaimRequest
from cotune.shared.privacy.claim import DIGITS, alike, claim_id, said_by, site_costs
from cotune.shared.privacy.claim_form import read_claim

MOST_CLAIMS = 16  # of one run: each is a line in the ledger
SIGNED = "claim.signed"


def countersign(home: SiteHome, request: ClaimRequest) -> str:
    """This site's signature over the exact bytes of a claim, namespace `cotune-claim`.

    Guarantee: what the claim says of this site is what its own ledger says, and its words are those of the job
    this site approved: steps, noise, epsilon and delta of its entry are computed here, from its own reservations,
    and no figure that came is trusted. The guarantee is not below this site's own. That it signed is in its ledger
    before the signature leaves. It vouches for no other site's entry.

    Edge cases: each refused by name: bytes that are no claim or one of another version (E-CLAIM-FORM,
    E-CLAIM-VERSION); a run that this site took no round in, or another job (E-CLAIM-RUN); an id that is not the
    claim's (E-CLAIM-ID); no entry of this site, two, or one that differs (E-CLAIM-ENTRY); a head that is not of its
    chain (E-CLAIM-HEAD); a guarantee below its own cost, or words that are not the job's (E-CLAIM-PROMISE); more
    claims of one run than there is a use for (E-CLAIM-MANY). The same claim again gets the same signature and no
    second line.

    Raises:
        RefusedError: See above; nothing was signed.
        StorageError: The ledger cannot be read or written.
    """
    home.refresh()
    claim, entries = _read(home, request), home.ledger.entries
    job = _job(home, request, claim)
    if not _has_its_id(request.claim):
        raise _refused(home, "E-CLAIM-ID", "its id is not that of its content")
    own = _own_cost(home.name, job, entries, request.run_id)
    _require_entry(home, claim, own)
    _require_promise(home, claim, job, own)
    _log(home, request.run_id, hashlib.sha256(request.claim.encode()).hexdigest())
    return home.ledger.sign("cotune-claim", request.claim.encode())


def _read(home: SiteHome, request: ClaimRequest) -> dict[str, Any]:
    try:
        return read_claim(request.claim.encode())
    except CotuneError as error:
        raise _refused(home, error.code, error.message) from None


@lru_cache(maxsize=2)  # as `read_claim`
def _has_its_id(text: str) -> bool:
    claim = read_claim(text.encode())
    return claim_id(claim) == claim["claim_id"]


def _job(home: SiteHome, request: ClaimRequest, claim: Mapping[str, Any]) -> Job:
    """The job of the run, from this site's own files."""
    charged = reserved(home.ledger.entries, run_id=request.run_id)
    if request.site != home.name or claim["run_id"] != request.run_id or not charged:
        raise _refused(home, "E-CLAIM-RUN", f"it took no round in {claim['run_id']}, or was asked as another site")
    if {entry.fields["job_sha256"] for entry, _ in charged} != {claim["job_sha256"]}:
        raise _refused(home, "E-CLAIM-RUN", f"{request.run_id} was the run of another job")
    return home.jobs.job(claim["job_sha256"])


def _own_cost(name: str, job: Job, entries: Sequence[Entry], run_id: str) -> dict[str, Any]:
    """This site's entry as its own ledger has it, but for the head."""
    charged = [{"round": e.fields["round"], "event": e.fields["event"]} for e, _ in reserved(entries, run_id=run_id)]
    return site_costs(job, {name: charged})[0]


def _require_entry(home: SiteHome, claim: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    said = [site for site in claim["sites"] if site["id"] == home.name]
    if len(said) != 1:
        raise _refused(home, "E-CLAIM-ENTRY", f"it has {len(said)} entries of this site")
    other = [key for key in own if not alike(own[key], said[0][key])]
    if other:
        words = "; ".join(f"{key} is {said[0][key]}, by this site's ledger {own[key]}" for key in other)
        raise _refused(home, "E-CLAIM-ENTRY", words)
    try:
        head = SignedHead.model_validate(said[0]["ledger_head"])
        require_own(head, home.name, home.ledger.head.public_key)
        require_agreement(head, home.ledger.entries)
    except (ValueError, CotuneError):
        raise _refused(home, "E-CLAIM-HEAD", "the head it names is not of this site's ledger") from None


def _require_promise(home: SiteHome, claim: Mapping[str, Any], job: Job, own: Mapping[str, Any]) -> None:
    guarantee = claim["guarantee"]
    if guarantee:
        if own["epsilon"] is None:
            raise _refused(home, "E-CLAIM-PROMISE", "it promises privacy, this site's ledger has none")
        if guarantee["delta"] != own["delta"] or guarantee["epsilon"] < own["epsilon"] * (1 - DIGITS):
            cost = f"epsilon {own['epsilon']:.4f} at delta {own['delta']:g}"
            said = f"{guarantee['epsilon']:.4f} at {guarantee['delta']:g}"
            raise _refused(home, "E-CLAIM-PROMISE", f"it promises {said}; this site alone released {cost}")
    words = json.loads(json.dumps(said_by(job, guarantee)))
    other = [key for key in words if not alike(words[key], claim[key])]
    if other:
        raise _refused(home, "E-CLAIM-PROMISE", f"its words are not those of the job: {', '.join(other)}")


def _log(home: SiteHome, run_id: str, sha256: str) -> None:
    """Write down what is about to be signed, once."""
    signed = [
        e.fields["claim_sha256"] for e in home.ledger.entries if (e.action, e.fields.get("run_id")) == (SIGNED, run_id)
    ]
    if sha256 in signed:
        return
    if len(signed) >= MOST_CLAIMS:
        raise _refused(home, "E-CLAIM-MANY", f"{MOST_CLAIMS} claims of {run_id} were signed already")
    home.ledger.append(SIGNED, run_id=run_id, claim_sha256=sha256)


def _refused(home: SiteHome, code: str, what: str) -> RefusedError:
    return RefusedError(code, f"{home.name}: does not sign the claim: {what}", hint="cotune site log")
