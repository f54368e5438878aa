"""Time and memory of one step of private training, beside the same step of plain PEFT and of Opacus.

python benchmarks/clipping.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cotune.shared.methods import trainable
from cotune.shared.placement import device
from variants import UNCLIPPED, VARIANTS, Case, Variant

RESULTS = Path(__file__).parent / "results"
TIME_TARGET, MEMORY_TARGET = 1.10, 1.15
CPU = (
    Case("llama-9m-random", 128, 16, repeats=9, others=3),
    Case("llama-9m-random", 512, 4, repeats=9, others=3),
    Case("smollm2-135m-shape", 128, 8, repeats=4, others=1),
    Case("smollm2-135m-shape", 512, 2, repeats=4, others=1),
)
QUICK = (Case("llama-9m-random", 128, 8, repeats=3), Case("llama-9m-random", 512, 2, repeats=3))
CUDA = (
    Case("llama-1b-shape", 128, 16, repeats=30, others=10),
    Case("llama-1b-shape", 512, 4, repeats=30, others=10),
)
PRELOADED = ["opacus", "transformers.models.llama.modeling_llama", "cotune.client.training"]
TINY = Case("llama-9m-random", 8, 2)  # loads whatever code a first step loads
# Blocks of this many bytes go back to the system when they are freed: memory that is resident is then in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
COLUMNS = {
    "variant": 12,
    "CPU time": 8,
    "lowest-highest": 14,
    "of the fastest": 14,
    "wall time": 9,
    "step's memory": 13,
    "ratio": 5,
    "with the model": 14,
    "gradient error": 14,
}

Gradients = dict[str, Tensor]


def main() -> None:
    """Measure, print a table a case, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model, few repeats: about a minute")
    parser.add_argument("--out", type=Path, help="JSON file; default results/clipping-MACHINE.json, none if --quick")
    options = parser.parse_args()
    _one_thread()
    cases = QUICK if options.quick else CUDA if device().type == "cuda" else CPU
    report: dict[str, Any] = {"machine": machine(), "load_average": [psutil.getloadavg()[0]], "cases": []}
    with _processes() as processes:
        for case in cases:
            report["cases"].append(asdict(case) | {"variants": measure(case, processes)})
            report["load_average"].append(psutil.getloadavg()[0])
            _show(report["cases"][-1])
    slug = re.sub(r"[^a-z0-9]+", "-", f"{report['machine']['name']} {report['machine']['cores']} cores".lower())
    out = options.out or (None if options.quick else RESULTS / f"clipping-{slug}.json")
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    name = torch.cuda.get_device_name() if device().type == "cuda" else platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if device().type == "cpu" and info.exists():
        found = re.search(r"^model name\s*: (.*)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else name
    versions = {package: version(package) for package in ("torch", "transformers", "peft", "opacus", "cotune")}
    return {"name": name, "cores": os.cpu_count(), "system": platform.system(), "versions": versions}


def measure(case: Case, processes: ProcessPoolExecutor) -> dict[str, Any]:
    """Gradient error, time and memory of every variant, and their ratios to plain PEFT."""
    growth = {name: processes.submit(peak, case, name) for name in VARIANTS}
    memory = {name: future.result() for name, future in growth.items()}
    variants, errors = prepare(case)
    times = time_interleaved(case, variants)
    return {
        name: {
            "gradient_error": errors[name],
            "cpu": ratios(times[name], times["peft"], 0),
            "wall": ratios(times[name], times["peft"], 1),
            "memory": _compared(memory[name], memory["peft"]),
        }
        for name in VARIANTS
    }


# Gradients: each variant's first step, against every example alone.


def prepare(case: Case) -> tuple[dict[str, Variant], dict[str, float]]:
    """Every variant after one step, and the error of the gradient its optimiser was given.

    The clipping norm is the median of the examples' norms: about half of them are clipped.
    """
    rows = list(one_by_one(case))
    norm = statistics.median(map(norm_of, rows))
    variants = {name: start(case, norm) for name, start in VARIANTS.items()}
    wanted = {name: mean_of(rows, math.inf if name in UNCLIPPED else norm) for name in VARIANTS}
    return variants, {name: error_of(first_step(variants[name]), wanted[name]) for name in VARIANTS}


def one_by_one(case: Case) -> Iterator[Gradients]:
    """Each example's gradient, by plain PEFT on that example alone, as fp64."""
    adapted = case.adapted()
    for row in case.ids:
        adapted(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        yield _taken(adapted)
        adapted.zero_grad()


def first_step(variant: Variant) -> Gradients:
    """Take a step; returns the gradient that the optimiser was given, as fp64."""
    found: list[Gradients] = []

    def take(*_: object) -> None:
        found.append(_taken(variant.adapted))

    hook = register_optimizer_step_pre_hook(take)
    try:
        variant.step()
    finally:
        hook.remove()
    return found[-1]


def _taken(adapted: Any) -> Gradients:
    return {name: p.grad.detach().double() for name, p in trainable(adapted).items()}


def norm_of(gradients: Gradients) -> float:
    """L2 norm over all parameters together."""
    return math.hypot(*(float(g.norm()) for g in gradients.values()))


def mean_of(rows: Sequence[Gradients], norm: float) -> Gradients:
    """Mean of gradients, each scaled down to at most this norm."""
    weights = torch.tensor([min(1.0, norm / norm_of(row)) / len(rows) for row in rows], dtype=torch.float64)
    return {
        name: torch.tensordot(weights.to(g.device), torch.stack([r[name] for r in rows]), 1)
        for name, g in rows[0].items()
    }


def error_of(found: Gradients, wanted: Gradients) -> float:
    """The largest relative L2 error of any parameter's gradient."""
    return max(float((found[name] - g).norm() / g.norm()) for name, g in wanted.items())


# Time: in one process, every variant in turn, one thread for arithmetic.


def time_interleaved(case: Case, variants: Mapping[str, Variant]) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds of all threads, wall seconds) of each variant's steps; entry i is of repeat i."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for repeat in range(case.repeats):
        names = [name for name in variants if repeat < case.others or name in ("peft", "cotune")]
        for name in names if repeat % 2 == 0 else reversed(names):  # nobody always comes after the same
            cpu, wall = time.process_time(), time.perf_counter()
            variants[name].step()
            if device().type == "cuda":
                torch.cuda.synchronize()
            found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return found


def ratios(
    times: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]], clock: int
) -> dict[str, float]:
    """A variant's times and their ratios to the reference's of the same repeat."""
    own, other = [t[clock] for t in times], [t[clock] for t in reference[: len(times)]]
    paired = [a / b for a, b in zip(own, other, strict=True)]
    return {
        "fastest_s": min(own),
        "median_s": statistics.median(own),
        "ratio_of_fastest": min(own) / min(other),
        "ratio_median": statistics.median(paired),
        "ratio_lowest": min(paired),
        "ratio_highest": max(paired),
    }


# Memory: every variant in a process of its own.


def peak(case: Case, name: str) -> tuple[int, int]:
    """Bytes of the loaded model, and the most that one step needs on top of what was there before it."""
    _one_thread()
    VARIANTS[name](TINY, 1.0).step()
    variant = VARIANTS[name](case, 1.0)
    model = sum(p.numel() * p.element_size() for p in variant.adapted.parameters())
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.step()
        return model, torch.cuda.max_memory_allocated() - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = _resident("VmRSS")
    variant.step()
    return model, _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def _compared(own: tuple[int, int], other: tuple[int, int]) -> dict[str, float]:
    return {
        "model_bytes": own[0],
        "step_bytes": own[1],
        "ratio": own[1] / other[1],
        "ratio_with_model": sum(own) / sum(other),
    }


def _processes() -> ProcessPoolExecutor:
    """One fresh process a task, with the libraries loaded."""
    os.environ.update(MALLOC)
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1)


def _one_thread() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


def _show(case: Mapping[str, Any]) -> None:
    lines = [
        f"\n{case['model']}, {case['tokens']} tokens x {case['batch']} examples\n",
        _line(COLUMNS),
        _line(["-" * w for w in COLUMNS.values()]),
    ]
    for name, found in case["variants"].items():
        cpu, wall, memory = found["cpu"], found["wall"], found["memory"]
        lines.append(
            _line(
                [
                    name,
                    f"{cpu['ratio_median']:.2f}",
                    f"{cpu['ratio_lowest']:.2f}-{cpu['ratio_highest']:.2f}",
                    f"{cpu['ratio_of_fastest']:.2f}",
                    f"{wall['ratio_median']:.2f}",
                    f"{memory['step_bytes'] / 2**20:.0f} MiB",
                    f"{memory['ratio']:.2f}",
                    f"{memory['ratio_with_model']:.2f}",
                    f"{found['gradient_error']:.0e}",
                ]
            )
        )
    ours = case["variants"]["cotune"]
    time_ratio, memory_ratio = ours["cpu"]["ratio_median"], ours["memory"]["ratio"]
    met = time_ratio <= TIME_TARGET and memory_ratio <= MEMORY_TARGET
    lines.append(f"target: CPU time {TIME_TARGET:.2f}, memory {MEMORY_TARGET:.2f}: {'met' if met else 'MISSED'}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)) + " |"


if __name__ == "__main__":
    main()
