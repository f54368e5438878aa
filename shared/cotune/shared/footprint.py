"""What this machine uses of energy for a run, estimated by codecarbon without a network; optional."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Generator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cotune.shared.errors import JobError, StorageError
from cotune.shared.files import write_json

INSTALL = "python -m pip install 'cotune[footprint]'"
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
def measuring(path: Path, written: Callable[[], None] = lambda: None) -> Generator[None]:
    """Measure this process and all it starts while the block runs, and add it to what the file says at its end.

    The tracker sends nothing and writes nothing, whatever the user's own settings of codecarbon are: outputs and
    the token of its only service are given here. It samples from a thread of its own, every 15 seconds; what a
    process used that began and ended between two samples is missed.

    Args:
        path: The file of a run's footprint. What cannot be measured or written is lost, and nothing else is.
        written: Called once there is one, so that what shows it can be written anew; not if the block raises.

    Raises:
        JobError: The country is none (E-COUNTRY); before the block.
    """
    where, tracker, found = country(), None, None
    with contextlib.suppress(Exception):  # of a library that only measures
        tracker = _tracker(where) if is_measured() else None
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            found = _stopped(tracker, where) if tracker else None
        kept = found is not None and _kept(path, found)
    if kept:
        written()


def footprint(path: Path) -> dict[str, Any]:
    """What a file says: `energy_kwh`, `co2_kg`, `seconds`, `how` and `country`; empty where nothing was measured."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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


def _kept(path: Path, found: Mapping[str, Any]) -> bool:
    """Add it to what is there: a run that was interrupted goes on in another process, a site's run has many rounds."""
    earlier = footprint(path)
    sums = {name: found[name] + earlier.get(name, 0.0) for name in ("energy_kwh", "co2_kg", "seconds")}
    with contextlib.suppress(StorageError):
        write_json(path, {**found, **sums})
        return True
    return False
