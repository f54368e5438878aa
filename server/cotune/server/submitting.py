"""A job file as a deployed run: enrolled sites, a pinned base model, and nothing in it that sites need not know."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.shared.cli import job_file
from cotune.shared.datasets import dataset_path
from cotune.shared.errors import JobError, did_you_mean
from cotune.shared.files import file_sha256, write_atomic, write_json
from cotune.shared.job import Job
from cotune.shared.jobfile import load_job
from cotune.shared.records import read_records
from cotune.shared.runs import RunFolder, create_run
from cotune.shared.sections import CONTENT, SITE

if TYPE_CHECKING:
    from cotune.shared.model import BaseModel


def prepare_deployed(
    source: str,
    overrides: Sequence[str],
    enrolled: Collection[str],
    out: Path,
    say: Callable[[str], None],
    *,
    i_know: bool,
) -> RunFolder:
    """Read, resolve and check a job for real sites, and make its run folder.

    Of the file's `[data.sites]` only the names are taken: where a site's records are, its own policy says. Public
    rows the coordinator scores on are copied into the run folder; the job names them by their hash.

    Args:
        source: A job file, or `recipe:NAME`.
        overrides: Settings.
        enrolled: Names of the sites that may be asked.
        out: The folder the run's folder is made in.
        say: Gets a line where it takes long.
        i_know: Accept a job that gives no privacy.

    Raises:
        CotuneError: Anything that would make the run fail later and can be known now.
    """
    from cotune.shared.model import locate
    from cotune.shared.planning import make_plan

    path = job_file(source)
    job = _for_sites(load_job(path, overrides), enrolled)
    _require_consent(job, i_know)
    say("base model (fetched and converted the first time) ...")
    base = locate(job)
    job, inputs = _without_paths(_settled(job, base))
    plan = make_plan(job, base)
    run = create_run(out, job, path.read_bytes())
    _keep(inputs, run)
    write_json(run.path / "plan.json", plan.to_dict())
    run.set_engine("deployed")  # last: from here on it may be given to Flower
    return run


def _keep(inputs: Mapping[str, Path], run: RunFolder) -> None:
    """Copy public rows into the run folder, each file named by its hash."""
    run.inputs.mkdir()
    for sha256, file in inputs.items():
        write_atomic(run.input(sha256), file.read_bytes())


def _require_consent(job: Job, i_know: bool) -> None:
    if not (job.is_private or i_know):
        raise JobError(
            "E-NON-PRIVATE",
            "this run would give NO privacy; only sites made with --simulated take it, and every artefact says so",
            hint="add --i-know if nobody's privacy is at stake",
        )


def _for_sites(job: Job, enrolled: Collection[str]) -> Job:
    """The job about real sites: names, and no path."""
    names = sorted(job.data.sites)
    if not names:
        raise JobError(
            "E-SUBMIT-SITES",
            'the job splits one file; a deployed job names its sites: [data.sites], then NAME = "site:" for each',
            param="data.sites",
            hint="cotune fed sites",
        )
    for name in names:
        if name not in enrolled:
            raise JobError(
                "E-SUBMIT-SITES",
                f"`{name}` is not an enrolled site of this federation.{did_you_mean(name, enrolled)}",
                param=f"data.sites.{name}",
                hint="cotune fed sites; cotune fed approve REQUEST",
            )
    if job.data.dataset is None:
        raise JobError(
            "E-CONFIG-VALUE",
            "`data.dataset` is needed: what the sites' own policies call their data set",
            param="data.dataset",
            hint="data.dataset=NAME; a site's administrator sees it with `cotune site policy`",
        )
    return job.replace(data={"sites": dict.fromkeys(names, SITE)})


def _settled(job: Job, base: BaseModel) -> Job:
    """Every `auto` filled but what each site's machine decides for itself, and the base model pinned."""
    from cotune.shared.planning import resolve

    pinned = job.replace(model={"sha256": job.model.sha256 or base.sha256})
    return resolve(pinned).replace(simulation={"workers": 1, "threads": job.simulation.threads})


def _without_paths(job: Job) -> tuple[Job, Mapping[str, Path]]:
    """The job with public rows named by their hashes, and the files they are in."""
    from cotune.shared.evaluation import settle_scoring

    files = {"eval.data": _file(job.eval.data), "aggregation.root": _file(job.aggregation.root)}
    if files["eval.data"]:
        job = settle_scoring(job, read_records(files["eval.data"]))
    hashes = {key: file_sha256(file) for key, file in files.items() if file}
    for key, sha256 in hashes.items():
        section, _, setting = key.partition(".")
        job = job.replace(**{section: {setting: CONTENT + sha256}})
    return job, {hashes[key]: file for key, file in files.items() if file}


def _file(name: str | None) -> Path | None:
    """A file of public rows that can be read.

    Raises:
        DataError: It cannot, or holds no record.
    """
    if name is None:
        return None
    path = dataset_path(name) if name.startswith("dataset:") else Path(name)
    read_records(path)
    return path
