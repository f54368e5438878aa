"""The run folder: what it records, and how a run is found again."""

import csv
import io
import json
import time
from pathlib import Path

import pytest

from cotune.shared.errors import CotuneError, JobError, RunFailed, StorageError
from cotune.shared.files import file_sha256, write_json
from cotune.shared.finding import find_run
from cotune.shared.planning import resolve
from cotune.shared.runs import METRIC_COLUMNS, RunFolder, create_run


@pytest.fixture
def run(make_job, tmp_path: Path) -> RunFolder:
    return create_run(tmp_path / "runs", resolve(make_job()), b"# as written\n")


def existing(home: Path, *names: str) -> None:
    for name in names:
        (home / name).mkdir(parents=True)
        write_json(home / name / "state.json", {"status": "succeeded"})


def test_a_new_run_holds_the_job_as_written_and_as_resolved(run: RunFolder, make_job) -> None:
    assert (run.path / "run.toml").read_bytes() == b"# as written\n"
    assert run.job() == resolve(make_job())
    assert run.job().sha256() == resolve(make_job()).sha256()
    assert run.state()["status"] == "queued"
    assert "numpy==" in (run.path / "env" / "lock.txt").read_text()
    assert json.loads((run.path / "env" / "hardware.json").read_text())["cores"] >= 1
    assert run.run_id.endswith("-tiny")


def test_a_run_cannot_be_made_where_nothing_can_be_written(make_job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        create_run(tmp_path / "file", resolve(make_job()), b"")


def test_two_runs_made_at_once_get_two_folders(make_job, tmp_path: Path) -> None:
    job = resolve(make_job())
    made = {create_run(tmp_path, job, b"").run_id for _ in range(5)}
    assert len(made) == 5


def test_a_state_is_published_with_its_error_and_as_an_event(run: RunFolder) -> None:
    run.set_state("failed", 3, RunFailed("E-X", "why", param="p", hint="h"))
    state = run.state()
    assert (state["status"], state["round"]) == ("failed", 3)
    assert state["error"] == {"code": "E-X", "message": "why", "param": "p", "hint": "h", "exit_code": 1}
    last = run.events()[-1]
    assert (last["level"], last["type"], last["data"]["status"]) == ("error", "status", "failed")
    assert "why" in last["message"]
    assert len({event["id"] for event in run.events()}) == len(run.events())


def test_a_state_that_is_damaged_is_an_error_not_a_traceback(run: RunFolder) -> None:
    (run.path / "state.json").write_text("{")
    with pytest.raises(CotuneError) as caught:
        run.state()
    assert caught.value.code == "E-RUN-FILE"


def test_metrics_have_only_the_documented_columns_and_become_a_table(run: RunFolder) -> None:
    run.record_metrics(round=1, site="site-1", epsilon=0.5)
    run.record_metrics(round=1, valid_loss=2.0)
    with pytest.raises(ValueError, match="records"):
        run.record_metrics(round=1, records=100)
    run.write_metrics_csv()
    table = list(csv.DictReader(io.StringIO((run.path / "metrics.csv").read_text())))
    assert list(table[0]) == list(METRIC_COLUMNS)
    assert [row["site"] for row in table] == ["site-1", ""]
    assert float(table[0]["epsilon"]) == 0.5


def test_the_manifest_lists_every_file_but_itself_and_logs(run: RunFolder) -> None:
    (run.path / "env" / "flower.log").write_text("engine's own words")
    (run.adapter).mkdir()
    (run.adapter / "README.md").write_text("card")
    run.write_manifest()
    manifest = json.loads((run.path / "MANIFEST.json").read_text())
    on_disk = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    assert set(manifest) == on_disk - {"MANIFEST.json", "env/flower.log"}
    assert all(file_sha256(run.path / name) == sha256 for name, sha256 in manifest.items())
    assert list(manifest) == sorted(manifest, key=lambda name: run.path / name)


def test_a_run_is_found_by_folder_id_prefix_name_and_latest(tmp_path: Path) -> None:
    existing(tmp_path, "20260101-000000-aaaa-alpha", "20260102-000000-bbbb-beta")
    first = tmp_path / "20260101-000000-aaaa-alpha"
    for reference in (str(first), first.name, "20260101", "aaaa", "alpha"):
        assert find_run(reference, tmp_path).path == first
    assert find_run("latest", tmp_path).run_id == "20260102-000000-bbbb-beta"


def test_a_relative_folder_is_found_from_the_current_one(tmp_path: Path, monkeypatch) -> None:
    existing(tmp_path / "runs", "20260101-000000-aaaa-alpha")
    monkeypatch.chdir(tmp_path)
    for reference in ("runs/20260101-000000-aaaa-alpha", "latest", "aaaa"):
        assert find_run(reference).path == tmp_path / "runs" / "20260101-000000-aaaa-alpha"


def test_a_prefix_of_two_runs_is_refused_with_both_names(tmp_path: Path) -> None:
    existing(tmp_path, "20260101-000000-aaaa-alpha", "20260101-000001-bbbb-beta")
    with pytest.raises(JobError) as caught:
        find_run("20260101", tmp_path)
    assert caught.value.code == "E-RUN-UNKNOWN"
    assert "aaaa-alpha" in caught.value.message
    assert "bbbb-beta" in caught.value.message


@pytest.mark.parametrize("reference", ["latest", "nothing", "../x", "a\0b", "x" * 5000], ids=range(5))
def test_a_run_that_is_not_there_is_said_to_be_unknown(tmp_path: Path, reference: str) -> None:
    with pytest.raises(JobError) as caught:
        find_run(reference, tmp_path)
    assert caught.value.code == "E-RUN-UNKNOWN"


def test_a_folder_that_is_no_run_is_not_found(tmp_path: Path) -> None:
    existing(tmp_path, "20260101-000000-aaaa-alpha")
    (tmp_path / "20260109-000000-cccc-made-by-hand").mkdir()
    assert find_run("latest", tmp_path).run_id == "20260101-000000-aaaa-alpha"


def test_the_latest_run_is_the_one_made_last_even_within_a_second(make_job, tmp_path: Path) -> None:
    job = resolve(make_job())
    for _ in range(6):
        last = create_run(tmp_path, job, b"")
        time.sleep(0.01)
    assert find_run("latest", tmp_path).run_id == last.run_id
