"""The adapter is PEFT's own, under PEFT's own names, from public initial values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cotune.shared.adapter import Layout, fingerprint, nested
from cotune.shared.errors import ModelError, StorageError
from cotune.shared.examples import tokenize
from cotune.shared.job import Job
from cotune.shared.methods import (
    attach,
    initial_values,
    layout,
    layout_of,
    quiet_peft,
    read,
    save,
    trainable,
    write,
)
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.records import read_records

BOTH = {"rule": "fedavg_ab"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(params=["causal", "causal, A and B, all layers", "encoder"])
def job(request: pytest.FixtureRequest, make_job: Any, tiny_encoder: Path) -> Job:
    if request.param == "causal":
        return make_job()
    if request.param == "encoder":
        return make_job(
            model={"base": str(tiny_encoder)},
            task={"kind": "classify", "labels": ["cardio", "derma", "pulmo"]},
            lora={"target_modules": ["query", "value"], "last_layers": 1},
        )
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return make_job(lora={"last_layers": "all", "target_modules": modules, "r": 3}, aggregation=BOTH)


def shape_of(job: Job) -> Layout:
    return layout(attached(job), job.rule)


def attached(job: Job) -> Any:
    return attach(load_model(locate(job), job), job)


def random_values(adapted: Any) -> dict[str, Any]:
    random = np.random.default_rng(4)
    return {n: (random.normal(size=a.shape) * 0.1).astype(np.float32) for n, a in read(adapted).items()}


def losses(adapted: Any, job: Job) -> torch.Tensor:
    examples = tokenize(read_records(Path(str(job.data.train)))[:6], load_tokenizer(locate(job)), job)
    return Network(adapted, job).losses(examples, None).detach()


def test_the_names_are_those_peft_saves(job: Job, tmp_path: Path) -> None:
    adapted = attached(job)
    with quiet_peft():
        adapted.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = read(adapted)
    assert list(ours) == sorted(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
    assert layout(adapted, job.rule).shapes == {name: theirs[name].shape for name in ours}


def test_the_rows_of_a_are_orthonormal_and_everything_else_starts_at_zero(job: Job) -> None:
    for name, array in read(attached(job)).items():
        if ".lora_A." in name:
            np.testing.assert_allclose(array @ array.T, np.eye(job.lora.r), atol=1e-6)
        else:
            assert not array.any(), name


def test_a_new_adapter_changes_nothing_the_model_says(job: Job) -> None:
    torch.testing.assert_close(
        losses(attached(job), job), losses(load_model(locate(job), job), job), rtol=1e-6, atol=1e-6
    )


def test_initial_values_follow_from_the_seed_alone(job: Job) -> None:
    shape = shape_of(job)
    first, again, other = (fingerprint(initial_values(shape, seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert fingerprint(read(attached(job))) == first, "the job's seed is 3"
    values = [a for n, a in initial_values(shape, 3).items() if ".lora_A." in n]
    assert not np.array_equal(values[0], values[1]), "no two layers share their A"


def test_b_alone_is_trained_when_a_is_frozen_and_both_otherwise(make_job: Any) -> None:
    frozen, both = attached(make_job()), attached(make_job(aggregation=BOTH))
    assert {name.split(".lora_")[1][0] for name in trainable(frozen)} == {"B"}
    assert {name.split(".lora_")[1][0] for name in trainable(both)} == {"A", "B"}
    assert tuple(trainable(frozen)) == layout(frozen, make_job().rule).trained
    moving = {id(p) for p in frozen.parameters() if p.requires_grad}
    assert moving == {id(p) for p in trainable(frozen).values()}


def test_a_core_is_what_is_trained_between_factors_whose_rows_and_columns_are_orthonormal(make_job: Any) -> None:
    job = make_job(aggregation={"rule": "fed_sb"})
    adapted = attached(job)
    shape = layout(adapted, job.rule)
    assert {name.split(".lora_")[1] for name in shape.trained} == {"core.weight"}
    assert {shape.shapes[name] for name in shape.trained} == {(2, 2)}
    for name, array in initial_values(shape, 3).items():
        if "lora_core" in name:
            assert not array.any()
        else:
            square = array @ array.T if "lora_A" in name else array.T @ array
            np.testing.assert_allclose(square, np.eye(2), atol=1e-6)
    torch.testing.assert_close(losses(adapted, job), losses(load_model(locate(job), job), job), rtol=1e-6, atol=1e-6)


def test_a_core_is_written_into_the_network_as_part_of_b(make_job: Any) -> None:
    job = make_job(aggregation={"rule": "fed_sb"})
    adapted = attached(job)
    random = np.random.default_rng(5)
    values = initial_values(layout(adapted, job.rule), 3)
    values |= {n: random.normal(size=a.shape).astype(np.float32) for n, a in values.items() if "core" in n}
    write(adapted, values)
    back = read(adapted)
    for name in (n for n in back if "lora_B" in n):
        np.testing.assert_array_equal(back[name], values[name] @ values[name.replace("lora_B", "lora_core")])
    assert float((losses(adapted, job) - losses(load_model(locate(job), job), job)).abs().max()) > 1e-3


def test_an_adapter_of_another_rank_speaks_as_its_products_do_at_the_jobs_own_scale(make_job: Any) -> None:
    job = make_job()
    full, small = attached(job), attached(job)
    values = random_values(full)
    one = nested(values, 1)
    write(small, one)
    assert {array.shape[0] for name, array in read(small).items() if "lora_A" in name} == {1}
    padded = {n: np.zeros_like(a) for n, a in values.items()}
    for name, array in one.items():
        padded[name][tuple(slice(0, length) for length in array.shape)] = array
    write(full, padded)
    torch.testing.assert_close(losses(small, job), losses(full, job), rtol=1e-6, atol=1e-6)
    write(small, values)
    assert fingerprint(read(small)) == fingerprint(values)


def test_values_drawn_anew_are_others_of_the_same_form(job: Job) -> None:
    shape = shape_of(job)
    first, second = initial_values(shape, 3), initial_values(shape, 3, turn=1)
    for name, array in second.items():
        if ".lora_A." in name:
            np.testing.assert_allclose(array @ array.T, np.eye(job.lora.r), atol=1e-6)
            assert not np.array_equal(array, first[name])
    assert (
        fingerprint(second)
        == fingerprint(initial_values(shape, 3, turn=1))
        != fingerprint(initial_values(shape, 3, turn=2))
    )


def test_a_classifier_also_trains_its_head(make_job: Any, tiny_encoder: Path) -> None:
    job = make_job(
        model={"base": str(tiny_encoder)},
        task={"kind": "classify", "labels": ["cardio", "derma", "pulmo"]},
        lora={"target_modules": ["query", "value"]},
    )
    shape = shape_of(job)
    heads = [name for name in shape.trained if "lora" not in name]
    assert [shape.shapes[name] for name in heads] == [(3,), (3, 32)]


def test_only_the_top_layers_get_an_adapter(make_job: Any) -> None:
    for wanted, layers in ((1, {"3"}), (2, {"2", "3"}), (4, {"0", "1", "2", "3"}), ("all", {"0", "1", "2", "3"})):
        shape = shape_of(make_job(lora={"last_layers": wanted}))
        assert {name.split(".layers.")[1].split(".")[0] for name in shape.shapes} == layers


@pytest.mark.parametrize("wanted", [0, -1, 5, 100])
def test_more_layers_than_there_are_or_none_is_refused(make_job: Any, wanted: int) -> None:
    with pytest.raises(ModelError) as caught:
        attached(make_job(lora={"last_layers": wanted}))
    assert (caught.value.code, caught.value.param) == ("E-LORA-LAYERS", "lora.last_layers")
    assert "1 to 4" in caught.value.message


def test_a_rank_above_the_dimension_is_refused_with_the_largest_that_goes(make_job: Any) -> None:
    with pytest.raises(ModelError) as caught:
        attached(make_job(lora={"r": 17}))
    assert (caught.value.code, caught.value.param) == ("E-LORA-RANK", "lora.r")
    assert "16" in caught.value.message
    assert "lora.r=16" in str(caught.value.hint)
    assert shape_of(make_job(lora={"r": 16})).size == 2 * 16 * (32 + 16)


@pytest.mark.parametrize(("wrong", "near"), [("q_prj", "q_proj"), ("vproj", "v_proj"), ("dwn_proj", "down_proj")])
def test_an_unknown_target_is_refused_with_the_nearest_name(make_job: Any, wrong: str, near: str) -> None:
    with pytest.raises(ModelError) as caught:
        attached(make_job(lora={"target_modules": [wrong]}))
    assert (caught.value.code, caught.value.param) == ("E-LORA-TARGET", "lora.target_modules")
    assert f"Did you mean `{near}`?" in caught.value.message


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "norm"])
def test_the_output_layer_the_embedding_and_norms_are_no_targets(make_job: Any, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        attached(make_job(lora={"target_modules": ["q_proj", name]}))
    assert caught.value.code == "E-LORA-TARGET"


def test_the_layout_without_weights_is_that_of_the_real_model(job: Job) -> None:
    real = shape_of(job)
    shape, _ = layout_of(job, locate(job))
    assert shape == real
    assert list(shape.shapes) == list(real.shapes)
    assert fingerprint(initial_values(shape, 3)) == fingerprint(initial_values(real, 3))


def test_what_is_written_is_what_is_read(job: Job) -> None:
    adapted = attached(job)
    values = random_values(adapted)
    write(adapted, values)
    back = read(adapted)
    assert fingerprint(back) == fingerprint(values)
    for array in back.values():
        np.negative(array, out=array)
    assert fingerprint(read(adapted)) == fingerprint(values), "reading gives copies"


def test_writing_some_tensors_leaves_the_others(job: Job) -> None:
    adapted = attached(job)
    before, name = read(adapted), layout(adapted, job.rule).trained[0]
    write(adapted, {name: random_values(adapted)[name]})
    after = read(adapted)
    assert [n for n in after if not np.array_equal(after[n], before[n])] == [name]


def test_a_saved_adapter_loads_by_pefts_own_loader_and_says_the_same(job: Job, tmp_path: Path) -> None:
    from peft import PeftModel

    base = locate(job)
    adapted = attached(job)
    values = random_values(adapted)
    write(adapted, values)
    wanted = losses(adapted, job)
    save(tmp_path / "adapter", values, layout_of(job, base)[1], "# card\n")
    with quiet_peft():
        loaded = PeftModel.from_pretrained(load_model(base, job), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(losses(loaded, job), wanted, rtol=1e-6, atol=1e-6)
    assert float((wanted - losses(attached(job), job)).abs().max()) > 1e-3, "the adapter must matter"
    assert fingerprint(read(loaded)) == fingerprint(values)


def test_the_folder_is_a_plain_peft_one_and_names_no_path(job: Job, tmp_path: Path) -> None:
    base = locate(job)
    config = layout_of(job, base)[1]
    save(tmp_path / "adapter", read(attached(job)), config, "# card\n")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    text = (tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    said = json.loads(text)
    assert said["base_model_name_or_path"] == base.name == Path(job.model.base).name
    assert str(Path(job.model.base).parent) not in text
    assert (said["r"], said["lora_alpha"], said["inference_mode"]) == (job.lora.r, job.lora.alpha, True)
    assert said["peft_type"] == "LORA"
    assert said["target_modules"] == sorted(job.lora.target_modules)
    assert (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8") == "# card\n"


def test_an_adapter_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(StorageError):
        save(tmp_path / "file" / "adapter", {"a": np.zeros(2, dtype=np.float32)}, {}, "card")


def test_an_adapter_peft_would_save_otherwise_is_refused(make_job: Any) -> None:
    job = make_job()
    adapted = attached(job)
    layers = adapted.get_base_model().model.layers
    layers[3].self_attn.q_proj.lora_B = layers[2].self_attn.q_proj.lora_B
    with pytest.raises(ModelError) as caught:
        layout(adapted, job.rule)
    assert caught.value.code == "E-LORA-NAMES"
