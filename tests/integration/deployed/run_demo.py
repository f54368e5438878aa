"""The demo's job over three machines of their own, and as a simulation: the adapters must be the same, bit for bit.

`python tests/integration/deployed/run_demo.py [--rounds N] [--out FILE]`: SmolLM2, 8,000 ICD-10 rows, seeded noise.
Takes twice as long as `make demo`. Needs root, for machines of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import tomli_w

if __package__ is None:  # run as a program
    sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.integration.deployed.federation import federation
from tests.integration.deployed.networks import why_not
from tests.integration.deployed.study import DATASET, SITES, simulated_adapter

from cotune.shared.datasets import dataset_path
from cotune.shared.jobfile import load_job
from cotune.shared.model import locate
from cotune.shared.packages import cache_dir
from cotune.shared.planning import resolve
from cotune.shared.records import read_records
from cotune.simulations.partition import split
from cotune.simulations.scenario import recipe_path

PATIENCE_S = 7200.0


def write_demo(folder: Path, rounds: int) -> Path:
    """The demo's job with a file of rows for each of three sites; returns its file."""
    job = resolve(load_job(recipe_path("icd10-routing"), [f"federation.sites={len(SITES)}", "federation.min_sites=3"]))
    train = dataset_path(str(job.data.train))
    rows = train.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "records").mkdir(parents=True)
    files = {site: folder / "records" / f"{site}.jsonl" for site in SITES}
    for site, share in split(read_records(train), job.data, len(SITES), job.run.seed).items():
        files[site].write_text("".join(rows[row] for row in share), encoding="utf-8")
    settings = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    settings["run"]["rounds"] = rounds
    settings["privacy"]["noise"] = "test"
    settings["data"] |= {"sites": {site: str(path) for site, path in files.items()}, "dataset": DATASET, "split": "iid"}
    for unsaid in ("train", "split_column"):
        settings["data"].pop(unsaid)
    settings["eval"] |= {"data": str(dataset_path(str(job.eval.data))), "choices": "auto"}
    (folder / "run.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    return folder / "run.toml"


def carry_base(cache: Path) -> None:
    """Give a machine's cache what this user's has of packages and converted models."""
    cache.mkdir(parents=True, exist_ok=True)
    for part in ("models", "wheels", "datasets"):
        if not (cache / part).exists() and (cache_dir() / part).exists():
            (cache / part).symlink_to(cache_dir() / part)


def main() -> int:
    """Do both; 0 if the adapters are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    chosen = parser.parse_args()
    if reason := why_not():
        sys.stderr.write(f"skipped: {reason}\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="cotune-demo-") as name:
        folder = Path(name)
        job = write_demo(folder / "job", chosen.rounds)
        began = time.monotonic()
        expected, simulated_s = simulated_adapter(job), time.monotonic() - began
        records = folder / "job" / "records"
        base, budget = locate(load_job(job)).sha256, {"delta-total": "5e-5"}
        with federation(folder, base, records_of=lambda _, site: records / f"{site}.jsonl", **budget) as f:
            for party in (f.coordinator, *f.sites.values()):  # machines without a network of packages
                carry_base(party.home.parent / "cache")
            began = time.monotonic()
            run = f.submit(job)
            f.approve()
            status = f.wait(run, PATIENCE_S)
            deployed_s = time.monotonic() - began
            same = status == "succeeded" and (run.adapter / "adapter_model.safetensors").read_bytes() == expected
            figures = {
                "status": status,
                "adapter equal to the simulation's": same,
                "accuracy": run.summary()["final"]["accuracy"] if status == "succeeded" else None,
                "seconds": {"simulated": round(simulated_s), "deployed": round(deployed_s)},
            }
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    if chosen.out:
        chosen.out.write_text(json.dumps(figures, indent=1) + "\n")
    return not same


if __name__ == "__main__":
    sys.exit(main())
