"""What attacks on a run come to, written into its folder, and into its state if its claim did not hold."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cotune.shared.checking.attacks import SCHEMA
from cotune.shared.errors import CotuneError, JobError, RunFailed
from cotune.shared.files import storage_errors, write_json
from cotune.shared.report.renewal import renew
from cotune.shared.runs import BROKEN, RunFolder
from cotune.simulations.attack.attacking import Attacks, Say
from cotune.simulations.attack.canaries import canaries_sha256
from cotune.simulations.attack.leakage import gradient_leakage

Verdict = Literal["holds", "broken", "not tested", "nothing claimed"]
ALWAYS = (
    "the coordinator, who sees every site's noised update, could do more than a reader of the released model:"
    " that was not tried",
    "a bound below the claim proves nothing: other attacks may be stronger",
)


def attack_run(run: RunFolder, control: RunFolder | None, say: Say) -> dict[str, Any]:
    """Attack a run, and beside it a control that gives no privacy; write what was found into the run's folder.

    Guarantee: a lower bound above the claim makes the run a failed one (E-ATTACK-BOUND). Report and manifest
    are written anew.

    Raises:
        JobError: E-ATTACK-CONTROL: the control has other canaries, or privacy. E-RUN-HELD: it is being trained.
    """
    began = time.monotonic()
    if control is not None:
        _check_control(run, control)
    with run.held(), tempfile.TemporaryDirectory(prefix="cotune-attack-") as folder:
        kept = Path(folder) if control is not None and _one_base(run, control) else None
        attacks = Attacks(run, say, kept=kept)
        found = attacks.results()
        beside = None
        if control is not None:
            beside = Attacks(control, say, "control: ", kept, attacks.limits).results()
        leakage = attacks.tried("gradient leakage", lambda: gradient_leakage(run.local_job()))
        claim = run.claim() if (run.privacy / "claim.json").exists() else {}
        results = {
            "schema": SCHEMA,
            "run_id": run.run_id,
            "claim_id": claim.get("claim_id"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 1),
            "verdict": verdict_of(claim, found),
            "limits": [*attacks.limits, *ALWAYS],
            "run": found,
            "control": {"run_id": control.run_id, "results": beside} if control else None,
            "leakage": leakage,
        }
        _write(run, results)
    return results


def verdict_of(claim: Mapping[str, Any], found: Mapping[str, Any]) -> Verdict:
    """What the lower bounds say of a claim."""
    if not claim.get("guarantee"):
        return "nothing claimed"
    if not found["audit"]:
        return "not tested"
    return "holds" if all(bound["holds"] for bound in found["audit"]) else "broken"


def broken_claim(results: Mapping[str, Any]) -> CotuneError | None:
    """The error of a run whose claim an attack refuted; None if none did."""
    if results["verdict"] != "broken":
        return None
    worst = max(results["run"]["audit"], key=lambda bound: bound["epsilon_lower"])
    return RunFailed(
        BROKEN,
        f"{results['run_id']} gave away more than it claims: epsilon is at least {worst['epsilon_lower']:.2f} with"
        f" {worst['confidence']:.0%} confidence ({worst['method']}), the claim says {worst['claimed_epsilon']:.2f}",
        hint="do not publish the adapter; report it as the README says under Security",
    )


def _check_control(run: RunFolder, control: RunFolder) -> None:
    planted = canaries_sha256(run)
    if planted is None or planted != canaries_sha256(control):
        raise JobError(
            "E-ATTACK-CONTROL",
            f"{control.run_id} does not have the canaries of {run.run_id}: the two cannot be compared",
            param="--control",
            hint=f"cotune simulate JOB privacy.level=none --i-know --canaries-of {run.run_id}",
        )
    if control.job().is_private:
        raise JobError("E-ATTACK-CONTROL", f"{control.run_id} is private: a control gives none", param="--control")


def _one_base(run: RunFolder, control: RunFolder) -> bool:
    """Whether the frozen layers of both are the same."""
    one, other = run.job(), control.job()
    return (one.model, one.lora.last_layers) == (other.model, other.lora.last_layers)


def _write(run: RunFolder, results: Mapping[str, Any]) -> None:
    with storage_errors(run.attack):
        run.attack.mkdir(exist_ok=True)
    write_json(run.attack / "results.json", results)
    error = broken_claim(results)
    if error is not None:
        run.set_state("failed", int(run.state()["round"]), error)
    renew(run)
