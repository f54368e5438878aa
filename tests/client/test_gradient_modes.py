"""A base in bfloat16, checkpointing and compilation: the gradients stay each example's own, and in float32."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.client import oracles
from tests.client.oracles import assert_close, examples_of, hidden_of, network_of
from torch import nn

from cotune.client.gradients import PerExample, PerExampleGradients
from cotune.shared.job import Job
from cotune.shared.methods import read, save, trainable
from cotune.shared.network import checkpoint, padded_length, passes


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(params=oracles.WAYS)
def job(request: pytest.FixtureRequest, make_job: Any, tiny_encoder: Path) -> Job:
    """Every way of training that there is."""
    return oracles.job_of(request.param, make_job, tiny_encoder)


@pytest.fixture
def seven(make_job: Any) -> Job:
    """All projections of the two top layers."""
    return make_job(aggregation=oracles.BOTH, lora={"target_modules": oracles.LLAMA})


def test_a_base_in_bfloat16_gives_gradients_and_an_adapter_in_float32(seven: Job, tmp_path: Path) -> None:
    exact, rounded = network_of(seven), network_of(seven.replace(model={"dtype": "bfloat16"}))
    assert {p.dtype for n, p in rounded.inner.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for p in trainable(rounded.adapted).values()} == {torch.float32}
    alike = padded_length(len(examples_of(seven)[0].ids))  # padding changes how bf16 rounds, so passes never mix it
    examples = [example for example in examples_of(seven) if padded_length(len(example.ids)) == alike]
    assert len(examples) > 1
    plain = oracles.one_by_one(network_of(seven.replace(model={"dtype": "bfloat16"})), [[e] for e in examples])
    wanted = PerExampleGradients(exact).of(examples, None).gradients
    for hidden in (None, rounded.encode(examples)):
        got = PerExampleGradients(rounded).of(examples, hidden)
        assert {g.dtype for g in (*got.gradients.values(), got.losses)} == {torch.float32}
        assert_close(got.gradients, plain)
        errors = oracles.errors(got.gradients, wanted)
        assert 0.005 < float(errors.median()) < 0.03, "rounding the weights alone makes 0.01"
        assert float(errors.max()) < 0.06
    save(tmp_path / "adapter", read(rounded.adapted), {}, "")
    assert {a.dtype for a in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(job: Job, reentrant: bool) -> None:
    examples, plain = examples_of(job), network_of(job)
    wanted = PerExampleGradients(plain).of(examples, hidden_of(plain, examples))
    network = network_of(job if reentrant else job.replace(train={"checkpointing": True}))
    if reentrant:
        checkpoint(network.inner, reentrant=True)
        network.inner.enable_input_require_grads()
    gradients, runs = PerExampleGradients(network), [0]
    counted = (network.inner.model.layers if not network.classify else network.inner.bert.encoder.layer)[-1]
    next(counted.children()).register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    for hidden in (None,) if reentrant else (None, hidden_of(network, examples)):
        runs[0] = 0
        assert_close(gradients.of(examples, hidden).gradients, wanted.gradients)
        assert runs == [2 * len(list(passes(examples, len(examples))))], (
            "the layer was not run again in the backward pass"
        )


def recorded(job: Job) -> tuple[list[PerExample], dict[str, Any]]:
    """Gradients of batches of several sizes and lengths, and what the compiler counted."""
    from torch._dynamo.utils import counters

    network, examples = network_of(job), examples_of(job)
    gradients = PerExampleGradients(network)
    torch._dynamo.reset()
    counters.clear()
    batches = [examples[:size] for size in (7, 3, 5)]
    found = [gradients.of(batch, hidden) for batch in batches for hidden in (None, hidden_of(network, batch))]
    return found, {name: dict(counters[name]) for name in ("graph_break", "frames", "stats")}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_network_has_no_graph_break_and_the_same_gradients(
    seven: Job, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    wanted, nothing = recorded(seven)
    assert not nothing["frames"]
    got, counted = recorded(seven.replace(train={"compile": True, "checkpointing": checkpointing}))
    assert not counted["graph_break"]
    assert counted["frames"]["ok"] == counted["frames"]["total"] > 0
    for one, other in zip(got, wanted, strict=True):
        assert_close(one.gradients, other.gradients)
