"""Per-example gradients are exactly each example's own, and a model that would mix examples is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.client import oracles
from tests.client.oracles import OWNERS, assert_close, examples_of, hidden_of, network_of
from torch import Tensor, nn

from cotune.client.clipping import sum_by_unit
from cotune.client.gradients import PerExampleGradients, PerExampleLinear
from cotune.shared.errors import ModelError
from cotune.shared.examples import Example
from cotune.shared.job import Job
from cotune.shared.methods import layout, quiet_peft
from cotune.shared.model import load_model, locate
from cotune.shared.network import Network


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


def refused(network: Network) -> ModelError:
    with pytest.raises(ModelError) as caught:
        PerExampleGradients(network)
    return caught.value


def test_gradients_equal_autograd_on_one_example_at_a_time(job: Job) -> None:
    examples = examples_of(job)
    assert len({len(e.ids) for e in examples}) > 1
    wanted = oracles.one_by_one(network_of(job), [[e] for e in examples])
    network = network_of(job)
    for hidden in (None, hidden_of(network, examples)):
        got = PerExampleGradients(network).of(examples, hidden)
        assert_close(got.gradients, wanted)
        assert {g.dtype for g in (*got.gradients.values(), got.losses)} == {torch.float32}


def test_a_persons_gradient_equals_autograd_on_that_persons_examples(job: Job) -> None:
    examples = examples_of(job)
    wanted = oracles.one_by_one(network_of(job), oracles.persons(examples))
    gradients = PerExampleGradients(network_of(job))
    assert_close(sum_by_unit(gradients.of(examples, None), OWNERS, 3).gradients, wanted)
    parts = [sum_by_unit(gradients.of(examples[own], None), OWNERS[own], 3) for own in (slice(4), slice(4, 7))]
    assert_close((parts[0] + parts[1]).gradients, wanted)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gradients_of_examples_and_persons_equal_those_of_opacus(job: Job) -> None:
    examples, ours = examples_of(job), network_of(job)
    wanted = oracles.of_opacus(network_of(job), examples)
    got = PerExampleGradients(ours).of(examples, hidden_of(ours, examples))
    assert_close(got.gradients, wanted)
    assert_close(sum_by_unit(got, OWNERS, 3).gradients, oracles.summed(wanted))


def test_losses_are_the_networks_own_and_carry_no_graph(job: Job) -> None:
    network, examples = network_of(job), examples_of(job)
    wanted = torch.cat([network.losses([example], None) for example in examples]).detach()
    got = PerExampleGradients(network).of(examples, None).losses
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not got.requires_grad


def test_the_trained_tensors_are_those_the_layout_sends_in_its_order(job: Job) -> None:
    network = network_of(job)
    gradients = PerExampleGradients(network).of(examples_of(job, 2), None).gradients
    assert tuple(gradients) == layout(network.adapted, job.rule).trained
    if job.task.kind == "classify":
        assert any(name.endswith("classifier.weight") for name in gradients)
        assert any(name.endswith("classifier.bias") for name in gradients)


def test_an_examples_gradient_does_not_depend_on_who_is_beside_it(job: Job) -> None:
    network, examples = network_of(job), examples_of(job)
    gradients = PerExampleGradients(network)
    alone = gradients.of(examples[2:3], None).gradients
    for beside in (examples, [examples[0], examples[0], examples[2]]):
        assert_close({name: g[2:3] for name, g in gradients.of(beside, None).gradients.items()}, alone)


def test_nan_in_one_example_stays_in_its_own_slice(seven: Job) -> None:
    network, examples = network_of(seven), examples_of(seven)
    hidden = network.encode(examples)
    spoilt = [h * np.float32("nan") if i == 2 else h for i, h in enumerate(hidden)]
    good, bad = (PerExampleGradients(network).of(examples, values) for values in (hidden, spoilt))
    others = [0, 1, 3, 4, 5, 6]
    pick = {name: (bad.gradients[name][others], good.gradients[name][others]) for name in good.gradients}
    assert_close({n: one for n, (one, _) in pick.items()}, {n: other for n, (_, other) in pick.items()}, 1e-6)
    assert any(not bool(torch.isfinite(g[2]).all()) for g in bad.gradients.values())


def test_no_batch_gradient_is_left_behind_and_the_layers_work_as_before(job: Job) -> None:
    network, examples = network_of(job), examples_of(job)
    before = network.losses(examples, None).detach()
    gradients = PerExampleGradients(network)
    gradients.of(examples, None)
    assert [n for n, p in network.adapted.named_parameters() if p.grad is not None] == []
    assert torch.equal(network.losses(examples, None).detach(), before)
    assert all(len(g) == 1 for g in gradients.of(examples[:1], None).gradients.values())


def test_a_step_that_fails_leaves_plain_layers(seven: Job) -> None:
    network, examples = network_of(seven), examples_of(seven)
    gradients = PerExampleGradients(network)
    with pytest.raises(IndexError):
        gradients.of([Example((10_000,) * 4, 1)], None)
    assert torch.isfinite(network.losses(examples, None)).all()


def test_a_network_can_be_instrumented_again(job: Job) -> None:
    network, examples = network_of(job), examples_of(job)
    first, second = (PerExampleGradients(network).of(examples, None).gradients for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_no_loss_depends_on_has_a_zero_gradient(make_job: Any) -> None:
    whole, top = make_job(lora={"last_layers": "all"}), make_job(lora={"last_layers": 2})
    network = Network(network_of(whole).adapted, top)
    examples = examples_of(top)
    gradients = PerExampleGradients(network).of(examples, network.encode(examples)).gradients
    unused = [n for n in gradients if ".layers.0." in n or ".layers.1." in n]
    assert len(unused) == 4
    for name, gradient in gradients.items():
        assert bool((gradient == 0).all()) == (name in unused)


def test_what_examples_say_is_never_printed(seven: Job) -> None:
    found = PerExampleGradients(network_of(seven)).of(examples_of(seven, 2), None)
    for value in (found, sum_by_unit(found, [0, 0], 1)):
        assert "tensor" not in repr(value)


def test_leaves_are_all_that_the_backward_pass_reaches(seven: Job) -> None:
    network = network_of(seven)
    found: dict[str, Tensor] = PerExampleGradients(network).of(examples_of(seven, 2), None).gradients
    assert all(not gradient.requires_grad and gradient.is_contiguous() for gradient in found.values())


# What is refused


def test_two_layers_sharing_a_parameter_are_refused(make_job: Any) -> None:
    network = network_of(make_job())
    layers = network.inner.model.layers
    shared = layers[2].self_attn.q_proj.lora_B["default"].weight
    layers[3].self_attn.q_proj.lora_B["default"].weight = shared
    assert refused(network).code == "E-LORA-TIED"


def test_one_trained_module_in_two_places_is_refused(make_job: Any) -> None:
    network = network_of(make_job())
    layers = network.inner.model.layers
    layers[3].self_attn.q_proj.lora_B = layers[2].self_attn.q_proj.lora_B
    refused(network)


def test_a_trained_parameter_outside_linear_layers_is_refused(make_job: Any) -> None:
    from peft import LoraConfig, get_peft_model

    job = make_job()
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    with quiet_peft():
        network = Network(get_peft_model(load_model(locate(job), job), config), job)
    error = refused(network)
    assert error.code == "E-LORA-LAYER"
    assert "norm.weight" in error.message


def test_a_network_without_trained_parameters_is_refused(make_job: Any) -> None:
    network = network_of(make_job())
    network.adapted.requires_grad_(False)
    assert refused(network).code == "E-LORA-NONE"


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_batch_norm_over_the_batch_is_refused(make_job: Any, kind: Any) -> None:
    network = network_of(make_job())
    network.inner.model.extra = kind(4).eval()
    PerExampleGradients(network)  # with kept statistics, examples do not meet
    network.inner.model.extra.train()
    assert refused(network).code == "E-LORA-MIX"
    network.inner.model.extra = kind(4, track_running_stats=False).eval()
    error = refused(network)
    assert (error.code, error.param) == ("E-LORA-MIX", "model.base")
    assert "extra" in error.message


@pytest.mark.parametrize("setting", ["output_router_logits", "expert_capacity"])
def test_a_mixture_of_experts_with_a_loss_or_a_limit_over_the_batch_is_refused(make_job: Any, setting: str) -> None:
    network = network_of(make_job())
    setattr(network.inner.config, setting, False)
    PerExampleGradients(network)
    setattr(network.inner.config, setting, True)
    error = refused(network)
    assert error.code == "E-LORA-MIX"
    assert setting in error.message


def test_a_model_in_which_examples_meet_by_other_ways_is_refused(make_job: Any) -> None:
    network = network_of(make_job())
    layer = network.inner.model.layers[3].mlp
    handle = layer.register_forward_hook(lambda _layer, _given, out: out + 0.1 * out.mean(0, keepdim=True))
    error = refused(network)
    assert error.code == "E-LORA-MIX"
    assert "beside it" in error.message
    handle.remove()
    PerExampleGradients(network)


def test_a_model_whose_gradients_are_not_numbers_is_refused(make_job: Any) -> None:
    network = network_of(make_job())
    with torch.no_grad():
        network.inner.model.norm.weight[0] = torch.nan
    assert refused(network).code == "E-LORA-MIX"


# One layer


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5)], ids=["one vector", "tokens"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_expanded_layer_computes_what_the_plain_layer_does(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(5, 2, bias=bias)
    x = torch.randn(shape)
    layer = PerExampleLinear(linear, pooled=True)
    assert torch.equal(layer(x), linear(x))
    layer.expand(3)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-6, atol=1e-6)
    assert set(layer.copies) == ({"weight", "bias"} if bias else {"weight"})
    layer.expand(0)
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("shape", [(3, 5), (12, 5), (4, 3, 5), (1, 3, 5), (3, 2, 2, 5)])
def test_a_layer_that_sees_all_tokens_in_one_list_is_refused(shape: tuple[int, ...]) -> None:
    layer = PerExampleLinear(nn.Linear(5, 2))
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 2)
    layer.expand(3)
    with pytest.raises(ModelError) as caught:
        layer(torch.randn(shape))
    assert caught.value.code == "E-LORA-MIX"
