"""Checking a run without trusting what it says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cotune.shared.errors import CotuneError
from cotune.shared.files import file_sha256
from cotune.shared.privacy.accounting import epsilon, epsilon_by_prv
from cotune.shared.privacy.claim import ClaimSubject, build_claim, claim_id, events_of
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

    Epsilon is recomputed from `privacy/accountant.json` by PLD and, independently, by Opacus' PRV; the
    adapter is loaded by PEFT and its loss compared.
    """
    checks: dict[str, Callable[[RunFolder], str]] = {
        "files": _files,
        "job": _job,
        "claim": _claim,
        "released adapter": _subject,
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
        run.run_id, {s["name"]: s["sha256"] for s in claim["subject"]}, claim["evidence"]["reload_check"]
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
    return json.loads((run.privacy / "accountant.json").read_text(encoding="utf-8"))["sites"]


def _events(run: RunFolder) -> str:
    accounts = _accounts(run)
    job = run.job()
    trained = {(row["round"], row["site"]) for row in run.metrics() if row.get("site")}
    reserved = {(entry["round"], site) for site, entries in accounts.items() for entry in entries}
    _require(trained <= reserved, "a round is in metrics.jsonl that no event was charged for")
    for site, entries in accounts.items():
        for entry in entries:
            event = entry["event"]
            if event["kind"] != "dp-sgd":
                continue
            expected = (job.sampling_probability, job.privacy.noise_multiplier, job.train.local_steps)
            found = (event["sampling_probability"], event["noise_multiplier"], event["steps"])
            _require(
                found == expected,
                f"{site}: round {entry['round']} was charged as something else than planned",
            )
    return f"{len(reserved)} site rounds charged, {len(trained)} used"


def _epsilon(run: RunFolder) -> str:
    claim = run.claim()
    worst = 0.0
    for site in claim["sites"]:
        events = events_of(_accounts(run)[site["id"]])
        if claim["guarantee"] is None and site["epsilon"] is None:
            continue
        found = epsilon(events, site["delta"])
        close = math.isclose(found, site["epsilon"], abs_tol=EPSILON_TOLERANCE, rel_tol=EPSILON_TOLERANCE)
        _require(close, f"{site['id']}: {found:.4f} from its events, the claim says {site['epsilon']:.4f}")
        worst = max(worst, found)
    if claim["guarantee"] is None:
        return "nothing is promised, nothing to recompute"
    _require(len(claim["sites"]) == len(_accounts(run)), "a site is missing from the claim")
    _require(abs(claim["guarantee"]["epsilon"] - worst) <= EPSILON_TOLERANCE, "the claim is not its largest site's")
    return f"{worst:.4f} recomputed from events by dp-accounting PLD"


def _second(run: RunFolder) -> str:
    claim = run.claim()
    if claim["guarantee"] is None:
        return "nothing is promised, nothing to recompute"
    largest = max(epsilon_by_prv(events_of(_accounts(run)[site["id"]]), site["delta"]) for site in claim["sites"])
    said = claim["guarantee"]["epsilon"]
    _require(abs(largest - said) <= PRV_ERROR, f"Opacus PRV gives {largest:.4f}, the claim says {said:.4f}")
    return f"{largest:.4f} by Opacus PRV, within {PRV_ERROR} of the claim"


def _summary(run: RunFolder) -> str:
    claim, summary = run.claim(), run.summary()
    said = {site["site"]: site["epsilon"] for site in summary["sites"]}
    _require(said == {site["id"]: site["epsilon"] for site in claim["sites"]}, "summary.json has other epsilons")
    card = (run.adapter / "README.md").read_text(encoding="utf-8")
    words = (claim["statement"],) if claim["guarantee"] else ("NON-PRIVATE", "NOT PRIVATE")
    _require(any(word in " ".join(card.split()) for word in words), "the card does not say what the claim says")
    return "summary.json and the model card say what the claim says"


def _loss(run: RunFolder) -> str:
    from cotune.shared.scoring import score

    said = run.claim()["evidence"]["reload_check"]["loss_saved"]
    found = score(str(run.path), data=None, job_file=None, base_only=False, limit=PROBE_ROWS).loss
    close = math.isclose(found, said, rel_tol=LOSS_TOLERANCE)
    _require(close, f"the adapter gives loss {found:.4f}, the run ended at {said:.4f}")
    return f"{found:.4f}, as when it was saved"
