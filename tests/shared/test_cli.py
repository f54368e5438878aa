"""The command line as a user meets it: exit codes, one envelope, never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cotune.shared import cli
from cotune.shared.cli import COMMANDS, Entry, run
from cotune.shared.errors import CotuneError, RefusedError, TimedOut

CANARY = "canary secret text"


@pytest.fixture
def told(capsys):
    """Run a command line; give its exit code and both outputs, which never hold a traceback."""

    def tell(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return tell


def envelope(out: str) -> dict:
    lines = out.splitlines()
    assert len(lines) == 1
    value = json.loads(lines[0])
    assert value["schema_version"] == 1
    assert set(value) == {"schema_version", "status", "data" if value["status"] == "ok" else "error"}
    return value


@pytest.fixture
def job_file(tiny_causal: Path, tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(
        f'[model]\nbase = "{tiny_causal}"\nmax_length = 32\n'
        '[lora]\nr = 2\nlast_layers = 2\n[data]\ntrain = "none.jsonl"\nrecords_per_site = 100\n'
        "[train]\nbatch_size = 10\n[privacy]\nnoise_multiplier = 1.0\n"
    )
    return tmp_path / "run.toml"


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cotune.shared.cli import run; code = run(['--help']);"
        "print([m for m in ('torch', 'transformers', 'peft', 'flwr', 'matplotlib', 'numpy') if m in sys.modules]);"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(told, name: str) -> None:
    code, out, err = told(name, "--help")
    assert (code, err) == (0, "")
    assert "Usage" in out


def test_the_version_is_the_packages(told) -> None:
    from importlib.metadata import version

    assert told("--version") == (0, version("cotune") + "\n", "")


def test_an_unknown_command_exits_4_and_names_the_nearest(told) -> None:
    code, out, err = told("simulat")
    assert (code, out) == (4, "")
    assert "E-USAGE" in err
    assert "Did you mean `simulate`?" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["plan", "run.toml", "--nosuch"],
        ["plan", "missing.toml"],
        ["simulate", "missing.toml"],
        ["simulate", "run.toml", "--engine", "warp"],
        ["simulate", "run.toml", "--sites", "two"],
        ["resume", "nothing"],
        ["resume"],
        ["simulate", "recipe:nothing"],
        ["config", "validate", "missing.toml"],
        ["config", "validate", "run.toml", "run.round=2"],
        ["config", "nosuch"],
        ["config", "validate"],
        ["recipes", "show"],
        ["recipes", "show", "nothing"],
        ["recipes", "burn"],
        ["init"],
        ["init", "x", "--recipe", "nothing"],
        ["eval", "nothing"],
        ["eval", "latest", "--limit", "0"],
        ["report", "nothing"],
        ["verify", "nothing"],
        ["verify", "x" * 5000],
        ["export", "nothing", "--out", "x"],
        ["export", "latest"],
        ["data", "check", "missing.jsonl"],
    ],
    ids=range(26),
)
def test_a_users_mistake_exits_4_with_a_code_and_as_one_envelope(
    told, job_file: Path, monkeypatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(job_file.parent)
    code, out, err = told(*arguments)
    assert (code, out) == (4, "")
    assert err.startswith("E-")
    code, out, err = told(*arguments, "--json")
    assert (code, err) == (4, "")
    error = envelope(out)["error"]
    assert set(error) == {"code", "message", "param", "hint"}
    assert error["code"].startswith("E-")
    assert sorted(path.name for path in job_file.parent.iterdir()) == ["run.toml"]


def broken() -> None:
    raise ValueError(CANARY)


def stopped() -> None:
    raise KeyboardInterrupt


def late() -> None:
    raise TimedOut("E-LATE", "too late", hint="wait")


def refused() -> None:
    raise RefusedError("E-NO", "no", param="privacy.epsilon")


def plant(monkeypatch, name: str) -> None:
    """Make `cotune planted` call a function of this file."""
    monkeypatch.setitem(sys.modules, "planted_commands", sys.modules[__name__])
    monkeypatch.setitem(cli.COMMANDS, "planted", Entry(f"planted_commands:{name}", "planted"))


def test_a_defect_exits_5_and_its_text_is_not_shown(told, monkeypatch) -> None:
    plant(monkeypatch, "broken")
    monkeypatch.delenv("COTUNE_DEBUG", raising=False)
    code, out, err = told("planted")
    assert (code, out) == (5, "")
    assert "E-INTERNAL" in err
    assert "ValueError" in err
    assert CANARY not in err
    code, out, err = told("--json", "planted")
    assert code in (4, 5)
    assert CANARY not in out + err


def test_a_defect_is_told_whole_to_who_asks_for_it(capsys, monkeypatch) -> None:
    plant(monkeypatch, "broken")
    monkeypatch.setenv("COTUNE_DEBUG", "1")
    assert run(["planted"]) == 5
    assert CANARY in capsys.readouterr().err


def test_an_interruption_exits_130(told, monkeypatch) -> None:
    plant(monkeypatch, "stopped")
    code, out, err = told("planted")
    assert (code, out) == (130, "")
    assert "E-INTERRUPTED" in err


@pytest.mark.parametrize(("name", "expected"), [("late", 3), ("refused", 6)])
def test_a_named_error_exits_with_its_own_code_and_its_hint(told, monkeypatch, name: str, expected: int) -> None:
    plant(monkeypatch, name)
    code, _, err = told("planted")
    assert code == expected
    assert ("mend it: wait" in err) == (name == "late")


def test_every_kind_of_error_has_an_exit_code_that_is_documented() -> None:
    def kinds(kind: type[CotuneError]) -> set[type[CotuneError]]:
        return {kind}.union(*(kinds(child) for child in kind.__subclasses__()))

    from cotune.shared import errors

    for kind in kinds(CotuneError) - {CotuneError}:
        if kind.__module__ == errors.__name__:
            assert f"{kind.__name__} " in (errors.__doc__ or "")
        assert kind.exit_code in (1, 2, 3, 4, 6)


def test_a_reader_that_goes_away_is_no_error() -> None:
    # A pipe whose other end is closed already: what `cotune config schema | true` leaves.
    receiver, sender = os.pipe()
    os.close(receiver)
    with os.fdopen(sender, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "cotune.shared.cli", "config", "schema"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # click itself ends with 1 on a closed pipe


def test_a_good_job_is_valid_and_shown_as_it_will_run(told, job_file: Path, tmp_path: Path) -> None:
    from cotune.shared.jobfile import load_job
    from cotune.shared.planning import resolve

    resolved = resolve(load_job(job_file))
    code, out, err = told("config", "validate", job_file)
    assert (code, err) == (0, "")
    assert resolved.sha256()[:12] in out
    assert envelope(told("config", "validate", job_file, "--json")[1])["data"] == {
        "valid": True,
        "job_sha256": resolved.sha256(),
    }
    shown = told("config", "show", job_file)[1]
    (tmp_path / "shown.toml").write_text(shown)
    assert load_job(tmp_path / "shown.toml") == resolved
    assert envelope(told("config", "show", job_file, "--json")[1])["data"] == json.loads(resolved.to_json())


def test_the_schema_describes_every_setting(told) -> None:
    from cotune.shared.jobfile import all_keys

    code, out, _ = told("config", "schema")
    assert code == 0
    sections = {block.partition("]")[0]: block for block in f"\n\n{out}".split("\n\n[")}
    for key in all_keys():
        section, name = key.split(".")
        assert f"\n  {name} " in sections[section]
    assert "properties" in envelope(told("config", "schema", "--json")[1])["data"]


def test_every_recipe_is_listed_shown_and_valid(told) -> None:
    code, out, _ = told("recipes", "--json")
    assert code == 0
    names = list(envelope(out)["data"])
    assert "quickstart" in names
    for name in names:
        shown = told("recipes", "show", name)[1]
        assert shown.startswith("# ")
        assert envelope(told("recipes", "show", name, "--json")[1])["data"]["text"] == shown.rstrip("\n")
        assert told("config", "validate", f"recipe:{name}", "privacy.noise_multiplier=50.0")[0] == 0


@pytest.mark.slow
def test_every_recipe_keeps_its_budget_with_the_noise_it_asks_for(told) -> None:
    for name in envelope(told("recipes", "--json")[1])["data"]:
        assert told("config", "validate", f"recipe:{name}")[0] == 0


def test_a_new_study_is_ready_to_be_validated(told, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    code, out, err = told("init", folder)
    assert (code, err) == (0, "")
    assert f"cd {folder}" in out
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "data/eval.jsonl",
        "data/train.jsonl",
        "run.toml",
    ]
    assert told("config", "validate", folder / "run.toml", "privacy.noise_multiplier=50.0")[0] == 0
    assert told("data", "check", folder / "data" / "train.jsonl")[0] == 0


def test_a_new_study_never_touches_a_folder_that_is_not_empty(told, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = told("init", tmp_path)
    assert code == 1
    assert "E-EXISTS" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    code, _, err = told("init", tmp_path / "mine.txt")
    assert code in (1, 4)
    assert "E-INTERNAL" not in err


def test_a_plan_reads_no_data_and_says_what_it_costs(told, job_file: Path) -> None:
    code, out, err = told("plan", job_file, "run.rounds=3", "--json")
    assert (code, err) == (0, "")
    data = envelope(out)["data"]
    assert data["trained_parameters"] == 2 * 2 * (32 + 16)  # two layers; B of q_proj (32 x 2), v_proj (16 x 2)
    assert data["bytes_up"] >= 4 * data["trained_parameters"]
    assert len(data["epsilon_by_round"]) == 3
    assert data["epsilon_by_round"] == sorted(data["epsilon_by_round"])
    assert data["noise_multiplier"] == 1.0
    assert 0 < data["epsilon_by_round"][-1] <= 8.0


def test_a_plan_takes_the_least_noise_that_keeps_the_budget(told, job_file: Path) -> None:
    arguments = [job_file, "privacy.noise_multiplier=auto", "run.rounds=8", "privacy.epsilon=2", "--json"]
    data = envelope(told("plan", *arguments)[1])["data"]
    assert 1.95 < data["epsilon_by_round"][-1] <= 2.0


def test_a_plan_without_privacy_says_none(told, job_file: Path) -> None:
    code, out, _ = told("plan", job_file, "privacy.level=none")
    assert code == 0
    assert "NONE" in out
    shown = told("plan", job_file, "privacy.noise=test")[1]
    assert "TEST NOISE" in shown
    assert "noise multiplier" in shown
    assert "epsilon by round" in shown


@pytest.mark.parametrize(
    ("override", "code"),
    [("privacy.delta=0.01", "E-DELTA"), ("privacy.noise_multiplier=0.4", "E-BUDGET-IMPOSSIBLE")],
)
def test_a_plan_that_protects_nobody_is_refused(told, job_file: Path, override: str, code: str) -> None:
    exit_code, _, err = told("plan", job_file, override)
    assert exit_code == 4
    assert code in err
    assert "mend it" in err
