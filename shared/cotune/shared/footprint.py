"""What a run on this machine uses of energy, estimated by codecarbon without a network; optional."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Generator, Mapping
from importlib.util import find_spec
from typing import Any

from cotune.shared.errors import JobError
from cotune.shared.files import write_json
from cotune.shared.runs import RunFolder

COUNTRY, SWITCH = "COTUNE_COUNTRY", "COTUNE_FOOTPRINT"
WORLD = "world average: no country was said (COTUNE_COUNTRY)"
HOW = {
    "cpu_load": "estimated from the processor's nominal power and the share of it that the run used",
    "intel_rapl": "by the processor's own counters (RAPL), of the whole machine",
    "constant": "estimated from a typical processor's constant power",
}


def country() -> str | None:
    """The three-letter code of the country whose electricity is used; None where nobody said.

    Raises:
        JobError: It is no code that codecarbon has figures for (E-COUNTRY).
    """
    said = os.environ.get(COUNTRY)
    if not said or not is_measured():
        return None
    from codecarbon.input import DataSource

    if said not in DataSource().get_global_energy_mix_data():
        raise JobError(
            "E-COUNTRY", f"expected a country's three capital letters (ISO 3166), such as DEU, got {said!a:.20}",
            param=COUNTRY, hint=f"export {COUNTRY}=DEU; or unset it: the world's average is used then",
        )  # fmt: skip
    return said


def is_measured() -> bool:
    """Whether energy is measured here: codecarbon is installed, and COTUNE_FOOTPRINT is not 0."""
    return os.environ.get(SWITCH) != "0" and find_spec("codecarbon") is not None


@contextlib.contextmanager
def measuring(run: RunFolder, written: Callable[[], None]) -> Generator[None]:
    """Measure this process and all it starts while the block runs, and write ``env/footprint.json`` at its end.

    The tracker sends nothing and writes nothing, whatever the user's own settings of codecarbon are: outputs and
    the token of its only service are given here. It samples from a thread of its own, every 15 seconds; what a
    process used that began and ended between two samples is missed.

    Args:
        run: Whose footprint it is.
        written: Called once there is one, so that what shows it can be written anew; not if the block raises.

    Raises:
        JobError: The country is none (E-COUNTRY); before the block.
    """
    where = country()
    tracker = _tracker(where) if is_measured() else None
    try:
        yield
    finally:
        found = _stopped(tracker, where) if tracker else None
        if found:
            write_json(run.path / "env" / "footprint.json", {**found, **_with_earlier(run, found)})
    if found:
        written()


def _tracker(where: str | None) -> Any:
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    tracker: Any = OfflineEmissionsTracker(
        **({"country_iso_code": where} if where else {}),
        cloud_provider=None,
        region=None,
        tracking_mode="process",
        output_methods=[],
        output_handlers=[],
        electricitymaps_api_token="",
        allow_multiple_runs=True,
        log_level="critical",
    )
    tracker.start()
    return tracker


def _stopped(tracker: Any, where: str | None) -> dict[str, Any] | None:
    """The measured figures; None where the tracker, which hides its own errors, has none."""
    tracker.stop()
    figures = getattr(tracker, "final_emissions_data", None)
    if figures is None:
        return None
    modes = [getattr(part, "_mode", None) for part in getattr(tracker, "_hardware", [])]
    how = next((HOW[mode] for mode in modes if mode in HOW), "estimated")
    return {
        "energy_kwh": float(figures.energy_consumed),
        "co2_kg": float(figures.emissions),
        "seconds": round(float(figures.duration), 3),
        "how": f"{how}; memory by its size; codecarbon {figures.codecarbon_version}",
        "country": f"{figures.country_name} ({where})" if where else WORLD,
    }


def _with_earlier(run: RunFolder, found: Mapping[str, Any]) -> dict[str, float]:
    """The sums with what earlier processes of the same run used: one that was interrupted goes on in another."""
    path = run.path / "env" / "footprint.json"
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: found[name] + earlier.get(name, 0.0) for name in ("energy_kwh", "co2_kg", "seconds")}
