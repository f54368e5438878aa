"""Time and peak memory of checking ledgers of many lines, beside reading and hashing the same bytes.

python benchmarks/verification.py [--lines N ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cotune.shared.chain import Entry, ledger_lines, next_line, read_chain, reserved, sign_head, walk_chain
from cotune.shared.exported import ExportedLedger, read_exported, verify_exported
from cotune.shared.keyfile import SigningKey
from cotune.shared.privacy.event import DpSgdEvent

EVENT = DpSgdEvent(sampling_probability=0.02, noise_multiplier=2.0, steps=4).to_dict()
RUN, SITE = "20260101-000000-aaaa-study", "site-1"
EVERY = 10_000  # one line in so many is a charge, the rest are refusals: a site that was flooded


def write_ledger(path: Path, lines: int, key: SigningKey) -> Entry:
    """A whole ledger of so many lines; its last entry."""
    fields: dict[str, Any] = {"site": SITE, "public_key": key.public, "simulated": True, "policy_sha256": "0" * 64}
    last: Entry | None = None
    with path.open("wb") as file:
        for number in range(lines):
            action = "site.init" if number == 0 else "job.refused"
            if number and number % EVERY == 0:
                action = "budget.reserve"
                fields = {"dataset": "notes", "unit": "record", "run_id": RUN, "job_sha256": "a" * 64}
                fields |= {"round": number // EVERY, "event": EVENT}
            elif number:
                fields = {"job_sha256": f"{number:064x}", "rule": "allow.models", "text": "base model is not allowed"}
            line = next_line(last, "2026-01-01T00:00:00+00:00", action, fields)
            [last] = read_chain(line, last)
            file.write(line)
    if last is None:
        raise SystemExit("expected at least one line")
    return last


def hashed(path: Path) -> int:
    """The reference: every byte read and hashed, nothing understood."""
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    return 0


def chained(path: Path) -> int:
    """What `cotune verify RUN` does with a site's ledger; how many charges it found."""
    entries = walk_chain(ledger_lines(path))
    return sum(len(reserved([entry], run_id=RUN)) for entry in entries if entry.action == "budget.reserve")


def exported(path: Path) -> int:
    """`cotune verify FILE` of the ledger as a site exports it; how many checks passed."""
    return sum(check.passed for check in verify_exported(read_exported(path.with_suffix(".json"))))


def measured(work: Callable[[Path], int], path: Path) -> dict[str, float]:
    """CPU seconds and MB beyond what the process had before, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (work, path))


def _measure(work: Callable[[Path], int], path: Path) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is reached from here on
    before, started = _peak_mb(), time.process_time()
    found = work(path)
    seconds = time.process_time() - started
    return {"cpu_s": round(seconds, 2), "grown_mb": round(_peak_mb() - before, 1), "found": found}


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Print the figures, one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 500_000, 1_000_000])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        key = SigningKey.create(Path(name) / "key")
        for lines in asked.lines:
            path = Path(name) / f"{lines}.jsonl"
            head = sign_head(key, SITE, write_ledger(path, lines, key))
            ledger = path.read_text(encoding="utf-8")
            file = ExportedLedger(
                site=SITE, public_key=key.public, simulated=True, cotune="0", head=head, spending=(), ledger=ledger
            )
            if path.stat().st_size < 200_000_000:
                path.with_suffix(".json").write_text(file.signed(key.sign).to_json(), encoding="utf-8")
            for what, work in (("read and hashed", hashed), ("chain of a run", chained), ("exported file", exported)):
                if work is exported and not path.with_suffix(".json").exists():
                    continue
                row = {"what": what, "lines": lines, "mb": round(path.stat().st_size / 1e6, 1), **measured(work, path)}
                results.append(row)
                sys.stdout.write(json.dumps(row) + "\n")
    if asked.out:
        asked.out.write_text(json.dumps({"results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
