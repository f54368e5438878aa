"""A whole federation on this machine: the job's sites, their records, and one warm model for all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

from cotune.client.answering import failure_of, own_dataset, own_records, warm_trainer
from cotune.client.countersigning import countersign
from cotune.client.data import SiteExamples, prepare
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.policy import DatasetPolicy
from cotune.client.site import Site
from cotune.shared.cli import job_file
from cotune.shared.codec import Payload
from cotune.shared.datasets import dataset_path
from cotune.shared.errors import CotuneError, JobError, did_you_mean
from cotune.shared.evaluation import settle_scoring
from cotune.shared.files import append_line, storage_errors, write_atomic, write_json
from cotune.shared.job import Job
from cotune.shared.jobfile import load_job
from cotune.shared.model import locate
from cotune.shared.packages import cache_dir
from cotune.shared.plan import ClaimRequest, LedgerRequest, RoundPlan
from cotune.shared.planning import make_plan, resolve
from cotune.shared.records import Record, read_records
from cotune.shared.runs import RunFolder, create_run
from cotune.shared.sections import HOME, DataSettings
from cotune.shared.update import Answer
from cotune.shared.warm import warm_network
from cotune.simulations.attack.canaries import plant, planted_records
from cotune.simulations.partition import split
from cotune.simulations.population import check_sites


def recipe_names() -> list[str]:
    """Names of the jobs that ship with cotune."""
    folder = resources.files("cotune.simulations") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def recipe_path(name: str) -> Path:
    """The file of a built-in job.

    Raises:
        JobError: There is none of that name.
    """
    if name not in recipe_names():
        known = ", ".join(recipe_names())
        raise JobError(
            "E-RECIPE", f"no recipe `{name}`; there are: {known}.{did_you_mean(name, recipe_names())}",
            hint="cotune recipes",
        )  # fmt: skip
    return Path(str(resources.files("cotune.simulations") / "recipes" / f"{name}.toml"))


def prepare_run(
    source: str, overrides: Sequence[str], out: Path, say: Callable[[str], None], planted_as: RunFolder | None = None
) -> RunFolder:
    """Read, resolve and check a job with all its data, and make its run folder.

    With `planted_as`, its canaries and secrets are that run's.

    Raises:
        CotuneError: Anything that would make the run fail later and can be known now.
    """
    path = job_file(source)
    job = resolve(load_job(path, overrides))
    if job.data.deployed:
        what = "the job names enrolled sites, whose records are not here"
        raise JobError("E-SITES-AWAY", what, param="data.sites", hint=f"cotune submit {source}")
    say("records (a demo set is fetched the first time) ...")
    job = _with_data(job)
    check_sites(job, {site: site_records(job, site) for site in site_names(job)}, say)
    say("base model (fetched and converted the first time) ...")
    plan = make_plan(job, locate(job))
    run = create_run(out, job, path.read_bytes())
    plant(run, site_names(job), planted_as)
    write_json(run.path / "plan.json", plan.to_dict())
    return run


def _with_data(job: Job) -> Job:
    """Fetch what the job names as `dataset:`, and resolve the answers that are ranked."""

    def local(name: str) -> str:
        return str(dataset_path(name)) if name.startswith("dataset:") else name

    job = job.replace(
        data={
            "train": local(job.data.train) if job.data.train else None,
            "sites": {site: local(file) for site, file in job.data.sites.items()},
        },
        eval={"data": local(job.eval.data) if job.eval.data else None},
        aggregation={"root": local(job.aggregation.root) if job.aggregation.root else None},
    )
    return settle_scoring(job, read_records(Path(job.eval.data))) if job.eval.data else job


def site_names(job: Job) -> list[str]:
    """Names of the job's sites, in order."""
    return sorted(job.data.sites) if job.data.sites else sorted(_shares(_data_key(job)))


def site_records(job: Job, site: str) -> list[Record]:
    """One site's records.

    Raises:
        DataError: The file cannot be read or the site has no record.
    """
    if not job.data.sites:
        records, shares = _pool(_data_key(job))
        return [records[row] for row in shares[site]]
    folder = _own_home(job, site)
    if folder is None:
        return read_records(Path(job.data.sites[site]), job.data.format)
    home = SiteHome.open(folder)
    return own_records(home, own_dataset(home, job), job)


def _own_home(job: Job, site: str) -> Path | None:
    """The home a site brings along; None for a site that the simulation makes up."""
    source = job.data.sites.get(site, "")
    return Path(source.removeprefix(HOME)) if source.startswith(HOME) else None


def _data_key(job: Job) -> str:
    part = {"data": job.data.model_dump(mode="json"), "sites": job.federation.sites, "seed": job.run.seed}
    return json.dumps(part, sort_keys=True)


def _shares(key: str) -> Mapping[str, list[int]]:
    return _pool(key)[1]


@lru_cache(maxsize=2)
def _pool(key: str) -> tuple[list[Record], Mapping[str, list[int]]]:
    """All records of the simulation and each site's share of them; in a simulation one process owns them all."""
    part = json.loads(key)
    data = DataSettings.model_validate(part["data"])
    records = read_records(Path(data.train or ""), data.format)
    return records, split(records, data, part["sites"], part["seed"])


def work_folder(run_id: str) -> Path:
    """Where a simulation keeps what its sites may keep but nobody else may see; removed when the run ends."""
    return cache_dir() / "work" / run_id


def begin(run: RunFolder, kept: Path | None = None) -> None:
    """Let the processes of this machine find a run's folder, and its sites' homes in it, by the run's name.

    With `kept`, a folder, all its sites keep there what the lower layers make of records, for other runs on their base.
    """
    work = work_folder(run.run_id)
    with storage_errors(work):
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(work / "run", str(run.path).encode())
    if kept:
        with storage_errors(work):
            kept.mkdir(mode=0o700, parents=True, exist_ok=True)
            for site in site_names(run.job()):
                (work / site).unlink(missing_ok=True)
                (work / site).symlink_to(kept)


def site_home(run_id: str, site: str, job: Job, model_sha256: str) -> SiteHome:
    """A site's home: its own where the job names one, else one in the run folder that grants just this job."""
    own = _own_home(job, site)
    return SiteHome.open(own) if own else SiteHome.simulated(_begun(run_id).sites / site, site, job, model_sha256)


def _begun(run_id: str) -> RunFolder:
    return RunFolder(Path((work_folder(run_id) / "run").read_text(encoding="utf-8")))


class SimulatedRecords:
    """`SiteData` of a simulation: any site of a run's job, with what the run plants there."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def load(self, job: Job, site: str, dataset: DatasetPolicy) -> SiteExamples:
        """One site's records as examples with their units."""
        del dataset  # `site_records` asks the same policy
        records = [*site_records(job, site), *planted_records(self._run, job, site)]
        return prepare(records, warm_network(job)[1], job)


def answer_plan(plan: RoundPlan, adapter: Payload) -> Answer:
    """Train one round at one simulated site, in this process; a `courier.Answerer`.

    An error becomes the site's failure, without the text of any record.
    """
    work = work_folder(plan.run_id)

    def progress(step: int) -> None:
        append_line(work / "progress.jsonl", {"site": plan.site, "round": plan.round, "step": step})

    home = None
    try:
        trainer = warm_trainer(plan.job)
        home = site_home(plan.run_id, plan.site, plan.job, trainer.model_sha256)
        data = SimulatedRecords(_begun(plan.run_id))
        return Site(Guard(home), data, work / plan.site).train(plan, adapter, trainer, progress)
    except CotuneError as error:
        failure = failure_of(plan.site, error)
        if error.code == "E-SITE-DATA" and home is not None and home.is_simulated:  # whoever simulates owns the records
            return failure.model_copy(update={"message": f"{plan.site}: {home.jobs.own_lines()[-1]['text']}"})
        return failure
    except Exception as error:
        if os.environ.get("COTUNE_DEBUG") == "1":
            raise
        return failure_of(plan.site, error)


def read_ledger(request: LedgerRequest) -> bytes:
    """A simulated site's ledger; a `courier.LedgerReader`."""
    return (_home_folder(request.run_id, request.site) / "ledger.jsonl").read_bytes()


def sign_claim(request: ClaimRequest) -> str:
    """A simulated site's signature of a claim; a `courier.Signer`. Raises as `countersign` does."""
    return countersign(SiteHome.open(_home_folder(request.run_id, request.site)), request)


def _home_folder(run_id: str, site: str) -> Path:
    run = _begun(run_id)
    return _own_home(run.job(), site) or run.sites / site
