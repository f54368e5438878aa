"""Measured attacks against the claim: they are about it, and none got further than it allows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from cotune.shared.checking.checks import require
from cotune.shared.checking.examined import Examined
from cotune.shared.checking.ledgers import costliest
from cotune.shared.privacy.group import epsilon_group

SCHEMA = "cotune/attack/1"
NOTHING, UNTESTED = "nothing claimed", "not tested"


def attack(examined: Examined) -> str:
    """Whether attack/results.json, if there is one, is about this claim and bears it out."""
    path = examined.run.attack / "results.json"
    if not path.exists():
        return "not run (cotune attack RUN)"
    said, claim = json.loads(path.read_bytes()), examined.claim
    require(said["schema"] == SCHEMA, "attack/results.json is of a version this cotune does not know")
    about = (said["run_id"], said["claim_id"]) == (claim["run_id"], claim["claim_id"])
    require(about, "attack/results.json is about another claim")
    if claim["guarantee"] is None:
        require(said["verdict"] == NOTHING, "nothing is claimed, the attack's verdict says otherwise")
        return "the claim promises nothing; there is nothing to break"
    audits, canaries = said["run"]["audit"], said["run"]["canaries"] or {}
    rows = int(canaries.get("rows_each", 1))
    for audit in audits:
        _require_below(examined, audit, 1 if examined.job.privacy.level == "unit" else rows)
    verdict = "holds" if audits else UNTESTED
    require(said["verdict"] == verdict, "the attack's verdict is that the claim does not hold")
    return f"{len(audits)} audits, no lower bound above the claim"


def _require_below(examined: Examined, audit: Mapping[str, Any], units: int) -> None:
    """An audit's lower bound is not above what is claimed of canaries that are so many units each."""
    guarantee, who = examined.claim["guarantee"], str(audit["method"])
    bound = guarantee["epsilon"]
    if audit["delta"] != guarantee["delta"] or units > 1:
        bound = costliest(examined, partial(epsilon_group, records=units), float(audit["delta"]))
    found = float(audit["epsilon_lower"])
    require(math.isfinite(found) and found <= bound, f"{who}: lower bound {found:.3f}, above the claim of {bound:.3f}")
    require(audit["holds"] is True, f"{who}: says that the claim does not hold")
    said = audit["claimed_epsilon"]
    right = said is not None and math.isclose(said, bound, rel_tol=1e-4)
    require(right, f"{who}: was held against another epsilon than the claim's")
    possible = 0 <= audit["right"] <= audit["guesses"]
    require(possible, f"{who}: {audit['right']} of {audit['guesses']} guesses right, which cannot be")
