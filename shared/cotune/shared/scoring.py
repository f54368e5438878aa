"""Scoring and exporting saved adapters, read back by PEFT's own loader as anybody else would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cotune.shared.errors import JobError, ModelError, StorageError
from cotune.shared.evaluation import Evaluation, Evaluator, choices_of, probe_records
from cotune.shared.files import storage_errors
from cotune.shared.finding import find_run
from cotune.shared.job import Job
from cotune.shared.jobfile import load_job
from cotune.shared.methods import quiet_peft
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.records import read_records
from cotune.shared.runs import RunFolder


def score(
    reference: str, *, data: Path | None, job_file: Path | None, base_only: bool, limit: int | None
) -> Evaluation:
    """Score a run's adapter, or the PEFT folder of any adapter on the base model a job file names.

    Raises:
        JobError: A lone adapter came without a job file.
        ModelError: It does not load.
        DataError: The rows cannot be read.
    """
    job, adapter = _job_and_adapter(reference, job_file)
    base = locate(job)
    model = load_model(base, job)
    network = Network(model if base_only else load_adapter(model, adapter), job)
    path = data or (Path(job.eval.data) if job.eval.data else None)
    records = read_records(path) if path else probe_records(job)
    if data:
        # Other rows, other answers: rank what occurs there unless the run's own list covers it.
        column = job.eval.group_column
        known = any(record.columns.get(column) is not None for record in records) if column else False
        choices = tuple(choices_of(records, job))
        job = job.replace(eval={"data": str(data), "choices": choices, "group_column": column if known else None})
    return Evaluator(network, records, load_tokenizer(base), job).score(limit)


def load_adapter(model: Any, folder: Path) -> Any:
    """Load a saved adapter onto its base model.

    Raises:
        ModelError: The folder is not a PEFT adapter with safetensors weights, or is one of another model.
    """
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").exists():
        raise ModelError(
            "E-ADAPTER", f"{folder}: expected adapter_config.json and adapter_model.safetensors",
            hint="cotune eval RUN",
        )  # fmt: skip
    try:
        with quiet_peft():
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except (ValueError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ModelError("E-ADAPTER", f"{folder}: does not fit the base model ({type(error).__name__})") from None


def _job_and_adapter(reference: str, job_file: Path | None) -> tuple[Job, Path]:
    folder = Path(reference)
    if (folder / "adapter_config.json").exists() and not (folder / "state.json").exists():
        if job_file is None:
            raise JobError(
                "E-USAGE", f"{folder} is a lone adapter: which base model?", param="--job",
                hint=f"cotune eval {folder} --job run.toml --data rows.jsonl",
            )  # fmt: skip
        return load_job(job_file), folder
    run = find_run(reference)
    return run.local_job(), run.adapter


def export_adapter(run: RunFolder, out: Path, *, merge: bool) -> None:
    """Copy the adapter, or write base plus adapter as one Hugging Face folder.

    Raises:
        StorageError: The folder exists or cannot be written.
        ModelError: The run has no adapter.
    """
    if out.exists():
        raise StorageError("E-EXISTS", f"{out} exists; nothing was written", param="--out")
    if not (run.adapter / "adapter_model.safetensors").exists():
        raise ModelError("E-ADAPTER", f"{run.run_id} has no adapter: it is {run.state()['status']}")
    with storage_errors(out):
        if not merge:
            shutil.copytree(run.adapter, out)
            return
        job = run.job()
        base = locate(job)
        merged = load_adapter(load_model(base, job), run.adapter).merge_and_unload()
        merged.save_pretrained(out)
        load_tokenizer(base).save_pretrained(out)
        shutil.copyfile(run.adapter / "README.md", out / "README.md")
