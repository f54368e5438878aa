"""Checking a run without trusting what it says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cotune.shared.chain import SignedHead, head_is_genuine, read_chain, reserved
from cotune.shared.errors import CotuneError
from cotune.shared.files import file_sha256
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.claim import ClaimSubject, build_claim, charged, claim_id
from cotune.shared.privacy.crosscheck import epsilon_by_prv
from cotune.shared.privacy.event import Event, event_from_dict
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.runs import RunFolder

EPSILON_TOLERANCE = 1e-6
PRV_ERROR = 0.02
LOSS_TOLERANCE = 1e-3
PROBE_ROWS = 64


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON."""
        return asdict(self)


def verify_run(run: RunFolder) -> list[Check]:
    """Every check in order; a check that cannot be made is a failed one.

    Epsilon is recomputed from the sites' own ledgers, whose hash chains and signed heads are checked first,
    by PLD and, independently, by Opacus' PRV; no figure of the run folder enters. The adapter is loaded by
    PEFT and its loss compared.
    """
    checks: dict[str, Callable[[RunFolder], str]] = {
        "files": _files,
        "job": _job,
        "claim": _claim,
        "released adapter": _subject,
        "ledgers": _ledgers,
        "events": _events,
        "epsilon": _epsilon,
        "second accountant": _second,
        "summary and card": _summary,
        "reloaded loss": _loss,
    }
    return [_make(name, check, run) for name, check in checks.items()]


def _make(name: str, check: Callable[[RunFolder], str], run: RunFolder) -> Check:
    try:
        return Check(name, True, check(run))
    except _Failed as error:
        return Check(name, False, str(error))
    except (CotuneError, OSError, ValueError, KeyError, TypeError) as error:
        detail = error.message if isinstance(error, CotuneError) else f"cannot be checked ({type(error).__name__})"
        return Check(name, False, detail)


class _Failed(Exception):
    """A check that did not hold, in words."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Failed(message)


def _files(run: RunFolder) -> str:
    manifest: Mapping[str, str] = json.loads((run.path / "MANIFEST.json").read_text(encoding="utf-8"))
    changed = [name for name, sha256 in manifest.items() if _sha256_or_none(run.path / name) != sha256]
    _require(not changed, f"changed or missing: {', '.join(sorted(changed)[:5])}")
    added = sorted(run.files().keys() - manifest.keys())
    _require(not added, f"not in the manifest: {', '.join(added[:5])}")
    return f"{len(manifest)} files as in MANIFEST.json"


def _sha256_or_none(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None


def _job(run: RunFolder) -> str:
    sha256 = run.job().sha256()
    _require(run.claim()["job_sha256"] == sha256, "the claim is of another job than resolved.toml")
    return f"claim and resolved.toml name job {sha256[:12]}"


def _claim(run: RunFolder) -> str:
    claim = run.claim()
    _require(claim_id(claim) == claim["claim_id"], "claim.json was changed after it was made")
    _require(bool(claim["unprotected"]), "the claim says that nothing is unprotected, which is never so")
    private = run.job().is_private
    _require(private or claim["guarantee"] is None, "the job gives no privacy, the claim promises some")
    subject = ClaimSubject(
        run.run_id,
        {s["name"]: s["sha256"] for s in claim["subject"]},
        claim["evidence"]["reload_check"],
        {site["id"]: site["ledger_head"] for site in claim["sites"] if site["ledger_head"]},
    )
    rebuilt = json.loads(json.dumps(build_claim(run.job(), _accounts(run), subject)))
    free = {"created", "software", "claim_id"}
    other = [key for key in rebuilt if key not in free and not _alike(rebuilt[key], claim.get(key))]
    _require(not other, f"job and events give another claim: {', '.join(other)}")
    return "claim.json is whole" + ("" if private else "; it promises NOTHING, as the job says")


def _alike(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of computed figures, which may differ between machines."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=EPSILON_TOLERANCE, abs_tol=EPSILON_TOLERANCE**2)
    return one == other


def _subject(run: RunFolder) -> str:
    for subject in run.claim()["subject"]:
        found = _sha256_or_none(run.path / subject["name"])
        _require(found == subject["sha256"], f"{subject['name']} is not the file the claim is about")
    return "the claim is about these very files"


def _accounts(run: RunFolder) -> Mapping[str, list[dict[str, Any]]]:
    return charged(json.loads((run.privacy / "accountant.json").read_text(encoding="utf-8"))["sites"])


def _ledgers(run: RunFolder) -> str:
    """Each site's ledger is one chain of hashes up to a head that the site signed and the claim names."""
    used = {row["site"] for row in run.metrics() if row.get("site")}
    sites = [site for site in run.claim()["sites"] if site["ledger_head"] or site["id"] in used]
    for site in sites:
        name = site["id"]
        _require(bool(site["ledger_head"]), f"{name}: the claim names no ledger head")
        head = SignedHead.model_validate(site["ledger_head"])
        _require(head.site == name and head_is_genuine(head), f"{name}: its ledger head is not signed by its key")
        entries = read_chain(run.ledger(name).read_bytes())
        found = {entry.seq: entry.sha256 for entry in entries}.get(head.seq)
        _require(found == head.sha256, f"{name}: its ledger is not the one whose head it signed")
    return f"{len(sites)} hash chains whole, each up to the head its site signed"


def _released(run: RunFolder, site: str) -> list[tuple[int, Event]]:
    """Round and event of all that a site's own ledger says it released in this run; a silent site has none."""
    if not run.ledger(site).exists():
        return []
    found = reserved(read_chain(run.ledger(site).read_bytes()), run_id=run.run_id)
    return [(int(entry.fields["round"]), event) for entry, event in found]


def _events(run: RunFolder) -> str:
    """What sites wrote down is what was planned, and the coordinator's account has all of it."""
    job, planned = run.job(), mechanism_of(run.job()).event(run.job().train.local_steps)
    sites = {site["id"]: _released(run, site["id"]) for site in run.claim()["sites"]}
    for site, entries in _accounts(run).items():
        _require(site in sites, f"{site}: it was asked, but is missing from the claim")
        asked = [(entry["round"], event_from_dict(entry["event"])) for entry in entries]
        for number, event in sites[site]:
            _require(event == planned, f"{site}: round {number} was charged as something else than planned")
            _require((number, event) in asked, f"{site}: round {number} is in its ledger, but nobody asked for it")
            asked.remove((number, event))
    trained = {(row["site"], row["round"]) for row in run.metrics() if row.get("site")}
    charged = {(site, number) for site, entries in sites.items() for number, _ in entries}
    _require(trained <= charged, "a round is in metrics.jsonl that no site charged itself for")
    return f"{sum(map(len, sites.values()))} site rounds of {job.train.local_steps} steps charged, {len(trained)} used"


def _costliest(run: RunFolder, price: Callable[[list[Event], float], float]) -> float:
    """The run's epsilon from its sites' ledgers alone."""
    job = run.job()
    delta = float(job.privacy.delta)
    events = {site["id"]: [event for _, event in _released(run, site["id"])] for site in run.claim()["sites"]}
    order = sorted(events, key=lambda site: (-epsilon(events[site], delta), site))
    return price([event for site in order[: job.data.sites_per_unit] for event in events[site]], delta)


def _epsilon(run: RunFolder) -> str:
    guarantee = run.claim()["guarantee"]
    if guarantee is None:
        return "nothing is promised, nothing to recompute"
    found, said = _costliest(run, epsilon), guarantee["epsilon"]
    _require(found <= said + EPSILON_TOLERANCE, f"{found:.4f} from the sites' ledgers, the claim says {said:.4f}")
    unused = "" if said - found <= EPSILON_TOLERANCE else f"; the claim says {said:.4f}, with rounds no site took"
    return f"{found:.4f} recomputed from the sites' ledgers by dp-accounting PLD{unused}"


def _second(run: RunFolder) -> str:
    guarantee = run.claim()["guarantee"]
    if guarantee is None:
        return "nothing is promised, nothing to recompute"
    found, said = _costliest(run, epsilon_by_prv), guarantee["epsilon"]
    _require(found <= said + PRV_ERROR, f"Opacus PRV gives {found:.4f}, the claim says {said:.4f}")
    return f"{found:.4f} from the sites' ledgers by Opacus PRV, not above the claim by more than {PRV_ERROR}"


def _summary(run: RunFolder) -> str:
    from cotune.shared.report.card import escape_markdown

    claim, summary = run.claim(), run.summary()
    said = {site["site"]: site["epsilon"] for site in summary["sites"]}
    _require(said == {site["id"]: site["epsilon"] for site in claim["sites"]}, "summary.json has other epsilons")
    card = (run.adapter / "README.md").read_text(encoding="utf-8")
    words = (str(escape_markdown(claim["statement"])),) if claim["guarantee"] else ("NON-PRIVATE", "NOT PRIVATE")
    _require(any(word in " ".join(card.split()) for word in words), "the card does not say what the claim says")
    return "summary.json and the model card say what the claim says"


def _loss(run: RunFolder) -> str:
    from cotune.shared.scoring import score

    said = run.claim()["evidence"]["reload_check"]["loss_saved"]
    found = score(str(run.path), data=None, job_file=None, base_only=False, limit=PROBE_ROWS).loss
    close = math.isclose(found, said, rel_tol=LOSS_TOLERANCE)
    _require(close, f"the adapter gives loss {found:.4f}, the run ended at {said:.4f}")
    return f"{found:.4f}, as when it was saved"
