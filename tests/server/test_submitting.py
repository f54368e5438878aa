"""What a deployed job tells its sites: names and hashes, and nothing of the coordinator's machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tomli_w
from tests.conftest import rows, write_rows

from cotune.server.submitting import prepare_deployed
from cotune.shared.errors import CotuneError, JobError
from cotune.shared.model import folder_sha256
from cotune.shared.records import read_records
from cotune.shared.runs import RunFolder

SITES = ("site-1", "site-2")
FAR = "/somewhere/nobody/has/{site}.jsonl"


@pytest.fixture
def submit(tiny_causal: Path, tmp_path: Path):
    """Submit a job file with some settings changed."""
    study = tmp_path / "study"
    study.mkdir()
    write_rows(study / "eval.jsonl", rows(12))

    def make(*overrides: str, i_know: bool = False, enrolled: tuple[str, ...] = SITES, **sections: dict) -> RunFolder:
        settings: dict[str, dict] = {
            "run": {"name": "tiny", "rounds": 2},
            "model": {"base": str(tiny_causal), "max_length": 32},
            "lora": {"r": 2, "last_layers": 2},
            "data": {
                "sites": {site: FAR.format(site=site) for site in SITES},
                "records_per_site": 30,
                "dataset": "notes",
            },
            "train": {"batch_size": 10, "local_steps": 2},
            "eval": {"data": "eval.jsonl"},
        }  # fmt: skip
        for section, changes in sections.items():
            settings[section] = {**settings.get(section, {}), **changes}
        (study / "run.toml").write_text(tomli_w.dumps(settings))
        told: list[str] = []
        return prepare_deployed(
            str(study / "run.toml"), overrides, enrolled, tmp_path / "fed" / "runs", told.append, i_know=i_know
        )

    return make


def test_a_job_that_sites_are_shown_holds_no_path_but_its_models(submit, tiny_causal: Path, tmp_path: Path) -> None:
    run = submit()
    shown = run.job().to_json()
    assert str(tmp_path) not in shown
    assert "/somewhere" not in shown
    assert "eval.jsonl" not in shown
    assert dict(run.job().data.sites) == dict.fromkeys(SITES, "site:")
    assert run.job().model.base == str(tiny_causal)
    assert run.job().model.sha256 == folder_sha256(tiny_causal)


def test_every_auto_is_filled_but_what_a_sites_machine_decides(submit) -> None:
    job = submit().job()
    assert isinstance(job.privacy.noise_multiplier, float)
    assert isinstance(job.privacy.delta, float)
    assert job.eval.choices != "auto"
    assert job.simulation.threads == "auto"
    assert submit(simulation={"threads": 3}).job().simulation.threads == 3


def test_public_rows_are_named_by_their_hash_and_kept_in_the_run_folder(submit, tmp_path: Path) -> None:
    run = submit()
    content = (tmp_path / "study" / "eval.jsonl").read_bytes()
    assert run.job().eval.data == f"sha256:{hashlib.sha256(content).hexdigest()}"
    (tmp_path / "study" / "eval.jsonl").unlink()
    local = run.local_job()
    assert local.eval.data is not None
    assert Path(local.eval.data).read_bytes() == content
    assert len(read_records(Path(local.eval.data))) == 12
    assert run.job().sha256() == RunFolder(run.path).job().sha256(), "the hash is that of the job sites are shown"


def test_where_a_file_lies_does_not_change_the_job(submit, tmp_path: Path) -> None:
    one = submit().job()
    (tmp_path / "study" / "eval.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert submit(eval={"data": str(tmp_path / "elsewhere.jsonl")}).job().sha256() == one.sha256()


def test_the_run_is_queued_with_its_plan_and_its_engine(submit) -> None:
    run = submit()
    assert (run.engine(), run.state()["status"]) == ("deployed", "queued")
    plan = json.loads((run.path / "plan.json").read_bytes())
    assert len(plan["epsilon_by_round"]) == 2


@pytest.mark.parametrize(("sections", "enrolled", "code", "param"), [
    ({}, ("site-1",), "E-SUBMIT-SITES", "data.sites.site-2"),
    ({"data": {"sites": {}, "train": "eval.jsonl"}}, SITES, "E-SUBMIT-SITES", "data.sites"),
    ({"data": {"sites": {"site-3": "x"}}}, SITES, "E-SUBMIT-SITES", "data.sites.site-3"),
    ({"eval": {"data": "missing.jsonl"}}, SITES, "E-DATA-FILE", None),
    ({"model": {"base": "nowhere/at/all"}}, SITES, "E-MODEL-MISSING", "model.base"),
    ({"model": {"sha256": "0" * 64}}, SITES, "E-MODEL-SHA256", "model.sha256"),
    ({"privacy": {"noise": "test"}}, SITES, "E-NON-PRIVATE", None),
])  # fmt: skip
def test_what_would_fail_later_is_refused_now_and_leaves_no_run(
    submit, tmp_path: Path, sections: dict, enrolled: tuple[str, ...], code: str, param: str | None
) -> None:
    with pytest.raises(CotuneError) as caught:
        submit(enrolled=enrolled, **sections)
    assert (caught.value.code, caught.value.exit_code) == (code, 4)
    assert param is None or caught.value.param == param
    assert not list((tmp_path / "fed" / "runs").glob("*")) if (tmp_path / "fed").exists() else True


def test_a_job_without_the_data_sets_name_is_refused(submit) -> None:
    with pytest.raises(JobError) as caught:
        submit("data.dataset=", enrolled=SITES)
    assert caught.value.param == "data.dataset"


def test_seeded_noise_needs_a_word(submit) -> None:
    assert submit(i_know=True, privacy={"noise": "test"}).job().privacy.noise == "test"


def test_a_job_of_enrolled_sites_is_not_simulated(submit, tmp_path: Path) -> None:
    from cotune.simulations.scenario import prepare_run

    run = submit()
    with pytest.raises(JobError) as caught:
        prepare_run(str(run.path / "resolved.toml"), (), tmp_path / "simulated", print)
    assert caught.value.code == "E-SITES-AWAY"
    assert "cotune submit" in str(caught.value.hint)
