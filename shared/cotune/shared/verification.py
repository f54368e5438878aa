"""Checking a run without trusting what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from cotune.shared.checking import attacks, claims, ledgers, signatures
from cotune.shared.checking.checks import Check, require, run_checks
from cotune.shared.checking.examined import Examined
from cotune.shared.model import locate
from cotune.shared.runs import RunFolder

LOSS_TOLERANCE = 1e-3
PROBE_ROWS = 64


def verify_run(run: RunFolder, signers: Mapping[str, Collection[str]] | None = None) -> list[Check]:
    """Every check in order; a check that cannot be made is a failed one, and one that hostile files break too.

    Epsilon is recomputed from the sites' own ledgers, whose hash chains and signed heads are checked first,
    by PLD and, independently, by Opacus' PRV; no figure of the run folder enters. The claim has to be what job
    and events give, and the coordinator and every site have to have signed its very bytes. The adapter is loaded by
    PEFT and its loss compared.

    Args:
        run: Its folder, whole or partial.
        signers: Who may sign claims, from elsewhere; see `signers.read_signers`.
    """
    return run_checks(CHECKS, Examined(run, signers))


def reloaded_loss(examined: Examined) -> str:
    """Whether the adapter, on the base the claim names, gives the loss it gave when the run ended."""
    from cotune.shared.scoring import score

    base = locate(examined.job)
    same = (base.name, base.sha256) == (examined.claim["model"]["base"], examined.claim["model"]["base_sha256"])
    require(same, f"the base model here is {base.name} {base.sha256[:12]}, not the one the claim names")
    check = examined.claim["evidence"]["reload_check"]
    require(check is not None, "the claim has no loss to compare with")
    said = check["loss_saved"]
    found = score(str(examined.run.path), data=None, job_file=None, base_only=False, limit=PROBE_ROWS).loss
    close = math.isclose(found, said, rel_tol=LOSS_TOLERANCE)
    require(close, f"the adapter gives loss {found:.4f}, the run ended at {said:.4f}")
    return f"{found:.4f}, as when it was saved"


CHECKS: dict[str, Callable[[Examined], str]] = {
    "state": claims.state,
    "files": claims.files,
    "form": claims.form,
    "job": claims.job,
    "claim": claims.claim,
    "released adapter": claims.subject,
    "coordinator's signature": signatures.coordinator,
    "sites' signatures": signatures.sites,
    "keys": signatures.signers,
    "ledgers": ledgers.chains,
    "events": ledgers.events,
    "epsilon": ledgers.first_accountant,
    "second accountant": ledgers.second_accountant,
    "metrics": ledgers.metrics,
    "summary": claims.summary,
    "card": claims.card,
    "attack": attacks.attack,
    "reloaded loss": reloaded_loss,
}
