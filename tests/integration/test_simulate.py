"""`cotune simulate` and what can be done with its run, as a user does it; the sites train in this process."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from cotune.server.checkpoint import load_checkpoint
from cotune.server.coordinator import Coordinator
from cotune.server.evaluation import GlobalEvaluator
from cotune.server.fleet import Request
from cotune.shared.cli import run as command
from cotune.shared.files import file_sha256
from cotune.shared.methods import layout_of, quiet_peft
from cotune.shared.model import locate
from cotune.shared.runs import RunFolder
from cotune.shared.update import Answer
from cotune.simulations.federation import InlineFleet
from cotune.simulations.scenario import begin, prepare_run, work_folder

WORDS = ("fever", "heart", "eye", "bone", "tooth", "pain", "chronic", "acute", "left", "right", "upper")
SIGNS = {"cardio": "heart blood", "derma": "skin rash", "pulmo": "lung cough"}
CANARY = "zebra-canary-4711"
Told = tuple[int, str, str]


def rows(count: int, shape: str = "completion") -> list[dict]:
    made = []
    for i in range(count):
        label = sorted(SIGNS)[i % 3]
        text = f"{WORDS[i % 7]} {SIGNS[label]} {WORDS[(i * 5) % 11]} {CANARY}"
        made.append(
            {
                "completion": {"prompt": f"Diagnosis: {text}. Specialty:", "completion": f" {label}"},
                "label": {"text": text, "label": label},
                "messages": {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]},
            }[shape]
            | {"ward": ("North", "South Wing")[i % 2]}
        )
    return made


def write(path: Path, made: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def study(folder: Path, model: Path, shape: str = "completion") -> Path:
    """A folder with a job file and its data: three sites of 30 records, two rounds of two steps."""
    write(folder / "train.jsonl", rows(90, shape))
    write(folder / "eval.jsonl", rows(30, shape))
    (folder / "run.toml").write_text(
        f'[run]\nname = "tiny"\nseed = 3\nrounds = 2\n[model]\nbase = "{model}"\nmax_length = 32\n'
        "[lora]\nr = 2\nalpha = 4.0\nlast_layers = 2\n"
        '[data]\ntrain = "train.jsonl"\nrecords_per_site = 30\n'
        "[train]\nbatch_size = 10\nlocal_steps = 2\nlearning_rate = 0.5\nmicrobatch = 4\n"
        "[privacy]\nnoise_multiplier = 1.0\n[federation]\nsites = 3\n"
        '[eval]\ndata = "eval.jsonl"\n[simulation]\nworkers = 1\nthreads = 1\n'
    )
    return folder / "run.toml"


@pytest.fixture(autouse=True)
def _no_work_of_others(_own_cache: None) -> None:
    """Tests that drive runs by hand leave their work folders; here it is asked whether a run removes its own."""
    shutil.rmtree(Path(os.environ["COTUNE_CACHE"]) / "work", ignore_errors=True)


@pytest.fixture
def job_file(tiny_causal: Path, tmp_path: Path) -> Path:
    return study(tmp_path, tiny_causal)


def tell(*arguments: object) -> Told:
    """Run a command line of cotune in this process; nothing it says may quote a record."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command([str(argument) for argument in arguments])
    assert CANARY not in out.getvalue() + err.getvalue()
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), err.getvalue()


def simulate(job: Path, *more: object, out: Path | None = None) -> Told:
    return tell("simulate", job, "--engine", "inline", "--out", out or job.parent / "runs", *more)


def only_run(home: Path) -> RunFolder:
    (state,) = home.glob("*/state.json")
    return RunFolder(state.parent)


def train(job: Path, *overrides: str) -> dict[str, bytes]:
    """All rounds of a job without its publication; the bytes of the result by tensor."""
    run = prepare_run(str(job), overrides, job.parent / "trained", lambda _line: None)
    begin(run)
    trained = rounds_of(run, InlineFleet(run))
    shutil.rmtree(work_folder(run.run_id))
    return trained


def rounds_of(run: RunFolder, fleet: InlineFleet) -> dict[str, bytes]:
    """The rounds that are left of a run; the bytes of the result by tensor."""
    layout, config = layout_of(run.job(), locate(run.job()))
    outcome = Coordinator(run, layout, config, GlobalEvaluator(run.job())).run(fleet)
    return {name: array.tobytes() for name, array in outcome.arrays.items()}


# --- one finished run, looked at from all sides


@pytest.fixture(scope="module")
def finished(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunFolder, Told]]:
    """A run with secure noise, through the command line with --json."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTUNE_CACHE", str(folder / "cache"))
        told = simulate(study(folder, tiny_causal), "--json")
        assert told[0] == 0, told[2]
        yield only_run(folder / "runs"), told


@pytest.fixture
def copied(finished: tuple[RunFolder, Told], tmp_path: Path) -> RunFolder:
    """A copy of the finished run, to be changed; under its own name, which its files hold."""
    original = finished[0]
    return RunFolder(Path(shutil.copytree(original.path, tmp_path / "copies" / original.run_id)))


def test_a_run_leaves_the_documented_folder_and_nothing_else(finished: tuple[RunFolder, Told]) -> None:
    run = finished[0]
    documented = {
        "run.toml", "resolved.toml", "plan.json", "state.json", "summary.json", "MANIFEST.json", "events.jsonl",
        "metrics.jsonl", "metrics.csv", "checkpoints.jsonl", "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors", "adapter/README.md", "privacy/claim.json", "privacy/accountant.json",
        "privacy/statement.txt", "report/index.html", "env/hardware.json", "env/lock.txt", "env/engine.json",
    }  # fmt: skip
    checkpoint = {"adapter_config.json", "adapter_model.safetensors", "README.md", "progress.json", "state.safetensors"}
    documented |= {"privacy/heads.json", "privacy/claim.schema.json", "privacy/allowed_signers"}
    documented |= {f"privacy/ledgers/site-{n}.jsonl" for n in (1, 2, 3)}
    documented |= {f"privacy/signatures/{name}.sig" for name in ("coordinator", "site-1", "site-2", "site-3")}
    documented |= {f"checkpoints/round-{n:05d}/{name}" for n in (1, 2) for name in checkpoint}
    assert {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()} == documented
    assert run.state()["status"] == "succeeded"
    assert not list((run.path.parents[1] / "cache").glob("work/*"))


def test_a_run_tells_events_as_lines_and_then_one_envelope(finished: tuple[RunFolder, Told]) -> None:
    run, (_, out, err) = finished
    assert err == ""
    *events, last = [json.loads(line) for line in out.splitlines()]
    assert all({"id", "created_at", "level", "type", "message", "data"} == set(event) for event in events)
    assert [event["id"] for event in events] == [event["id"] for event in run.events()]
    assert (last["schema_version"], last["status"], last["terminal"]) == (1, "ok", True)
    assert last["data"] == run.summary()


def test_nothing_a_run_leaves_quotes_a_training_record(finished: tuple[RunFolder, Told]) -> None:
    for path in finished[0].path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path.name


def test_a_finished_run_verifies_also_after_its_report_was_written_again(copied: RunFolder) -> None:
    assert tell("report", copied.path)[0] == 0
    code, out, err = tell("verify", copied.path)
    assert (code, err) == (0, "")
    assert out.count("ok  ") == 18
    code, out, _ = tell("verify", copied.path, "--json")
    assert all(check["passed"] for check in json.loads(out)["data"]["checks"])


def test_the_claim_says_what_the_plan_said(finished: tuple[RunFolder, Told]) -> None:
    run = finished[0]
    plan = json.loads(tell("plan", run.path / "resolved.toml", "--json")[1])["data"]
    claim = run.claim()
    assert claim["guarantee"]["epsilon"] == pytest.approx(plan["epsilon_by_round"][-1], abs=1e-9)
    assert claim["guarantee"]["epsilon"] <= claim["guarantee"]["target_epsilon"] == 8.0
    assert {site["steps"] for site in claim["sites"]} == {plan["steps"]}
    assert run.summary()["adapter"]["parameters"] == plan["trained_parameters"]
    assert not run.summary()["non_private"]
    epsilons = [row["epsilon"] for row in run.metrics() if row.get("site") == "site-1"]
    assert epsilons == pytest.approx(plan["epsilon_by_round"])


def test_bytes_on_the_wire_add_up_and_are_near_the_plan(finished: tuple[RunFolder, Told]) -> None:
    run = finished[0]
    summary, metrics = run.summary(), run.metrics()
    plan = json.loads(tell("plan", run.path / "resolved.toml", "--json")[1])["data"]
    for way in ("bytes_up", "bytes_down"):
        by_site = [row[way] for row in metrics if row.get("site")]
        assert sum(by_site) == summary[way] == sum(site[way] for site in summary["sites"])
        last = [row[way] for row in metrics if row.get("site") and row["round"] == 2]  # the first carries no heads
        assert last == pytest.approx([plan[way]] * len(last), rel=0.25)


def test_the_report_is_one_page_that_loads_nothing(finished: tuple[RunFolder, Told]) -> None:
    page = (finished[0].path / "report" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"<svg", page)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|url\(\s*["']?http|@import|<script""", page)


def test_a_run_is_scored_on_its_own_rows_and_on_others(finished: tuple[RunFolder, Told], tmp_path: Path) -> None:
    run = finished[0]
    own = json.loads(tell("eval", run.path, "--json")[1])["data"]
    assert own == run.summary()["final"]
    base = json.loads(tell("eval", run.path, "--base", "--json")[1])["data"]
    assert base == run.summary()["base"]
    other = write(tmp_path / "other.jsonl", rows(12))
    code, out, _ = tell("eval", run.path, "--data", other, "--limit", "9", "--json")
    assert code == 0
    assert json.loads(out)["data"]["examples"] == 9
    code, out, _ = tell("eval", run.path, "--data", other)
    assert code == 0
    assert re.search(r"rows\s+12\n", out)
    assert tell("eval", run.path, "--data", tmp_path / "none.jsonl")[0] == 4


def test_a_lone_adapter_is_scored_on_the_model_a_job_file_names(
    finished: tuple[RunFolder, Told], tmp_path: Path
) -> None:
    run = finished[0]
    lone = shutil.copytree(run.adapter, tmp_path / "lone")
    code, _, err = tell("eval", lone)
    assert (code, "--job" in err) == (4, True)
    code, out, _ = tell("eval", lone, "--job", run.path.parents[1] / "run.toml", "--json")
    assert code == 0
    assert json.loads(out)["data"]["loss"] == pytest.approx(run.summary()["final"]["loss"], abs=1e-6)


def test_an_exported_adapter_is_the_runs_and_loads_with_peft_alone(
    finished: tuple[RunFolder, Told], tiny_causal: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = finished[0]
    out = tmp_path / "out"
    assert tell("export", run.path, "--out", out)[0] == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in run.adapter.iterdir()}
    with quiet_peft():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_causal), str(out))
    assert any(parameter.any() for name, parameter in loaded.named_parameters() if "lora_B" in name)
    code, _, err = tell("export", run.path, "--out", out)
    assert (code, "E-EXISTS" in err) == (1, True)


def test_a_merged_model_gives_the_adapters_logits(
    finished: tuple[RunFolder, Told], tiny_causal: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cotune.shared.model import load_model
    from cotune.shared.scoring import load_adapter

    run = finished[0]
    out = tmp_path / "merged"
    assert tell("export", run.path, "--out", out, "--merge")[0] == 0
    assert (out / "README.md").read_bytes() == (run.adapter / "README.md").read_bytes()
    job = run.job()
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)("heart pain left eye").input_ids])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits.numpy()
        base = AutoModelForCausalLM.from_pretrained(tiny_causal)(ids).logits.numpy()
        adapted = load_adapter(load_model(locate(job), job), run.adapter)(ids).logits.numpy()
    assert np.abs(merged - adapted).max() < 1e-4
    assert np.abs(merged - base).max() > 1e-2


# --- a folder that is not whole; test_tampering.py has those that were tampered with


def test_a_changed_file_is_named_by_the_manifest(copied: RunFolder) -> None:
    (copied.privacy / "accountant.json").write_text("{}")
    (copied.path / "extra.txt").write_text("x")
    code, out, err = tell("verify", copied.path)
    assert code == 1
    assert "FAIL  files: changed or missing: privacy/accountant.json" in out
    assert "E-VERIFY" in err


def test_a_run_without_its_claim_does_not_verify(copied: RunFolder) -> None:
    (copied.privacy / "claim.json").unlink()
    code, out, _ = tell("verify", copied.path)
    assert code == 1
    assert "FAIL  claim: privacy/claim.json: there is none yet" in out


# --- jobs that are refused before or when they start


def test_a_job_that_protects_nobody_needs_to_be_asked_for(job_file: Path) -> None:
    for override in ("privacy.level=none", "privacy.noise=test"):
        code, _, err = simulate(job_file, override, out=job_file.parent / override)
        assert code == 4
        assert "E-NON-PRIVATE" in err
        assert "--i-know" in err
        for run in (job_file.parent / override).glob("*"):
            assert RunFolder(run).state()["status"] == "cancelled"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "E-DATA-EMPTY"),
        ("\n\n", "E-DATA-EMPTY"),
        (f'{{"prompt": "{CANARY}"}}\n', "E-DATA-ROW"),
        ("{\n", "E-DATA-ROW"),
    ],
)
def test_a_site_without_a_valid_record_stops_everything_before_it_starts(
    job_file: Path, content: str, code: str
) -> None:
    folder = job_file.parent
    (folder / "bad.jsonl").write_text(content)
    text = job_file.read_text().replace('train = "train.jsonl"\n', "")
    job_file.write_text(text + '[data.sites]\ngood = "train.jsonl"\nbad = "bad.jsonl"\n')
    exit_code, _, err = simulate(job_file)
    assert exit_code == 4
    assert code in err
    assert "bad.jsonl" in err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("privacy.delta=0.0334", "E-DELTA"),
        ("privacy.delta=0.0", "E-DELTA"),
        ("privacy.noise_multiplier=0.4", "E-BUDGET-IMPOSSIBLE"),
        ("federation.sites=91", "E-DATA-SITE-EMPTY"),
        ("eval.data=none.jsonl", "E-DATA-FILE"),
        ("data.train=none.jsonl", "E-DATA-FILE"),
        ("run.rounds=0", "E-CONFIG-VALUE"),
    ],
)
def test_a_job_that_cannot_work_leaves_no_run(job_file: Path, override: str, code: str) -> None:
    exit_code, _, err = simulate(job_file, override)
    assert exit_code == 4
    assert code in err
    assert not (job_file.parent / "runs").exists()


def test_an_epsilon_nothing_can_be_trained_under_leaves_no_run(job_file: Path) -> None:
    exit_code, _, err = simulate(
        job_file, "privacy.epsilon=0.0001", "privacy.delta=1e-9", "privacy.noise_multiplier=auto"
    )
    assert exit_code == 4
    assert "E-BUDGET-IMPOSSIBLE" in err
    assert "mend it" in err
    assert not (job_file.parent / "runs").exists()


@pytest.mark.parametrize("scored", [True, False], ids=["with evaluation", "without"])
def test_conversations_need_a_model_with_a_chat_template(tiny_causal: Path, tmp_path: Path, scored: bool) -> None:
    job = study(tmp_path, tiny_causal, "messages")
    if not scored:
        job.write_text(job.read_text().replace('data = "eval.jsonl"', ""))
    code, _, err = simulate(job)
    assert code == 4
    assert "E-MODEL-TEMPLATE" in err


def test_a_label_that_is_not_listed_is_the_failure_of_its_site_alone(tiny_encoder: Path, tmp_path: Path) -> None:
    job = classify_job(tmp_path, tiny_encoder, "min_sites = 3")
    write(tmp_path / "bad.jsonl", [*rows(29, "label"), {"text": "fever", "label": "unheard-of"}])
    code, _, err = simulate(job)
    assert code == 1
    assert "E-MIN-SITES" in err
    assert "bad: " in err
    assert "task.labels" in err
    assert "unheard-of" not in err
    run = only_run(tmp_path / "runs")
    assert run.state()["status"] == "paused"
    assert not list(Path(os.environ["COTUNE_CACHE"]).glob("work/*"))


def classify_job(folder: Path, model: Path, federation: str = "") -> Path:
    job = study(folder, model, "label")
    for name in ("one", "two", "bad"):
        write(folder / f"{name}.jsonl", rows(30, "label"))
    text = job.read_text().replace('train = "train.jsonl"\n', "").replace("sites = 3", federation)
    text = text.replace("[lora]\n", '[lora]\ntarget_modules = ["query", "value"]\n')
    task = f'[task]\nkind = "classify"\nlabels = {sorted(SIGNS)}\n'
    job.write_text(text + task + '[data.sites]\none = "one.jsonl"\ntwo = "two.jsonl"\nbad = "bad.jsonl"\n')
    return job


# --- the same again


def test_test_noise_is_the_same_every_time_and_secure_noise_never(job_file: Path) -> None:
    first = train(job_file, "privacy.noise=test")
    assert train(job_file, "privacy.noise=test") == first
    assert train(job_file, "privacy.noise=test", "run.seed=4") != first
    secure = train(job_file)
    assert secure != first
    assert train(job_file) != secure


def test_a_job_without_privacy_whose_batches_hold_every_record_is_the_same_every_time(job_file: Path) -> None:
    first = train(job_file, "privacy.level=none", "train.batch_size=30")
    assert train(job_file, "privacy.level=none", "train.batch_size=30") == first


class Interrupted(InlineFleet):
    """The sites of a run whose coordinator is interrupted when the given number of answers have come."""

    def __init__(self, run: RunFolder, answers: int) -> None:
        super().__init__(run)
        self._left = answers

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        for answer in super().ask(requests):
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            yield answer


@pytest.mark.parametrize(
    "settings",
    [
        (),
        (
            "transport.codec_up=int8",
            "transport.error_feedback=true",
            "transport.codec_down=bf16",
            "train.scaffold=true",
        ),
        ("aggregation.rule=flora_stack",),
        ("aggregation.rule=fedsa", "transport.codec_up=int8"),
        ("aggregation.optimizer=fedadam", "aggregation.learning_rate=0.01", "privacy.clipping=adaptive"),
    ],
    ids=["plain", "codecs", "offset", "own B", "memory"],
)
def test_a_run_interrupted_in_the_middle_of_a_round_ends_as_the_one_that_was_not(
    job_file: Path, settings: tuple[str, ...]
) -> None:
    settings = ("privacy.noise=test", *settings)
    whole = train(job_file, *settings)
    run = prepare_run(str(job_file), settings, job_file.parent / "interrupted", lambda _line: None)
    begin(run)
    for answers in (1, 3):  # in the first round after one site, then in the second before any
        with pytest.raises(KeyboardInterrupt):
            rounds_of(run, Interrupted(run, answers))
    assert rounds_of(run, InlineFleet(run)) == whole
    accounts = json.loads((run.privacy / "accountant.json").read_text())["sites"]
    assert {site: [entry["round"] for entry in entries] for site, entries in accounts.items()} == {
        f"site-{number}": [1, 2] for number in (1, 2, 3)
    }, "nothing was charged twice"
    shutil.rmtree(work_folder(run.run_id))


# --- disks that fill up


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of so many KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("small_disk", [16, 48, 72], indirect=True, ids=lambda kib: f"{kib} KiB")
def test_a_disk_that_fills_up_ends_the_run_by_name_and_leaves_no_half_file(job_file: Path, small_disk: Path) -> None:
    code, _, err = simulate(job_file, "run.rounds=6", "privacy.noise_multiplier=3.0", out=small_disk)
    assert code == 1
    assert "E-STORAGE" in err
    assert "No space left" in err
    assert not [path for path in small_disk.rglob("*") if ".tmp" in path.name]
    for path in small_disk.rglob("*.json"):
        json.loads(path.read_text())
    for state in small_disk.glob("*/state.json"):
        run = RunFolder(state.parent)
        kept = load_checkpoint(run)
        assert run.state()["status"] == "failed" or kept is not None or not list(run.checkpoints.iterdir())
        assert run.events()
    assert not list(Path(os.environ["COTUNE_CACHE"]).glob("work/*"))


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", [32], indirect=True)
def test_a_cache_that_fills_up_ends_the_run_by_name(job_file: Path, small_disk: Path) -> None:
    process = start(job_file, job_file.parent / "runs", COTUNE_CACHE=str(small_disk))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    run = only_run(job_file.parent / "runs")
    assert run.state()["status"] in ("failed", "paused")
    assert "could not be written" in err


# --- interruptions


def start(job: Path, out: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """A simulation in a process of its own."""
    arguments = ["simulate", str(job), "--engine", "inline", "--out", str(out), *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "cotune.shared.cli", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


LONG = ("run.rounds=12", "privacy.noise_multiplier=3.0", "eval.every=12")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_an_interrupted_run_keeps_what_was_finished_and_goes_on(job_file: Path, how: signal.Signals) -> None:
    home = job_file.parent / "runs"
    process = start(job_file, home, *LONG)
    wait_for(lambda: bool(list(home.glob("*/checkpoints/round-00002"))), process)
    os.kill(process.pid, how)
    _, err = process.communicate(timeout=60)
    run = only_run(home)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in err
        assert run.state()["status"] == "cancelled"
        assert not work_folder(run.run_id).exists()
    kept = load_checkpoint(run)
    assert kept is not None
    assert kept.round >= 2
    assert not list(run.path.rglob("*.tmp")) or how != signal.SIGINT
    accounts = json.loads((run.privacy / "accountant.json").read_text())["sites"]
    released = [(row["site"], row["round"]) for row in run.metrics() if row.get("site")]
    assert released
    for site, number in released:
        assert number in [entry["round"] for entry in accounts[site]]
    code, _, err = tell("resume", run.path, "--quiet")
    assert code == 0, err
    claim = run.claim()
    assert claim["guarantee"]["epsilon"] <= claim["guarantee"]["target_epsilon"]
    # One site trains at a time: at most one round was lost in the middle, and trained and charged again.
    extra = [site["steps"] - run.job().steps for site in claim["sites"]]
    assert sorted(extra) in ([0, 0, 0], [0, 0, run.job().train.local_steps])
    assert not work_folder(run.run_id).exists()
    assert tell("verify", run.path)[0] == 0


@pytest.mark.slow
def test_a_run_that_goes_on_cannot_be_gone_on_with_by_a_second_process(job_file: Path) -> None:
    home = job_file.parent / "runs"
    process = start(job_file, home, *LONG)
    try:
        wait_for(lambda: bool(list(home.glob("*/checkpoints/round-00001"))), process)
        run = only_run(home)
        os.kill(process.pid, signal.SIGSTOP)
        code, _, err = tell("resume", run.path, "--quiet")
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(timeout=120) == 0
        assert (code, err.startswith("E-")) == (4, True)
        assert tell("verify", run.path)[0] == 0
    finally:
        process.kill()
        process.communicate()


def test_a_finished_run_is_not_run_again_and_stays_as_it_is(copied: RunFolder) -> None:
    before = file_sha256(copied.path / "MANIFEST.json")
    code, _, err = tell("resume", copied.path, "--quiet")
    assert (code, "E-RUN-OVER" in err) == (4, True)
    assert file_sha256(copied.path / "MANIFEST.json") == before
    assert copied.state()["status"] == "succeeded"


# --- other kinds of jobs, to the end


def finished_well(home: Path) -> RunFolder:
    run = only_run(home)
    assert run.state()["status"] == "succeeded"
    code, out, err = tell("verify", run.path)
    assert code == 0, out + err
    return run


@pytest.mark.slow
def test_a_run_without_privacy_says_so_in_everything_it_leaves(job_file: Path) -> None:
    code, out, _ = simulate(job_file, "privacy.noise=test", "--i-know")
    assert code == 0
    run = finished_well(job_file.parent / "runs")
    assert "NON-PRIVATE" in out
    for path in (run.adapter / "README.md", run.path / "report" / "index.html"):
        assert re.search("NO[NT][- ]PRIVATE", path.read_text(encoding="utf-8")), path.name
    assert "NO privacy" in (run.privacy / "statement.txt").read_text()
    assert run.claim()["guarantee"] is None
    assert run.summary()["non_private"] is True


@pytest.mark.slow
def test_a_file_a_site_makes_a_federation_of_these_sites(job_file: Path) -> None:
    folder = job_file.parent
    made = rows(80)
    write(folder / "a.jsonl", made[:30])
    write(folder / "b.jsonl", made[30:])
    text = job_file.read_text().replace('train = "train.jsonl"\n', "")
    job_file.write_text(text + '[data.sites]\nalpha = "a.jsonl"\nbeta = "b.jsonl"\n')
    assert simulate(job_file)[0] == 0
    run = finished_well(folder / "runs")
    assert [site["site"] for site in run.summary()["sites"]] == ["alpha", "beta"]
    assert not re.search("site-[0-9]", (run.path / "report" / "index.html").read_text())


@pytest.mark.slow
def test_records_are_split_by_the_column_that_names_their_site(job_file: Path) -> None:
    overrides = ["data.split=column", "data.split_column=ward", "data.records_per_site=45"]
    code, _, err = simulate(job_file, *overrides)
    assert code == 0, err
    run = finished_well(job_file.parent / "runs")
    assert [site["site"] for site in run.summary()["sites"]] == ["north", "south-wing"]


@pytest.mark.slow
def test_an_encoder_learns_to_classify(tiny_encoder: Path, tmp_path: Path) -> None:
    assert simulate(classify_job(tmp_path, tiny_encoder, "min_sites = 3"))[0] == 0
    run = finished_well(tmp_path / "runs")
    assert run.summary()["final"]["accuracy"] is not None
    code, out, _ = tell("eval", run.path, "--data", tmp_path / "one.jsonl", "--json")
    assert (code, json.loads(out)["data"]["examples"]) == (0, 30)
    assert tell("export", run.path, "--out", tmp_path / "merged", "--merge")[0] == 0


@pytest.mark.slow
def test_baselines_are_added_and_the_run_still_verifies(job_file: Path) -> None:
    assert simulate(job_file, "--baselines", "--quiet")[0] == 0
    run = finished_well(job_file.parent / "runs")
    names = [line["name"] for line in run.summary()["baselines"]]
    assert len(names) == 5
    for line in run.summary()["baselines"]:
        assert (line["epsilon"] is None) == ("without DP" in line["name"])
        assert line["evaluation"]["examples"] == 30


@pytest.mark.slow
def test_groups_of_the_public_rows_are_scored_and_a_column_that_is_not_there_ends_it_at_once(
    job_file: Path, tmp_path: Path
) -> None:
    code, _, err = simulate(job_file, "eval.group_column=age")
    assert code == 4 and "column `age`" in err
    assert not (tmp_path / "runs").exists()
    code, _, err = simulate(job_file, "eval.group_column=ward")
    assert code == 0, err
    run = only_run(tmp_path / "runs")
    for scores in (run.summary()["base"], run.summary()["final"]):
        assert [row["group"] for row in scores["groups"]["rows"]] == ["North", "South Wing"]
        assert sum(row["examples"] for row in scores["groups"]["rows"]) == 30
    assert all("accuracy_gap" in row for row in run.metrics() if not row.get("site"))
    assert "South Wing" in (run.adapter / "README.md").read_text()
    assert tell("verify", run.path)[0] == 0
    code, out, _ = tell("eval", run.path)
    assert code == 0 and "  South Wing: " in out


@pytest.mark.slow
def test_the_energy_of_a_run_is_in_its_report_and_its_manifest(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COTUNE_FOOTPRINT")
    monkeypatch.setenv("COTUNE_COUNTRY", "FRA")
    assert simulate(job_file)[0] == 0
    run = only_run(tmp_path / "runs")
    assert "France (FRA)" in (run.path / "report" / "index.html").read_text()
    assert "CO2 equivalent" in (run.adapter / "README.md").read_text()
    assert tell("verify", run.path)[0] == 0
    code, _, err = simulate(job_file, out=tmp_path / "more")
    assert code == 0, err
    monkeypatch.setenv("COTUNE_COUNTRY", "Freedonia")
    assert simulate(job_file, out=tmp_path / "none")[0] == 4
