"""What the run used of energy, if it was measured."""

from __future__ import annotations

from cotune.shared.footprint import INSTALL
from cotune.shared.report import wording
from cotune.shared.report.evidence import Evidence
from cotune.shared.report.method import Fact


def footprint_sentence(evidence: Evidence) -> str:
    """Energy and CO2 in one sentence, or why they are not known."""
    energy, co2 = evidence.footprint.get("energy_kwh"), evidence.footprint.get("co2_kg")
    if energy is None and evidence.job.data.deployed:
        return "not measured here: the sites did the work; `cotune site status` at each says what its machine used"
    if energy is None:
        return f"not measured: {INSTALL}"
    said = f"{wording.small(1000 * energy)} Wh"
    return said if co2 is None else f"{said}, {wording.small(1000 * co2)} g CO2 equivalent"


def footprint_facts(evidence: Evidence) -> tuple[Fact, ...]:
    """Energy, CO2 and how they were come by; one row that says so where nothing was measured."""
    kept = evidence.footprint
    if kept.get("energy_kwh") is None:
        return (Fact("Energy and CO2", footprint_sentence(evidence)),)
    co2, share = kept.get("co2_kg"), 1000 * kept["energy_kwh"] / evidence.job.sites
    return (
        Fact("Energy", f"{wording.small(1000 * kept['energy_kwh'])} Wh"),
        Fact("CO2 equivalent", wording.ABSENT if co2 is None else f"{wording.small(1000 * co2)} g"),
        Fact("For a site", f"{wording.small(share)} Wh, an equal share: all were simulated on one machine"),
        Fact("Measured over", wording.duration(kept.get("seconds"))),
        Fact("Electricity of", str(kept.get("country") or wording.ABSENT)),
        Fact("How", str(kept.get("how") or wording.ABSENT)),
    )
