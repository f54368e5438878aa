"""The job of the deployed tests, its records with words nobody may see, and the adapter that it must end with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from tests.integration.killed_study import rows, write_rows

SITES = ("site-1", "site-2", "site-3")
ROUNDS = 8
RECORDS = 30
DATASET = "notes"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


def canary(site: str, row: int) -> str:
    """A word of one record, which no other thing in the world has."""
    return f"zanzibar{site.replace('-', '')}row{row:04}quoll"


CANARY_PARTS = ("zanzibarsite", "quoll")


def write_records(folder: Path, site: str) -> Path:
    """A site's records: in each a word of its own, in the text and in a column."""
    folder.mkdir(parents=True, exist_ok=True)
    start = SITES.index(site) if site in SITES else 0
    made = [
        {
            "prompt": f"{canary(site, number)} {row['prompt']}",
            "completion": row["completion"],
            "patient": canary(site, number),
        }
        for number, row in enumerate(rows(3 * RECORDS)[start::3])
    ]
    return write_rows(folder / f"{site}.jsonl", made)


def write_job(folder: Path, model: Path, records: Mapping[str, Path], **sections: dict[str, Any]) -> Path:
    """A job over sites with a file each, with seeded noise unless said otherwise; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, dict[str, Any]] = {
        "run": {"name": "deployed", "seed": 3, "rounds": ROUNDS},
        "model": {"base": str(model), "max_length": 32},
        "lora": {"r": 2, "alpha": 4.0, "last_layers": 2},
        "data": {
            "sites": {site: str(path) for site, path in records.items()},
            "records_per_site": RECORDS,
            "dataset": DATASET,
        },
        "train": {"batch_size": 10, "local_steps": 4, "learning_rate": 0.5, "microbatch": 4},
        "privacy": {"noise_multiplier": 3.0, "delta": 1e-3, "noise": "test"},
        "federation": {"min_sites": len(records), "round_timeout_s": 240.0},
        "eval": {"data": str(write_rows(folder / "eval.jsonl", rows(12)))},
        "simulation": {"workers": 1, "threads": 1},
    }
    for section, changes in sections.items():
        settings[section] = {**settings.get(section, {}), **changes}
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps({"schema": 1, **settings}), encoding="utf-8")
    return path


def simulated_adapter(job: Path) -> bytes:
    """The adapter that `cotune simulate` makes of the job, on this machine."""
    out = job.parent / "simulated"
    command = [sys.executable, "-m", "cotune.shared.cli", "simulate", str(job), "--engine", "inline"]
    options = ["--out", str(out), "--i-know", "--quiet"]
    done = subprocess.run([*command, *options], env={**os.environ, **QUIET}, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cotune simulate ended with {done.returncode}: {done.stderr.decode()}")
    [adapter] = out.glob("*/adapter/adapter_model.safetensors")
    return adapter.read_bytes()


def leaks(places: Iterable[Path], words: Iterable[str] = CANARY_PARTS) -> list[str]:
    """Files under some places that hold any of these words."""
    needles = [form for word in words for form in (word.encode(), word.encode("utf-16-le"))]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    return sorted(str(f) for f in files if f.is_file() and any(needle in f.read_bytes() for needle in needles))
