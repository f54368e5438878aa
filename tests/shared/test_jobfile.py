"""Job files as users write them: three formats, overrides, and errors that name setting and line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.shared.errors import JobError
from cotune.shared.job import Job
from cotune.shared.jobfile import MAX_BYTES, all_keys, dump_toml, load_job

TOML = """\
schema = 1

[run]
name = "study"
rounds = 6

[model]
base = "owner/name"

[data]
train = "rows/train.jsonl"
records_per_site = 1000

[train]
batch_size = 64
"""
DATA = {
    "schema": 1,
    "run": {"name": "study", "rounds": 6},
    "model": {"base": "owner/name"},
    "data": {"train": "rows/train.jsonl", "records_per_site": 1000},
    "train": {"batch_size": 64},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


def fault(path: Path, *overrides: str) -> JobError:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    assert caught.value.exit_code == 4
    return caught.value


def test_toml_yaml_and_json_of_the_same_settings_are_the_same_job(file: Path) -> None:
    for suffix, text in ((".json", json.dumps(DATA)), (".yaml", yaml.safe_dump(DATA)), (".yml", yaml.dump(DATA))):
        other = file.with_suffix(suffix)
        other.write_text(text, encoding="utf-8")
        assert load_job(other) == load_job(file)


def test_a_byte_order_mark_does_not_matter(file: Path) -> None:
    before = load_job(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_job(file) == before


def test_an_unknown_setting_is_named_with_its_line_and_the_nearest_known_one(file: Path) -> None:
    file.write_text(TOML.replace("rounds = 6", "round = 6"), encoding="utf-8")
    error = fault(file)
    assert error.code == "E-CONFIG-KEY"
    assert error.param == "run.round"
    assert "`run.rounds`" in error.message
    assert "run.toml line 5" in error.message
    assert error.hint


def test_an_unknown_section_is_named_with_its_line(file: Path) -> None:
    file.write_text(TOML.replace("[train]", "[training]"), encoding="utf-8")
    error = fault(file)
    assert (error.code, error.param) == ("E-CONFIG-KEY", "training")
    assert "`train`" in error.message
    assert "line 14" in error.message


def test_a_setting_in_the_wrong_section_leads_to_the_right_one(file: Path) -> None:
    error = fault(file, "train.rounds=3")
    assert error.code == "E-CONFIG-KEY"
    assert "`run.rounds`" in error.message


def test_a_wrong_value_is_named_with_its_line(file: Path) -> None:
    file.write_text(TOML.replace("batch_size = 64", 'batch_size = "many"'), encoding="utf-8")
    error = fault(file)
    assert (error.code, error.param) == ("E-CONFIG-VALUE", "train.batch_size")
    assert "line 15" in error.message


def test_a_missing_setting_is_said_to_be_required(file: Path) -> None:
    file.write_text(TOML.replace("records_per_site = 1000", ""), encoding="utf-8")
    error = fault(file)
    assert error.param == "data.records_per_site"
    assert "required" in error.message


def test_overrides_read_toml_values_and_bare_words(file: Path) -> None:
    job = load_job(
        file,
        [
            "run.rounds=8",
            "privacy.epsilon = 3",
            "run.name=other",
            'model.base="hub/id"',
            'lora.target_modules=["k_proj"]',
            "train.scaffold=true",
            "aggregation.rule=fedavg_ab",
            "eval.limit=5",
        ],
    )
    assert (job.run.rounds, job.privacy.epsilon, job.run.name) == (8, 3.0, "other")
    assert (job.model.base, job.lora.target_modules) == ("hub/id", ("k_proj",))
    assert (job.train.scaffold, job.aggregation.rule) == (True, "fedavg_ab")
    assert job.eval.limit == 5


def test_the_last_override_counts(file: Path) -> None:
    assert load_job(file, ["run.rounds=8", "run.rounds=9"]).run.rounds == 9


@pytest.mark.parametrize("override", ["run.rounds", "=3", ".=3", "run.=3", "", "run..rounds=3", "schema.a.b=3"])
def test_an_override_that_is_none_is_refused(file: Path, override: str) -> None:
    assert fault(file, override).code in ("E-CONFIG-OVERRIDE", "E-CONFIG-KEY")


def test_relative_paths_are_relative_to_the_job_file(file: Path, monkeypatch, tmp_path_factory) -> None:
    (file.parent / "weights").mkdir()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    job = load_job(file, ["eval.data=eval.jsonl", "model.base=weights"])
    assert job.data.train == str(file.parent / "rows" / "train.jsonl")
    assert job.eval.data == str(file.parent / "eval.jsonl")
    assert job.model.base == str(file.parent / "weights")
    assert load_job(file).model.base == "owner/name"


def test_site_files_become_absolute_and_data_set_names_stay(file: Path) -> None:
    text = TOML.replace('train = "rows/train.jsonl"\n', "")
    file.write_text(text + '[data.sites]\nnorth = "n.jsonl"\nsouth = "dataset:x/y"\n', encoding="utf-8")
    assert load_job(file).data.sites == {"north": str(file.parent / "n.jsonl"), "south": "dataset:x/y"}


def unreadable(folder: Path) -> dict[str, Path]:
    made = {
        "missing": folder / "none.toml",
        "directory": folder / "directory.toml",
        "latin": folder / "latin.toml",
        "huge": folder / "huge.toml",
    }
    made["directory"].mkdir()
    made["latin"].write_bytes(b'[run]\nname = "caf\xe9"\n')
    made["huge"].write_bytes(b"#" * (MAX_BYTES + 1))
    return made


@pytest.mark.parametrize("kind", ["missing", "directory", "latin", "huge"])
def test_a_file_that_cannot_be_a_job_is_refused(tmp_path: Path, kind: str) -> None:
    assert fault(unreadable(tmp_path)[kind]).code == "E-CONFIG-FILE"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "[run\n"),
        ("a.toml", "run = {"),
        ("a.toml", '[run]\nname="a"\nname="b"\n'),
        ("a.toml", "x = 2024-99-99"),
        ("a.toml", "[run]\nseed = " + "1" * 5000),
        ("a.toml", "x = " + "[" * 5000),
        ("a.yaml", "run: [1,\n"),
        ("a.yaml", "- 1\n- 2\n"),
        ("a.yaml", "just words"),
        ("a.yaml", ""),
        ("a.yaml", "run: !!python/object/apply:os.system ['true']"),
        ("a.yaml", "run: {name: 2024-99-99}"),
        ("a.yaml", "[" * 5000),
        ("a.json", "{"),
        ("a.json", "[]"),
        ("a.json", "null"),
        ("a.json", '{"run": {"seed": ' + "1" * 5000 + "}}"),
        ("a.json", "[" * 100_000),
    ],
    ids=range(18),
)
def test_a_file_of_wrong_syntax_is_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert fault(path).code == "E-CONFIG-SYNTAX"


@pytest.mark.parametrize(
    "override",
    [
        'data.train=""',
        "run.seed=" + "1" * 5000,
        "run.seed=" + "[" * 5000,
        "data.train=~nobody-of-that-name/x.jsonl",
        'data.train="a\\u0000b"',
        'eval.data="a\\u0000b"',
        'model.base="a\\u0000b"',
        "model.base=" + "a" * 5000,
    ],
    ids=range(8),
)
def test_an_override_no_path_or_number_can_be_is_refused_or_left_to_the_reader(file: Path, override: str) -> None:
    try:
        assert isinstance(load_job(file, [override]), Job)
    except JobError as error:
        assert error.code.startswith("E-CONFIG-")


texts = st.text(st.characters(codec="utf-8"), max_size=12)
scalars = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["true", "auto", '""', "[]", "{}", "none", "1e400", "0x10", "[[1]]", "{a.b=1}", "2024-01-01", "/", "~", "~x/y"]
    ),
    texts,
    texts.map(json.dumps),
)
keys = st.one_of(st.sampled_from([*all_keys(), "data.sites.north", "run", "schema", "data", "run.name.x"]), texts)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overrides=st.lists(st.tuples(keys, scalars).map("=".join), max_size=4))
def test_no_override_gives_anything_but_a_valid_job_or_a_job_error(file: Path, overrides: list[str]) -> None:
    try:
        job = load_job(file, overrides)
    except JobError as error:
        assert error.code.startswith("E-CONFIG-")
        return
    assert Job.model_validate(job.model_dump(by_alias=True)) == job


def plain(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**63 - 1),
    epsilon=plain(1e-300, 1e300),
    delta=st.one_of(st.just("auto"), plain(1e-300, 0.1)),
    labels=st.lists(words, min_size=2, max_size=4, unique=True),
    choices=st.one_of(st.just("auto"), st.lists(words, max_size=3)),
    limit=st.one_of(st.none(), st.integers(1, 10**9)),
    layers=st.one_of(st.just("all"), st.integers(1, 99)),
    sites=st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9-]{0,39}", fullmatch=True), st.just("/x/y.jsonl"), max_size=3),
)
def test_a_job_written_as_toml_reads_back_equal(
    tmp_path: Path, seed, epsilon, delta, labels, choices, limit, layers, sites
) -> None:
    data = {
        "run": {"seed": seed},
        "model": {"base": "owner/name"},
        "task": {"kind": "classify", "labels": labels},
        "lora": {"last_layers": layers},
        "data": {"sites": sites or {"a": "/a.jsonl"}, "records_per_site": 1000},
        "privacy": {"epsilon": epsilon, "delta": delta},
        "eval": {"choices": choices, "limit": limit, "data": "/e.jsonl"},
    }
    job = Job.model_validate(data)
    path = tmp_path / "written.toml"
    path.write_text(dump_toml(job), encoding="utf-8")
    again = load_job(path)
    assert again == job
    assert again.sha256() == job.sha256()


def test_reading_a_job_loads_nothing_heavy() -> None:
    code = (
        "import sys; import cotune.shared.jobfile;"
        "print([m for m in ('torch', 'transformers', 'peft', 'flwr', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
