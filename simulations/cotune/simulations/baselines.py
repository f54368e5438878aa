"""What the federated private model is compared with: each site alone, no privacy, all data in one place."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from cotune.shared.files import write_json
from cotune.shared.job import Job
from cotune.shared.jobfile import dump_toml
from cotune.shared.records import Record
from cotune.shared.report.renewal import renew
from cotune.shared.runs import RunFolder, create_run
from cotune.simulations.federation import run_inline
from cotune.simulations.scenario import site_names, site_records, work_folder


def add_baselines(run: RunFolder, *, quiet: bool) -> None:
    """Run every baseline and add its scores to the run's summary and report.

    Each takes the run's own steps on its own data; only what its name says differs. Baselines without privacy
    are marked so (epsilon null); their folders are not kept.
    """
    lines: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="cotune-baselines-") as folder:
        for name, job in _variants(run.job(), Path(folder)):
            if not quiet:
                click.echo(f"baseline: {name} ...", err=True)
            other = create_run(Path(folder) / "runs", job, dump_toml(job).encode())
            try:
                run_inline(other)
            finally:
                shutil.rmtree(work_folder(other.run_id), ignore_errors=True)
            result = other.summary()
            lines.append({"name": name, "epsilon": result["sites"][0]["epsilon"], "evaluation": result["final"]})
    write_json(run.path / "summary.json", {**run.summary(), "baselines": lines})
    renew(run)


def _variants(job: Job, folder: Path) -> Iterator[tuple[str, Job]]:
    job = job.replace(audit={"canaries": 0, "secrets": 0})  # what a baseline reads is in its files
    files = {site: _write(folder / f"{site}.jsonl", site_records(job, site)) for site in site_names(job)}
    for site, file in files.items():
        alone = {"train": None, "sites": {site: file}, "split": "iid", "split_column": None}
        yield f"{site} alone, same epsilon", job.replace(data=alone, federation={"min_sites": 1})
    # Without clipping a gradient keeps its own length, so the rate that suits clipped ones is scaled back.
    rate = job.train.learning_rate * job.privacy.clipping_norm
    yield "federated without DP", job.replace(privacy={"level": "none"}, train={"learning_rate": rate})
    pooled = {
        "train": None,
        "sites": {"pooled": _write(folder / "pooled.jsonl", [r for s in files for r in site_records(job, s)])},
        "split": "iid",
        "split_column": None,
        "records_per_site": job.data.records_per_site * len(files),
    }
    yield (
        "all data in one place, without DP",
        job.replace(
            data=pooled,
            privacy={"level": "none"},
            federation={"min_sites": 1},
            train={"batch_size": job.train.batch_size * len(files), "learning_rate": rate},
        ),
    )


def _write(path: Path, records: list[Record]) -> str:
    """A baseline's records as a private file of its own; the folder is removed afterwards."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            turns = [{"role": role, "content": content} for role, content in record.messages]
            row = {**record.columns, **({"messages": turns} if turns else {})}
            file.write(json.dumps(row) + "\n")
    path.chmod(0o600)
    return str(path)
