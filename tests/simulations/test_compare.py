"""`cotune compare`: every combination is a run, means are those of the runs, what has finished is not run again."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import rows, write_rows

from cotune.server.coordinator import Coordinator
from cotune.server.evaluation import GlobalEvaluator
from cotune.shared.aggregation import RULES
from cotune.shared.cli import run as command
from cotune.shared.errors import JobError, RunFailed
from cotune.shared.files import file_sha256
from cotune.shared.jobfile import dump_toml, load_job, parse_job
from cotune.shared.methods import layout_of
from cotune.shared.model import locate
from cotune.shared.network import Network
from cotune.shared.runs import RunFolder
from cotune.simulations.comparison.cells import Cell, Options, Request, cells_of, parse_request, settings_of
from cotune.simulations.comparison.charts import against_bytes, against_epsilon
from cotune.simulations.comparison.folder import make_comparison, open_comparison
from cotune.simulations.comparison.running import base_key, best_values
from cotune.simulations.comparison.table import rows_of, spread, write_table
from cotune.simulations.federation import InlineFleet
from cotune.simulations.scenario import begin, prepare_run

Told = tuple[int, str, str]


@pytest.fixture
def job_file(make_job: Any, tmp_path: Path) -> Path:
    return write_job(tmp_path, make_job())


def write_job(folder: Path, job: Any) -> Path:
    path = folder / "run.toml"
    path.write_text(dump_toml(job), encoding="utf-8")
    return path


def tell(*arguments: object) -> Told:
    """Run a command line of cotune in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def compare(job: Path, *more: object) -> Told:
    return tell("compare", job, "--out", job.parent / "comparisons", *more)


def request_of(job: Path, *overrides: str, **options: Any) -> Request:
    return parse_request(str(job), overrides, Options(**options))


# --- what is run


def test_every_combination_is_a_cell_and_each_seed_is_finished_before_the_next(job_file: Path) -> None:
    request = request_of(
        job_file, rules="ffa,product_svd", epsilons="1,inf", seeds="5,4", vary=("data.alpha=0.1,1", "lora.r=2,4")
    )
    cells = cells_of(request)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * 2 * 2 * 2
    assert [cell.seed for cell in cells] == [5] * 16 + [4] * 16
    for seed in (5, 4):
        found = {(c.rule, c.epsilon, *(value for _, value in c.varied)) for c in cells if c.seed == seed}
        assert len(found) == 16
        assert ("product_svd", math.inf, "0.1", "4") in found


def test_cells_that_tune_come_first_and_use_no_seed_that_counts(job_file: Path) -> None:
    request = request_of(job_file, rules="ffa,fed_sb", seeds="1,1001,2", tune="train.learning_rate=0.1,1")
    cells = cells_of(request)
    tuning = [cell for cell in cells if cell.tried is not None]
    assert cells[:4] == tuning
    assert [(cell.rule, cell.tried) for cell in tuning] == [
        ("ffa", "0.1"), ("ffa", "1"), ("fed_sb", "0.1"), ("fed_sb", "1")
    ]  # fmt: skip
    (seed,) = {cell.seed for cell in tuning}
    assert seed not in request.seeds


def test_without_options_the_only_cell_is_the_job_as_it_is(job_file: Path) -> None:
    request = request_of(job_file, "privacy.noise_multiplier=2.5")
    (cell,) = cells_of(request)
    job, own = load_job(job_file, settings_of(request, cell, None, 1)), load_job(job_file)
    assert (job.aggregation, job.run.seed, job.train) == (own.aggregation, own.run.seed, own.train)
    assert job.privacy == own.privacy.model_copy(update={"noise_multiplier": 2.5})


def test_noise_follows_from_each_epsilon_and_without_privacy_the_rate_is_scaled_by_the_norm(job_file: Path) -> None:
    overrides = ("privacy.noise_multiplier=2.5", "privacy.clipping_norm=0.25")
    request = request_of(job_file, *overrides, epsilons="3,inf", tune="train.learning_rate=30,100")
    jobs = [load_job(job_file, settings_of(request, cell, "100", 1)) for cell in cells_of(request)[-2:]]
    private, free = jobs
    assert (private.privacy.epsilon, private.privacy.noise_multiplier, private.train.learning_rate) == (3, "auto", 100)
    assert (free.privacy.level, free.train.learning_rate) == ("none", 25)


def test_a_setting_for_one_rule_is_that_of_its_cells_alone(job_file: Path) -> None:
    request = request_of(job_file, rules="ffa,fed_sb", own=("fed_sb:lora.r=4", "fed_sb:lora.alpha=9.0"))
    jobs = [load_job(job_file, settings_of(request, cell, None, 1)) for cell in cells_of(request)]
    assert [(job.aggregation.rule, job.lora.r, job.lora.alpha) for job in jobs] == [("ffa", 2, 4.0), ("fed_sb", 4, 9.0)]


def test_a_request_is_read_back_as_it_was_written(job_file: Path) -> None:
    request = request_of(
        job_file, "run.rounds=1", rules="ffa", epsilons="0.5,inf", seeds="7", tune="train.learning_rate=0.1,1",
        own=("ffa:lora.r=1",),
        vary=('lora.target_modules=["q_proj"],["q_proj", "v_proj"]', "transport.codec_up=fp32,int8"),
    )  # fmt: skip
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    modules = {load_job(job_file, settings_of(request, c, "1", 1)).lora.target_modules for c in cells_of(request)}
    assert modules == {("q_proj",), ("q_proj", "v_proj")}


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--rules", "ffa,product_svt"], "E-COMPARE-RULE", "Did you mean `product_svd`?"),
        (["--epsilons", "8,imf"], "E-COMPARE-EPSILON", "Did you mean `inf`?"),
        (["--epsilons", "8,0"], "E-COMPARE-EPSILON", "`0`"),
        (["--epsilons", "nan"], "E-COMPARE-EPSILON", "`nan`"),
        (["privacy.level=none", "--epsilons", "8", "--i-know"], "E-COMPARE-EPSILON", "no epsilon"),
        (["--seeds", "1,-2"], "E-COMPARE-SEED", "`-2`"),
        (["--seeds", ""], "E-COMPARE-SEED", "``"),
        (["--seeds", "1,2,1"], "E-COMPARE-TWICE", "`1` twice"),
        (["--rules", "ffa,ffa"], "E-COMPARE-TWICE", "`ffa` twice"),
        (["--epsilons", "8,8.0"], "E-COMPARE-TWICE", "`8.0` twice"),
        (["--vary", "lora.r=2,2"], "E-COMPARE-TWICE", "lora.r"),
        (["--vary", "lora.r=2", "--tune", "lora.r=4"], "E-COMPARE-TWICE", "lora.r"),
        (["--vary", "run.seed=1,2"], "E-COMPARE-SETTING", "--seeds"),
        (["--vary", "lora.r"], "E-COMPARE-SETTING", "section.key=V1,V2"),
        (["--for", "fed_sd:lora.r=2"], "E-COMPARE-RULE", "Did you mean `fed_sb`?"),
        (["--for", "fed_sb"], "E-COMPARE-SETTING", "RULE:section.key=VALUE"),
        (["--vary", "train.learnin_rate=1"], "E-CONFIG-KEY", "Did you mean `train.learning_rate`?"),
        (["--vary", "lora.r=2,none"], "E-CONFIG-VALUE", "lora.r"),
        (["--rules", "ffa,fedex", "aggregation.ema=0.5"], "E-CONFIG-VALUE", "rule fedex, epsilon 8"),
        (["--epsilons", "8,inf"], "E-NON-PRIVATE", "--i-know"),
        (["privacy.noise=test"], "E-NON-PRIVATE", "--i-know"),
        (["lora.r=999"], "E-LORA-RANK", "lora.r"),
    ],
)
def test_a_comparison_that_cannot_work_is_refused_by_name(
    job_file: Path, arguments: list[str], code: str, words: str
) -> None:
    exit_code, out, _ = compare(job_file, *arguments, "--json")
    error = json.loads(out)["error"]
    assert (exit_code, error["code"]) == (4, code)
    assert words in error["message"] + str(error["hint"])
    assert not list(job_file.parent.glob("comparisons/*"))


def test_a_comparison_needs_rows_to_score_models_on(make_job: Any, tmp_path: Path) -> None:
    code, _, err = compare(write_job(tmp_path, make_job(eval={"data": None})))
    assert (code, "E-COMPARE-EVAL" in err) == (4, True)


def test_another_comparison_is_refused_in_the_same_folder_by_the_name_of_what_differs(job_file: Path) -> None:
    folder = job_file.parent / "comparison"
    first = request_of(job_file, rules="ffa", seeds="1,2")
    made = make_comparison(folder, first)
    assert make_comparison(folder, first) == made == open_comparison(folder)
    with pytest.raises(JobError, match=r"other: rules, vary$") as refused:
        make_comparison(folder, request_of(job_file, rules="ffa,fed_sb", seeds="1,2", vary=("lora.r=2,4",)))
    assert refused.value.code == "E-COMPARE-OTHER"
    job = load_job(job_file)
    data = Path(str(job.data.train))
    data.write_text(data.read_text(encoding="utf-8").replace("fever", "cough"), encoding="utf-8")
    with pytest.raises(JobError, match=r"train\.jsonl") as refused:
        open_comparison(folder)
    assert refused.value.code == "E-COMPARE-OTHER"


def test_a_folder_that_is_no_comparison_is_left_alone(job_file: Path) -> None:
    folder = job_file.parent / "comparisons" / "mine"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    code, _, err = compare(job_file, "--name", "mine")
    assert (code, "E-EXISTS" in err) == (1, True)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    code, _, err = tell("compare", "--resume", folder)
    assert (code, "E-COMPARE-FOLDER" in err) == (4, True)


def test_two_processes_cannot_run_one_comparison(job_file: Path) -> None:
    comparison = make_comparison(job_file.parent / "comparisons" / "tiny", request_of(job_file))
    with comparison.held():
        code, _, err = compare(job_file)
    assert (code, "E-COMPARE-HELD" in err) == (4, True)


# --- what is made of results


def line(number: int, **more: Any) -> dict[str, Any]:
    """What one finished cell gave."""
    return {
        "cell": f"c{number:04d}", "counted": True, "rule": "ffa", "epsilon": 8.0, "seed": number, "varied": {},
        "tuned": {}, "learning_rate": 1.0, "error": None, "run_id": "run", "accuracy_base": 0.25, "loss_base": 3.0,
        "accuracy": 0.5, "loss": 2.0, "epsilon_spent": 7.9, "bytes_up": 10, "bytes_down": 20, "steps": 4,
        "train_seconds": 1.0, "seconds": 2.0,
    } | more  # fmt: skip


finite = st.floats(0, 100)


@given(
    st.lists(st.tuples(st.sampled_from(["ffa", "fed_sb"]), st.sampled_from([1.0, None]), finite, finite), max_size=12)
)
def test_each_row_is_the_mean_of_its_seeds_whatever_their_order(
    found: list[tuple[str, float | None, float, float]],
) -> None:
    lines = [
        line(number, rule=rule, epsilon=epsilon, loss=loss, bytes_up=up)
        for number, (rule, epsilon, loss, up) in enumerate(found)
    ]
    made = rows_of(reversed([*lines, line(99, counted=False, loss=1e9)]))
    assert sorted(str((row.rule, row.epsilon)) for row in made) == sorted({str(each[:2]) for each in found})
    for row in made:
        own = [each for each in found if each[:2] == (row.rule, row.epsilon)]
        losses = [loss for *_, loss, _ in own]
        assert row.seeds == len(own)
        assert row.loss.mean == pytest.approx(sum(losses) / len(losses))
        assert (row.loss.low, row.loss.high) == (min(losses), max(losses))
        assert row.megabytes_up == pytest.approx(sum(up for *_, up in own) / len(own) / 1e6)


def test_the_spread_is_the_samples_standard_deviation() -> None:
    assert spread([1.0, 2.0, 6.0]).std == pytest.approx(math.sqrt(7))
    assert spread([1.0]).std is None


def test_the_table_files_hold_every_row_and_say_what_is_not_private_and_not_accounted(job_file: Path) -> None:
    request = request_of(job_file, rules="ffa,fed_sb", epsilons="8,inf", tune="train.learning_rate=0.1,1")
    comparison = make_comparison(job_file.parent / "comparison", request)
    tuned = {"tuned": {"train.learning_rate": "1"}}
    lines = [line(1, **tuned), line(2, **tuned, accuracy=0.7), line(3, **tuned, epsilon=None, epsilon_spent=None)]
    lines.append(line(4, **tuned, counted=False, seed=1003))
    (comparison.path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    write_table(comparison)
    with (comparison.path / "table.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(row["rule"], row["epsilon"], row["train.learning_rate"], row["seeds"]) for row in read] == [
        ("ffa", "8.0", "1", "2"), ("ffa", "inf", "1", "1")
    ]  # fmt: skip
    assert float(read[0]["accuracy_mean"]) == pytest.approx(0.6)
    assert (read[0]["accuracy_low"], read[0]["accuracy_high"], read[1]["accuracy_std"]) == ("0.5", "0.7", "")
    text = (comparison.path / "table.md").read_text(encoding="utf-8")
    assert "0.600 (0.500 to 0.700)" in text
    assert "inf (NOT PRIVATE)" in text
    assert "NOT accounted" in text and "seed 1003" in text
    assert "accuracy 0.250, loss 3.000" in text


def cell(tried: str, rule: str = "ffa") -> Cell:
    return Cell(f"t-{rule}-{tried}", rule, 8.0, 1001, (), tried)


def test_the_tuned_value_is_the_one_of_least_loss_and_a_failed_one_is_none() -> None:
    cells = [cell("1"), cell("3"), cell("9"), cell("1", "fed_sb"), cell("3", "fed_sb")]
    losses: list[float | None] = [None, 1.0, 1.0, 0.5, 0.6]
    lines = {each.name: line(0, loss=loss) for each, loss in zip(cells, losses, strict=True)}
    assert best_values(cells, lines) == {cells[0].row: "3", cells[3].row: "1"}
    with pytest.raises(RunFailed, match="rule ffa, epsilon 8"):
        best_values(cells[:1], lines)


@pytest.mark.parametrize("draw", [against_epsilon, against_bytes])
def test_charts_are_svg_files_that_name_every_rule_and_are_drawn_alike_twice(draw: Callable[..., str]) -> None:
    lines = [
        line(number, rule=rule, epsilon=epsilon, bytes_up=10 ** (number % 7 + 1), accuracy=0.5 + number / 100)
        for number, (rule, epsilon) in enumerate((rule, epsilon) for rule in RULES for epsilon in (1.0, 8.0, None))
    ]
    lines.append(line(90, rule="ffa", varied={"data.train": '"$<a>$"'}))
    for some in (rows_of(lines), rows_of(lines[:1]), rows_of([{**each, "accuracy": None} for each in lines])):
        svg = draw(some)
        assert svg == draw(some)
        root = ElementTree.fromstring(svg)  # noqa: S314 - our own drawing
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        words = {"".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {row.name for row in some} <= words
        assert ("accuracy, %" in words) != ("loss, nats" in words)


# --- what cells share


@pytest.mark.parametrize("given", [True, False])
def test_what_cells_share_is_private_and_is_left_only_where_it_was_asked_for(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(job_file.parent / "cache"))
    kept = job_file.parent / "kept" if given else None
    comparison = make_comparison(job_file.parent / "comparison", request_of(job_file))
    with comparison.held(kept) as shared:
        assert shared.stat().st_mode & 0o777 == 0o700
        (shared / "features").write_bytes(b"of records")
    assert (shared / "features").exists() == given
    assert not list((job_file.parent / "cache").glob("work/*"))


def test_cells_on_the_same_records_compute_the_lower_layers_once(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoded: list[int] = []
    encode = Network.encode

    def counted(network: Network, examples: Any) -> Any:
        encoded.append(len(examples))
        return encode(network, examples)

    monkeypatch.setattr(Network, "encode", counted)
    whole = ["privacy.level=none", "train.batch_size=30", "run.rounds=1"]  # batches of every record
    for settings, expected in (([], 90 + 30), (["aggregation.rule=fed_sb"], 0), (["run.seed=4"], 0)):
        encoded.clear()
        run = prepare_run(str(job_file), [*whole, *settings], tmp_path / "runs", lambda _line: None)
        job, kept = run.job(), tmp_path / "kept"
        begin(run, kept)
        layout, config = layout_of(job, locate(job))
        Coordinator(run, layout, config, GlobalEvaluator(job, kept)).run(InlineFleet(run))
        assert sum(encoded) == expected


def test_another_base_or_cut_shares_nothing(make_job: Any) -> None:
    keys = [
        base_key(make_job(**sections), "a")
        for sections in ({}, {"model": {"dtype": "bfloat16"}}, {"lora": {"last_layers": 1}})
    ]
    assert len({*keys, base_key(make_job(), "b")}) == 4
    assert base_key(make_job(aggregation={"rule": "fed_sb"}, run={"seed": 9}, privacy={"epsilon": 1.0}), "a") == keys[0]


# --- the whole command, with real runs


ASKED = ["--rules", "ffa,product_svd", "--epsilons", "8", "--seeds", "1,2"]


@pytest.fixture(scope="module")
def finished(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Told]]:
    """A finished comparison, through the command line with --json."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTUNE_CACHE", str(folder / "cache"))
        told = compare(write_job(folder, small_job(folder, tiny_causal)), *ASKED, "--json")
        assert told[0] == 0, told
        yield folder / "comparisons" / "tiny", told


def small_job(folder: Path, model: Path) -> Any:
    """The job of `make_job`, for a fixture of a module."""
    write_rows(folder / "train.jsonl", rows(90))
    write_rows(folder / "eval.jsonl", rows(30, start=1000))
    return parse_job(
        {
            "schema": 1,
            "run": {"name": "tiny", "rounds": 2},
            "model": {"base": str(model), "max_length": 32},
            "lora": {"r": 2, "alpha": 4.0, "last_layers": 2},
            "data": {"train": str(folder / "train.jsonl"), "records_per_site": 30},
            "train": {"batch_size": 10, "local_steps": 2, "learning_rate": 0.5, "microbatch": 4},
            "federation": {"sites": 3},
            "eval": {"data": str(folder / "eval.jsonl")},
        },
        origin="test",
    )


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_envelope_and_the_table_are_the_means_of_the_runs_own_summaries(finished: tuple[Path, Told]) -> None:
    folder, (_, out, err) = finished
    assert err == ""
    envelope = json.loads(out)
    assert (envelope["schema_version"], envelope["status"], envelope["data"]["comparison"]) == (1, "ok", str(folder))
    runs = [RunFolder(path) for path in (folder / "runs").iterdir()]
    assert len(runs) == 4
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        table = {row["rule"]: row for row in csv.DictReader(file)}
    assert [row["rule"] for row in envelope["data"]["rows"]] == list(table) == ["ffa", "product_svd"]
    for row in envelope["data"]["rows"]:
        own = [run.summary() for run in runs if run.job().aggregation.rule == row["rule"]]
        assert len(own) == row["seeds"] == 2
        for what in ("accuracy", "loss"):
            values = [summary["final"][what] for summary in own]
            assert row[what]["mean"] == float(table[row["rule"]][f"{what}_mean"]) == pytest.approx(sum(values) / 2)
            assert (row[what]["low"], row[what]["high"]) == (min(values), max(values))
            assert row[what]["std"] == pytest.approx(statistics.stdev(values))
        assert row["megabytes_up"] == pytest.approx(sum(summary["bytes_up"] for summary in own) / 2e6)
        assert row["epsilon_spent"] == max(site["epsilon"] for summary in own for site in summary["sites"]) <= 8
    assert all(0 < line["train_seconds"] <= line["seconds"] for line in lines_of(folder))


@pytest.mark.slow
def test_a_comparison_leaves_whole_runs_and_charts_and_nothing_of_its_sites(finished: tuple[Path, Told]) -> None:
    folder = finished[0]
    for run in map(RunFolder, (folder / "runs").iterdir()):
        assert run.state()["status"] == "succeeded"
        manifest = json.loads((run.path / "MANIFEST.json").read_text(encoding="utf-8"))
        assert manifest == {name: file_sha256(path) for name, path in run.files().items()}
    assert not list((folder.parents[1] / "cache" / "work").iterdir())
    assert not list(folder.glob("runs/*/sites"))
    for chart in ("epsilon", "bytes"):
        ElementTree.parse(folder / f"utility-against-{chart}.svg")  # noqa: S314 - our own drawing


@pytest.mark.slow
def test_a_finished_comparison_is_not_run_again(finished: tuple[Path, Told]) -> None:
    folder, (_, out, _) = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "runs" in path.parts}
    results = (folder / "results.jsonl").read_bytes()
    assert compare(folder.parents[1] / "run.toml", *ASKED, "--json")[1] == out
    assert tell("compare", "--resume", folder, "--json")[1] == out
    assert (folder / "results.jsonl").read_bytes() == results
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, _, err = compare(folder.parents[1] / "run.toml", *ASKED, "run.rounds=3")
    assert (code, "E-COMPARE-OTHER" in err and "overrides" in err) == (4, True)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "jobs"), [(signal.SIGKILL, 1), (signal.SIGINT, 1), (signal.SIGKILL, 2)])
def test_an_interrupted_comparison_goes_on_with_the_missing_cells_only(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals, jobs: int
) -> None:
    cache = job_file.parent / "cache"
    monkeypatch.setenv("COTUNE_CACHE", str(cache))
    folder = job_file.parent / "comparisons" / "tiny"
    arguments = ["compare", str(job_file), *ASKED, "--out", str(folder.parent), "--jobs", str(jobs)]
    process = subprocess.Popen(
        [sys.executable, "-m", "cotune.shared.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 600
    while not (folder / "results.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wait_until_a_run_is_half_done(folder)
    os.kill(process.pid, how)
    _, err = process.communicate(timeout=120)
    assert how != signal.SIGINT or (process.returncode == 130 and "Traceback" not in err)
    kept = lines_of(folder)
    done = {path: path.stat().st_mtime_ns for path in folder.rglob("MANIFEST.json")}
    code, _, err = tell("compare", "--resume", folder, "--quiet")
    assert code == 0, err
    lines = lines_of(folder)
    assert lines[: len(kept)] == kept
    assert sorted(line["cell"] for line in lines) == sorted({line["cell"] for line in lines})
    assert len(lines) == len(list((folder / "runs").iterdir())) == 4
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert rows_of(lines)[0].seeds == 2
    assert not list((cache / "work").iterdir())


def wait_until_a_run_is_half_done(folder: Path) -> None:
    deadline = time.monotonic() + 600
    begun: list[Path] = []
    while all((path / "MANIFEST.json").exists() for path in begun):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        begun = [path.parents[1] for path in folder.glob("runs/*/checkpoints/round-00001")]


@pytest.mark.slow
def test_a_value_that_fails_is_not_chosen_and_a_cell_that_fails_leaves_the_others(job_file: Path) -> None:
    asked = [job_file, "--epsilons", "8", "run.rounds=1", "--out", job_file.parent]
    code, out, err = tell("compare", *asked, "--name", "tuned", "--tune", "train.learning_rate=1e30,0.5", "--json")
    assert code == 0, err
    (row,) = json.loads(out)["data"]["rows"]
    assert row["tuned"] == {"train.learning_rate": "0.5"}
    lines = lines_of(job_file.parent / "tuned")
    assert [(line["counted"], line["error"] is None) for line in lines] == [(False, False), (False, True), (True, True)]
    code, _, err = tell("compare", *asked, "--name", "varied", "--vary", "train.learning_rate=1e30,0.5", "--quiet")
    assert (code, "E-COMPARE-FAILED" in err, "1 of 2 cells failed: c0001" in err) == (1, True, True)
    (kept,) = lines_of(job_file.parent / "varied")
    assert kept["varied"] == {"train.learning_rate": "0.5"}
