"""What attacks get out of a model at several epsilons: lower bound against claim, membership, true positives at 1 %.

    python benchmarks/attacks.py                        # twelve runs, three seeds; goes on where it was interrupted
    python benchmarks/attacks.py --epsilons 8 inf --seeds 1

The job is the compliance demonstration's with one site of 120 notes, 100 candidates and no secrets; runs of one seed
share canaries. The last round's adapter is attacked. CPU seconds are a run's and its attacks', on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from cotune.shared.datasets import dataset_path
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.runs import RunFolder
from cotune.simulations.attack import audit
from cotune.simulations.attack.attacking import NOMINAL_DELTA, guessed, member_inference
from cotune.simulations.attack.canaries import planted_in
from cotune.simulations.attack.reader import Reader
from cotune.simulations.federation import run_inline
from cotune.simulations.scenario import prepare_run

RESULTS = Path(__file__).parent / "results" / "attacks-amd-epyc-2-cores.json"
WITHOUT = ("privacy.level=none", "train.optimizer=adamw", "train.learning_rate=0.01", "train.batch_size=64")
ROWS = {"train": 120, "eval": 150}
JOB = (
    "run.name=attacks", "run.rounds=4", "federation.sites=1", "federation.min_sites=1", "data.records_per_site=320",
    "data.units_per_site=160", "train.batch_size=32", "audit.secrets=0", "audit.canaries=100", "audit.rows_each=4",
    "eval.choices=[]", "eval.limit=4", "eval.every=1000", "simulation.workers=1", "simulation.threads=1",
)  # fmt: skip


def write_rows(folder: Path) -> list[str]:
    """The first of the demonstration's notes, as one site's records and held-out ones; returns settings that say so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in ROWS.items():
        lines = dataset_path(f"notes/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return [f"data.train={folder / 'train.jsonl'}", f"eval.data={folder / 'eval.jsonl'}"]


def measure(target: str, seed: int, folder: Path, like: RunFolder | None) -> tuple[RunFolder, dict[str, Any]]:
    """Train one run and attack its last checkpoint.

    Args:
        target: Epsilon; `inf` is no privacy.
        seed: Of where A starts and of the rows that are tried.
        folder: Where runs go, and what frozen layers made of records.
        like: The run whose canaries this one has.
    """
    began = time.process_time()
    how = WITHOUT if target == "inf" else (f"privacy.epsilon={target}",)
    settings = [*JOB, *write_rows(folder), *how, f"run.seed={seed}"]
    run = prepare_run("recipe:compliance", settings, folder, lambda _line: None, like)
    run_inline(run, folder / "kept")
    sorted(run.checkpoints.glob("round-*"))[-1].rename(run.adapter)
    reader, job = Reader(run, folder / "kept"), run.job()
    events = [mechanism_of(job).event(job.steps)]
    delta = NOMINAL_DELTA if job.privacy.delta == "auto" or not job.is_private else job.privacy.delta
    hypothesis = audit.as_claimed(events) if job.is_private else audit.gaussian
    guesses = guessed(reader, planted_in(run))
    tried = member_inference(reader, job)
    return run, {
        "epsilon": target,
        "seed": seed,
        "claimed": round(epsilon(events, delta), 3) if job.is_private else None,
        "guesses": guesses.made,
        "right": guesses.right,
        "lower_steinke": round(audit.lower_bound(guesses, delta), 3),
        "lower_f_dp": round(audit.lower_bound_of(guesses, hypothesis, delta), 3),
        **{name: round(tried[name], 3) for name in ("auc", "auc_low", "auc_high", "tpr_at_1pct_fpr")},
        "loss": next(row["valid_loss"] for row in reversed(run.metrics()) if not row.get("site")),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    """Every epsilon with every seed that is not measured yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epsilons", nargs="+", default=["1", "3", "8", "inf"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/attacks"), help="where runs go")
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(settings.out.read_text())["rows"] if settings.out.exists() else []
    done = {(row["epsilon"], row["seed"]) for row in rows}
    for seed in settings.seeds:
        like = None
        for target in settings.epsilons:
            if (target, seed) in done:
                continue
            run, row = measure(target, seed, settings.runs.resolve(), like)
            like = like or run
            rows.append(row)
            print(json.dumps(row), flush=True)  # noqa: T201
            settings.out.write_text(json.dumps({"machine": platform.machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
