"""The job's models: what is possible, what the hash names, what a copy keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from cotune.shared.errors import JobError
from cotune.shared.job import Job, absolute
from cotune.shared.jobfile import all_keys, parse_job

LEAST = {"model": {"base": "owner/name"}, "data": {"train": "/a.jsonl", "records_per_site": 100}}

# One other valid value for every setting there is; `test_every_setting_...` fails if one is forgotten.
OTHERS: dict[str, object] = {
    "run.name": "other",
    "run.seed": 18,
    "run.rounds": 5,
    "model.base": "owner/other",
    "model.sha256": "0" * 64,
    "model.max_length": 255,
    "model.dtype": "bfloat16",
    "model.quantize": "4bit",
    "task.kind": "classify",
    "task.labels": ["a", "b"],
    "task.end_token": False,
    "lora.r": 9,
    "lora.alpha": 8.5,
    "lora.target_modules": ["q_proj"],
    "lora.last_layers": 3,
    "lora.ranks": {"site-1": 4},
    "data.train": "/b.jsonl",
    "data.sites": {"site-a": "/a.jsonl"},
    "data.format": "text",
    "data.split": "column",
    "data.split_column": "ward",
    "data.alpha": 0.5,
    "data.records_per_site": 101,
    "data.unit": "column:patient",
    "data.max_per_unit": 4,
    "data.units_per_site": 90,
    "data.sites_per_unit": 2,
    "data.dataset": "notes",
    "train.batch_size": 63,
    "train.local_steps": 5,
    "train.learning_rate": 0.5,
    "train.schedule": "linear",
    "train.optimizer": "adamw",
    "train.momentum": 0.9,
    "train.proximal": 0.1,
    "train.scaffold": True,
    "train.microbatch": 31,
    "train.max_batch_size": 80,
    "train.checkpointing": True,
    "train.compile": True,
    "privacy.level": "none",
    "privacy.epsilon": 7.5,
    "privacy.delta": 1e-6,
    "privacy.clipping": "adaptive",
    "privacy.clipping_norm": 0.5,
    "privacy.clipping_quantile": 0.6,
    "privacy.clipping_rate": 0.3,
    "privacy.metrics": "noised",
    "privacy.noise_multiplier": 2.0,
    "privacy.noise": "test",
    "federation.sites": 5,
    "federation.min_sites": 2,
    "federation.round_timeout_s": 60.0,
    "federation.selection": "available",
    "federation.sites_per_round": 2,
    "federation.max_rounds_per_site": 3,
    "federation.quorum": 3,
    "federation.approval_timeout_s": 60.0,
    "federation.secure_aggregation": None,  # only one value so far
    "aggregation.rule": "fedex",
    "aggregation.weights": {"site-1": 2.0},
    "aggregation.max_update_norm": 10.0,
    "aggregation.robust": "norm_bound",
    "aggregation.norm_bound": 2.0,
    "aggregation.trim": 0.3,
    "aggregation.hostile": 2,
    "aggregation.root": "/r.jsonl",
    "aggregation.optimizer": "fedavgm",
    "aggregation.learning_rate": 0.5,
    "aggregation.momentum": 0.8,
    "aggregation.ema": 0.5,
    "transport.codec_up": "int8",
    "transport.codec_down": "bf16",
    "transport.error_feedback": True,
    "eval.data": "/e.jsonl",
    "eval.every": 2,
    "eval.limit": 10,
    "eval.choices": ["a", "b"],
    "eval.group_column": "ward",
    "audit.canaries": 12,
    "audit.secrets": 2,
    "audit.rows_each": 3,
    "simulation.workers": 1,
    "simulation.threads": 1,
}
NEEDS: dict[str, dict[str, dict[str, object]]] = {
    "task.kind": {"task": {"labels": ["a", "b"]}},
    "task.labels": {"task": {"kind": "classify"}},
    "data.split": {"data": {"split_column": "ward"}},
    "data.max_per_unit": {"data": {"unit": "column:patient"}},
    "data.units_per_site": {"data": {"unit": "column:patient"}},
    "data.sites": {"data": {"train": None}},
    "federation.sites_per_round": {"federation": {"selection": "random"}},
    "federation.max_rounds_per_site": {"federation": {"selection": "random", "sites_per_round": 1}},
    "aggregation.root": {"aggregation": {"robust": "fltrust"}},
    "eval.group_column": {"eval": {"data": "/e.jsonl"}},
    "transport.error_feedback": {"transport": {"codec_up": "int8"}},
}


def job(**sections: dict) -> Job:
    return parse_job(merged(LEAST, sections), origin="test")


def merged(one: dict, other: dict) -> dict:
    return {name: {**one.get(name, {}), **other.get(name, {})} for name in {**one, **other}}


def test_every_setting_that_changes_changes_the_hash() -> None:
    assert set(OTHERS) == set(all_keys())
    seen = {job().sha256(): "nothing"}
    for key, value in OTHERS.items():
        if value is None:
            continue
        section, name = key.split(".")
        changed = job(**merged(NEEDS.get(key, {}), {section: {name: value}})).sha256()
        assert changed not in seen or key in NEEDS, f"{key} hashes like {seen.get(changed)}"
        seen[changed] = key
    assert len(seen) == len(OTHERS) - 1  # one has no other value; task.kind and task.labels need each other


def test_the_hash_is_that_of_the_canonical_json_and_the_same_in_another_process() -> None:
    code = (
        "import json,sys; from cotune.shared.jobfile import parse_job;"
        "print(parse_job(json.load(sys.stdin), origin='x').sha256())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(LEAST), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == job().sha256()
    backwards = {key: dict(reversed(list(LEAST[key].items()))) for key in reversed(list(LEAST))}
    assert parse_job(backwards, origin="test").sha256() == job().sha256()


def test_a_job_is_its_own_json_again() -> None:
    one = job(privacy={"delta": 1e-7}, lora={"last_layers": 3}, eval={"choices": ["é", "b"]})
    again = parse_job(json.loads(one.to_json()), origin="test")
    assert again == one
    assert again.sha256() == one.sha256()


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"rounds": 0}},
        {"run": {"seed": -1}},
        {"run": {"seed": 2**63}},
        {"run": {"name": "../up"}},
        {"run": {"name": ""}},
        {"model": {"max_length": 3}},
        {"model": {"sha256": "ABC"}},
        {"task": {"kind": "classify"}},
        {"task": {"kind": "classify", "labels": ["a", "a"]}},
        {"task": {"labels": ["a", "b"]}},
        {"lora": {"r": 0}},
        {"lora": {"alpha": 0.0}},
        {"lora": {"target_modules": []}},
        {"data": {"train": None}},
        {"data": {"sites": {"a": "x.jsonl"}}},
        {"data": {"train": None, "sites": {"Site A": "x.jsonl"}}},
        {"data": {"split": "column"}},
        {"data": {"records_per_site": 0}},
        {"train": {"batch_size": 101}},
        {"train": {"learning_rate": float("nan")}},
        {"train": {"learning_rate": float("inf")}},
        {"train": {"optimizer": "adamw", "momentum": 0.9}},
        {"train": {"momentum": 1.0}},
        {"privacy": {"epsilon": 0.0}},
        {"privacy": {"epsilon": float("inf")}},
        {"privacy": {"clipping_norm": -1.0}},
        {"privacy": {"noise": "none"}},
        {"privacy": {"level": "person"}},
        {"data": {"train": None, "sites": {"a": "site:/home/a"}, "dataset": "notes"}},
        {"data": {"train": None, "sites": {"a": "site:", "b": "/b.jsonl"}, "dataset": "notes"}},
        {"data": {"train": None, "sites": {"a": "site:"}}},
        {"federation": {"approval_timeout_s": 0.0}},
        {"federation": {"sites": 2, "min_sites": 3}},
        {"federation": {"selection": "fastest"}},
        {"federation": {"sites_per_round": 0}},
        {"federation": {"quorum": 0}},
        {"federation": {"max_rounds_per_site": 0}},
        {"federation": {"secure_aggregation": True}},
        {"aggregation": {"rule": "mean"}},
        {"aggregation": {"weights": {"site-1": 0.0}}},
        {"aggregation": {"max_update_norm": 0.0}},
        {"aggregation": {"robust": "mean"}},
        {"aggregation": {"trim": 0.5}},
        {"aggregation": {"hostile": 0}},
        {"aggregation": {"optimizer": "sgd"}},
        {"aggregation": {"ema": 1.0}},
        {"lora": {"ranks": {"site-1": 0}}},
        {"train": {"proximal": -0.1}},
        {"transport": {"codec_up": "zip"}},
        {"eval": {"every": 0}},
        {"schema": 2},
    ],
)
def test_an_impossible_setting_is_refused_by_name(sections: dict) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(
            {
                **merged(LEAST, {k: v for k, v in sections.items() if isinstance(v, dict)}),
                **{k: v for k, v in sections.items() if not isinstance(v, dict)},
            },
            origin="run.toml",
        )
    assert caught.value.code == "E-CONFIG-VALUE"
    assert caught.value.exit_code == 4
    assert "run.toml" in caught.value.message


def test_a_negative_or_missing_noise_is_no_job_that_claims_anything() -> None:
    assert job().is_private
    assert not job(privacy={"noise": "test"}).is_private
    assert not job(privacy={"level": "none"}).is_private


def test_a_job_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        job().run.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_copy_with_changes_is_validated_and_the_original_stays() -> None:
    one = job()
    assert one.replace(run={"seed": 1}).run.seed == 1
    assert one.run.seed == 17
    with pytest.raises(ValidationError):
        one.replace(run={"rounds": 0})


def test_data_paths_are_made_absolute_and_data_sets_stay_names(tmp_path: Path) -> None:
    assert absolute("a/b.jsonl", tmp_path) == str(tmp_path / "a" / "b.jsonl")
    assert absolute("/x.jsonl", tmp_path) == "/x.jsonl"
    assert absolute("dataset:icd10/train", tmp_path) == "dataset:icd10/train"


def test_enrolled_sites_and_files_named_by_their_content_are_no_paths(tmp_path: Path) -> None:
    for name in ("site:", f"sha256:{'0' * 64}"):
        assert absolute(name, tmp_path) == name
    data = {"train": None, "sites": {"a": "site:", "b": "site:"}, "dataset": "notes"}
    assert parse_job(merged(LEAST, {"data": data}), origin="run.toml").data.deployed
    assert not parse_job(LEAST, origin="run.toml").data.deployed
