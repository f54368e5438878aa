"""Where a base model lies and in which numbers; what a machine cannot do is said before anything is loaded."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cotune.shared.errors import ModelError
from cotune.shared.model import load_model, locate
from cotune.shared.placement import device, keep_float32, placement

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")


def refusal(call: Any, *arguments: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    assert caught.value.code == "E-MODEL-4BIT"
    assert caught.value.param == "model.quantize"
    assert "python -m pip install bitsandbytes" in str(caught.value.hint)
    return caught.value


@without_gpu
def test_without_a_gpu_a_model_lies_on_the_cpu_in_the_jobs_numbers(make_job: Any) -> None:
    assert device() == torch.device("cpu")
    assert placement(make_job()) == {"dtype": torch.float32}
    assert placement(make_job(model={"dtype": "bfloat16"})) == {"dtype": torch.bfloat16}


def test_with_a_gpu_the_whole_model_lies_on_it(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert placement(make_job()) == {"dtype": torch.float32, "device_map": {"": torch.device("cuda")}}


@without_gpu
def test_four_bits_without_a_gpu_are_refused_before_weights_are_read(make_job: Any) -> None:
    job = make_job(model={"quantize": "4bit"})
    assert "a CUDA GPU" in refusal(placement, job).message
    refusal(load_model, locate(job), job)


@without_gpu
def test_a_coordinator_without_gpu_can_still_plan_a_job_in_four_bits(make_job: Any) -> None:
    job = make_job(model={"quantize": "4bit"})
    model = load_model(locate(job), job, weights=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes_are_refused(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = refusal(placement, make_job(model={"quantize": "4bit"})).message
    assert message.endswith("missing here: bitsandbytes")


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("bitsandbytes") is None, reason="needs a GPU and bitsandbytes"
)
def test_a_base_in_four_bits_is_frozen_and_its_adapter_in_float32(make_job: Any) -> None:
    from cotune.client.gradients import PerExampleGradients
    from cotune.shared.examples import Example
    from cotune.shared.methods import attach, trainable
    from cotune.shared.network import Network

    job = make_job(model={"quantize": "4bit", "dtype": "bfloat16"})
    network = Network(attach(load_model(locate(job), job), job), job)
    assert type(network.inner.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert {p.dtype for p in trainable(network.adapted).values()} == {torch.float32}
    found = PerExampleGradients(network).of([Example((4, 5, 6, 7), 1), Example((8, 9, 10), 1)], None)
    assert all(bool(g.isfinite().all()) and g.dtype == torch.float32 for g in found.gradients.values())


@pytest.mark.parametrize("head", [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))])
def test_a_head_learns_in_single_precision_whatever_goes_into_it(head: nn.Module) -> None:
    head = copy.deepcopy(head).bfloat16()
    keep_float32([head, None])
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    assert head(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_classifier_in_bfloat16_has_a_head_in_single_precision(make_job: Any, tiny_encoder: Path) -> None:
    model = {"base": str(tiny_encoder), "dtype": "bfloat16"}
    job = make_job(model=model, task={"kind": "classify", "labels": ["a", "b", "c"]})
    loaded = load_model(locate(job), job)
    numbers = {name.partition(".")[0]: p.dtype for name, p in loaded.named_parameters()}
    assert numbers == {"bert": torch.bfloat16, "classifier": torch.float32}
    assert loaded(input_ids=torch.tensor([[3, 4, 5]])).logits.dtype == torch.float32
