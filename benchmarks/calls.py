"""CPU time of a site's call alone, in one process: what a busy machine can still measure of simulation.py.

python benchmarks/calls.py [--task llm|encoder] [--sites 5] [--rounds 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from clipping import RESULTS, machine
from cotune.server.fleet import Request
from cotune.shared.plan import ClaimRequest, LedgerRequest
from cotune.shared.runs import RunFolder
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure
from cotune.simulations.federation import InlineFleet
from cotune.simulations.scenario import answer_plan, begin, prepare_run
from studies import PLAIN, TASKS, plain_settings, write_study


class TimedFleet:
    """An `InlineFleet` that notes what each answer takes; in the last round the plain app takes its turn beside it."""

    def __init__(self, run: RunFolder, config: dict[str, Any]) -> None:
        self._inline, self._config, self._last = InlineFleet(run), config, run.job().run.rounds
        self.calls: list[dict[str, Any]] = []

    def sites(self) -> Sequence[str]:
        """Names of the sites."""
        return self._inline.sites()

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Train each site in turn."""
        for plan, adapter in requests:
            place = self.sites().index(plan.site)
            plain = plain_call(self._config, place) if plan.round == self._last else {}
            started = time.process_time()
            answer = answer_plan(plan, adapter)
            self.calls.append({"round": plan.round, "cotune_s": time.process_time() - started} | plain)
            if not isinstance(answer, AdapterUpdate):
                raise SystemExit(f"{plan.site}: {answer.message}")
            yield answer

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """Each site's ledger."""
        return self._inline.ledgers(requests)

    def countersign(self, requests: Sequence[ClaimRequest]) -> Iterator[tuple[str, str | SiteFailure]]:
        """Each site's signature of the claim."""
        return self._inline.countersign(requests)


def plain_call(config: dict[str, Any], partition: int) -> dict[str, float]:
    """What the plain app's client does with a message."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from task import load_data, load_model, train  # pyright: ignore[reportMissingImports] - the plain app's, put on the path above

    started = time.process_time()
    model = load_model(config)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    loader = load_data(config, partition)
    loaded = time.process_time()
    train(model, loader, config)
    return {"plain_load_s": loaded - started, "plain_train_s": time.process_time() - loaded}


def main() -> None:
    """Measure, print the medians, write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="llm", help="what is trained")
    parser.add_argument("--sites", type=int, default=5, help="number of sites, all asked in each round")
    parser.add_argument("--rounds", type=int, default=5, help="of cotune; the plain app takes part in the last")
    parser.add_argument("--out", type=Path, help="JSON file; default results/calls-TASK-MACHINE.json")
    options = parser.parse_args()
    sys.path.insert(0, str(PLAIN))
    torch.set_num_threads(1)
    found = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{options.task} {found['name']} {found['cores']} cores".lower())
    report: dict[str, Any] = {"machine": found, "task": options.task, "load_average": [psutil.getloadavg()[0]]}
    with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as name:
        path = write_study(options.task, options.sites, options.sites, options.rounds, Path(name))
        run = prepare_run(str(path), (), Path(name) / "runs", lambda _words: None)
        report["calls"] = measure(run, options.sites)
    report["load_average"].append(psutil.getloadavg()[0])
    (options.out or RESULTS / f"calls-{slug}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for number in range(1, options.rounds + 1):
        rows = [row for row in report["calls"] if row["round"] == number]
        times = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "round"}
        words = "  ".join(f"{key.removesuffix('_s')} {1000 * value:.0f} ms" for key, value in times.items())
        sys.stdout.write(f"round {number}: {words}\n")


def measure(run: RunFolder, sites: int) -> list[dict[str, Any]]:
    """All calls of a prepared run; what the run gives is not published."""
    from cotune.server.coordinator import Coordinator
    from cotune.server.evaluation import GlobalEvaluator
    from cotune.shared.methods import layout_of
    from cotune.shared.model import locate

    begin(run)
    job = run.job()
    config = plain_settings(job, sites, run.path / "times")
    plain_call(config, 0)  # imports and caches
    fleet = TimedFleet(run, config)
    layout, adapter = layout_of(job, locate(job))
    with run.held():
        run.set_state("running", 0)
        Coordinator(run, layout, adapter, GlobalEvaluator(job)).run(fleet)
    return fleet.calls


if __name__ == "__main__":
    main()
