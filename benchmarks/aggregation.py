"""Aggregation rules under differential privacy, at equal bytes and equal steps.

    python benchmarks/aggregation.py --jobs 2

Eight sites, the demo's task, SmolLM2. First each rule's learning rate is looked for at epsilon 8, with a seed that does
not count; then every rule runs at epsilon 1, 3, 8 and without privacy, with three seeds. Ranks are such that each
rule sends about as many numbers, both ways together. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.shared.datasets import dataset_path
from cotune.shared.files import read_lines, write_json

HERE = Path(__file__).parent
ROWS = 4000  # 500 a site
RATES = (10, 40, 160)
# Numbers a layer, up and down together, v_proj of SmolLM2 (576 -> 192): 3,072 each, but 2,304 for alternation by
# round (its ups are one factor), 3,042 for Fed-SB; the offsets of the last two grow beyond.
RANKS = {
    "ffa": 8, "product_svd": 2, "fedavg_ab": 2, "alternating_rounds": 2, "alternating_steps": 2, "fed_sb": 39,
    "fedex": 2, "flora_stack": 2,
}  # fmt: skip


def rows_file(out: Path) -> Path:
    """The benchmark's records: a fixed draw from the demo's."""
    path = out / "rows.jsonl"
    if not path.exists():
        lines = dataset_path("dataset:icd10/train.jsonl")
        drawn = random.Random(0).sample(Path(lines).read_text(encoding="utf-8").splitlines(), ROWS)  # noqa: S311 - public
        path.write_text("\n".join(drawn) + "\n", encoding="utf-8")
    return path


def compare(out: Path, name: str, jobs: int, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run one comparison; what each of its cells gave."""
    own = [f"--for={rule}:{part}={rank}" for rule, rank in RANKS.items() for part in ("lora.r", "lora.alpha")]
    command = [sys.executable, "-m", "cotune.shared.cli", "compare", str(HERE / "aggregation.toml")]
    command += [f"data.train={rows_file(out)}", "--rules", ",".join(RANKS), *own, "--kept", str(out / "kept")]
    command += ["--out", str(out), "--name", name, "--jobs", str(jobs), "--i-know", *arguments]
    subprocess.run(command, check=True)
    return read_lines(out / name / "results.jsonl")


def best_rates(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each rule's learning rate of least loss."""
    best = {
        rule: min((line for line in lines if line["rule"] == rule), key=lambda line: line["loss"]) for rule in RANKS
    }
    return {rule: line["learning_rate"] for rule, line in best.items()}


def main() -> None:
    """Run both comparisons; the results go into benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("comparisons/aggregation"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--machine", default="this-machine", help="names the results file")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rates = ",".join(map(str, RATES))
    tuning = compare(
        out, "tuning", options.jobs, ["--epsilons", "8", "--seeds", "1001", "--vary", f"train.learning_rate={rates}"]
    )
    best = best_rates(tuning)
    tuned = [f"--for={rule}:train.learning_rate={rate}" for rule, rate in best.items()]
    lines = compare(out, "rules", options.jobs, ["--epsilons", "1,3,8,inf", "--seeds", "1,2,3", *tuned])
    result = {"rows": ROWS, "ranks": RANKS, "learning_rates": best, "tuning": tuning, "cells": lines}
    write_json(HERE / "results" / f"aggregation-{options.machine}.json", result)
    sys.stdout.write((out / "rules" / "table.md").read_text(encoding="utf-8"))
    sys.stdout.write(f"{json.dumps(best)}\n")


if __name__ == "__main__":
    main()
