"""Per-example gradients are exactly each example's own, and no example ever counts for more than the norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from cotune.client.clipping import PerExampleGradients, PerExampleLinear, clipped_sum
from cotune.shared.errors import ModelError
from cotune.shared.examples import Example, tokenize
from cotune.shared.job import Job
from cotune.shared.methods import attach, layout, quiet_peft, read, trainable, write
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.privacy.mechanism import Mechanism
from cotune.shared.records import read_records

CLASSIFY = {"kind": "classify", "labels": ["cardio", "derma", "pulmo"]}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


def mechanism(norm: float = 1.0, *, private: bool = True) -> Mechanism:
    return Mechanism(
        sampling_probability=0.5,
        expected_batch_size=4,
        clipping_norm=norm,
        noise_multiplier=1.0,
        private=private,
    )


def network_of(job: Job) -> Network:
    """The job's network, with an adapter in which nothing is zero."""
    network = Network(attach(load_model(locate(job), job), job), job)
    random = np.random.default_rng(5)
    values = {name: random.normal(size=a.shape) * 0.1 for name, a in read(network.adapted).items()}
    write(network.adapted, {name: value.astype(np.float32) for name, value in values.items()})
    return network


def examples_of(job: Job, count: int = 7) -> list[Example]:
    """Examples of several lengths, so that some of a batch are padded."""
    records = read_records(Path(str(job.data.train)))[:count]
    whole = tokenize(records, load_tokenizer(locate(job)), job)
    return [Example(e.ids[i % 5 :], max(0, e.start - i % 5), e.label) for i, e in enumerate(whole)]


@pytest.fixture(params=["B, lower layers kept", "A and B, lower layers kept", "A and B, all layers", "head"])
def job(request: pytest.FixtureRequest, make_job: Any, tiny_encoder: Path) -> Job:
    """Every way of training that there is."""
    match request.param:
        case "B, lower layers kept":
            return make_job()
        case "A and B, lower layers kept":
            return make_job(lora={"freeze_a": False})
        case "A and B, all layers":
            modules = ["q_proj", "v_proj", "o_proj", "down_proj"]
            return make_job(lora={"freeze_a": False, "last_layers": "all", "target_modules": modules})
        case _:
            return make_job(
                model={"base": str(tiny_encoder)},
                task=CLASSIFY,
                lora={"freeze_a": False, "target_modules": ["query", "value"]},
            )


def hidden_of(network: Network, examples: list[Example]) -> list[Any] | None:
    return network.encode(examples) if network.splits else None


def one_by_one(network: Network, examples: list[Example]) -> dict[str, Tensor]:
    """The reference: plain autograd on one example after the other, none of them padded."""
    found: dict[str, list[Tensor]] = {name: [] for name in trainable(network.adapted)}
    for example in examples:
        network.losses([example], None).sum().backward()
        for name, parameter in trainable(network.adapted).items():
            found[name].append(parameter.grad.clone())
            parameter.grad = None
    return {name: torch.stack(grads) for name, grads in found.items()}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, reference in wanted.items():
        size = reference.flatten(1).norm(dim=1).clamp(min=1e-6)
        error = (got[name] - reference).flatten(1).norm(dim=1) / size
        assert got[name].shape == reference.shape
        assert got[name].dtype == torch.float32
        assert float(error.max()) <= tolerance, name
        assert float(size.min()) > 1e-6, f"{name}: nothing to compare"


def test_gradients_equal_autograd_on_one_example_at_a_time(job: Job) -> None:
    examples = examples_of(job)
    assert len({len(e.ids) for e in examples}) > 1
    wanted = one_by_one(network_of(job), examples)
    network = network_of(job)
    assert_close(PerExampleGradients(network).of(examples, None), wanted)
    if network.splits:
        hidden = hidden_of(network, examples)
        assert_close(PerExampleGradients(network).of(examples, hidden), wanted)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gradients_equal_those_of_opacus(job: Job) -> None:
    from opacus import GradSampleModule

    examples, theirs = examples_of(job), network_of(job)
    theirs.adapted.train()  # no layer here has dropout, and Opacus' hooks only work then
    GradSampleModule(theirs.adapted, loss_reduction="sum", strict=False)
    theirs.losses(examples, hidden_of(theirs, examples)).sum().backward()
    wanted = {name: p.grad_sample.detach() for name, p in trainable(theirs.adapted).items()}
    ours = network_of(job)
    assert_close(PerExampleGradients(ours).of(examples, hidden_of(ours, examples)), wanted)


def test_the_trained_tensors_are_those_the_layout_sends_in_its_order(job: Job) -> None:
    network = network_of(job)
    gradients = PerExampleGradients(network).of(examples_of(job, 2), None)
    assert tuple(gradients) == layout(network.adapted).trained
    if job.task.kind == "classify":
        assert any(name.endswith("classifier.weight") for name in gradients)
        assert any(name.endswith("classifier.bias") for name in gradients)


def test_an_examples_gradient_does_not_depend_on_who_is_beside_it(job: Job) -> None:
    network, examples = network_of(job), examples_of(job)
    gradients = PerExampleGradients(network)
    together, alone = gradients.of(examples, None), gradients.of(examples[2:3], None)
    assert_close({name: g[2:3] for name, g in together.items()}, alone)
    others = gradients.of([examples[0], examples[0], examples[2]], None)
    assert_close({name: g[2:3] for name, g in others.items()}, alone)


def test_nan_in_one_example_stays_in_its_own_slice(make_job: Any) -> None:
    job = make_job(lora={"freeze_a": False})
    network, examples = network_of(job), examples_of(job)
    hidden = network.encode(examples)
    good = PerExampleGradients(network).of(examples, hidden)
    bad = PerExampleGradients(network).of(
        examples, [h * np.float32("nan") if i == 2 else h for i, h in enumerate(hidden)]
    )
    others = [0, 1, 3, 4, 5, 6]
    assert_close({n: g[others] for n, g in bad.items()}, {n: g[others] for n, g in good.items()}, 1e-6)
    assert any(not bool(torch.isfinite(g[2]).all()) for g in bad.values())
    kept = clipped_sum(bad, mechanism())
    assert np.isfinite(kept).all()
    np.testing.assert_allclose(kept, clipped_sum({n: g[others] for n, g in good.items()}, mechanism()), atol=1e-7)


def test_no_batch_gradient_is_left_behind_and_the_layers_work_as_before(job: Job) -> None:
    network, examples = network_of(job), examples_of(job)
    before = network.losses(examples, None).detach()
    gradients = PerExampleGradients(network)
    gradients.of(examples, None)
    assert [n for n, p in network.adapted.named_parameters() if p.grad is not None] == []
    assert torch.equal(network.losses(examples, None).detach(), before)
    one = gradients.of(examples[:1], None)
    assert all(len(g) == 1 for g in one.values())


def test_a_network_can_be_instrumented_again(job: Job) -> None:
    network, examples = network_of(job), examples_of(job)
    first = PerExampleGradients(network).of(examples, None)
    second = PerExampleGradients(network).of(examples, None)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_no_loss_depends_on_has_a_zero_gradient(make_job: Any) -> None:
    whole, top = make_job(lora={"last_layers": "all"}), make_job(lora={"last_layers": 2})
    network = Network(network_of(whole).adapted, top)
    examples = examples_of(top)
    gradients = PerExampleGradients(network).of(examples, network.encode(examples))
    unused = [n for n in gradients if ".layers.0." in n or ".layers.1." in n]
    assert len(unused) == 4
    for name, gradient in gradients.items():
        assert bool((gradient == 0).all()) == (name in unused)


def test_two_layers_sharing_a_parameter_are_refused(make_job: Any) -> None:
    network = network_of(make_job())
    layers = network.inner.model.layers
    shared = layers[2].self_attn.q_proj.lora_B["default"].weight
    layers[3].self_attn.q_proj.lora_B["default"].weight = shared
    with pytest.raises(ModelError) as caught:
        PerExampleGradients(network)
    assert caught.value.code == "E-LORA-TIED"


def test_one_trained_module_in_two_places_is_refused(make_job: Any) -> None:
    network = network_of(make_job())
    layers = network.inner.model.layers
    layers[3].self_attn.q_proj.lora_B = layers[2].self_attn.q_proj.lora_B
    with pytest.raises(ModelError):
        PerExampleGradients(network)


def test_a_trained_parameter_outside_linear_layers_is_refused(make_job: Any) -> None:
    from peft import LoraConfig, get_peft_model

    job = make_job()
    model = load_model(locate(job), job)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    with quiet_peft():
        network = Network(get_peft_model(model, config), job)
    with pytest.raises(ModelError) as caught:
        PerExampleGradients(network)
    assert caught.value.code == "E-LORA-LAYER"
    assert "norm.weight" in caught.value.message


def test_a_network_without_trained_parameters_is_refused(make_job: Any) -> None:
    network = network_of(make_job())
    network.adapted.requires_grad_(False)
    with pytest.raises(ModelError) as caught:
        PerExampleGradients(network)
    assert caught.value.code == "E-LORA-NONE"


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5)], ids=["one vector", "tokens"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_expanded_layer_computes_what_the_plain_layer_does(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(5, 2, bias=bias)
    x = torch.randn(shape)
    layer = PerExampleLinear(linear)
    assert torch.equal(layer(x), linear(x))
    layer.expand(3)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-6, atol=1e-6)
    assert set(layer.copies) == ({"weight", "bias"} if bias else {"weight"})
    layer.expand(0)
    assert torch.equal(layer(x), linear(x))


# The clipped sum

MAGNITUDES = st.one_of(
    st.floats(-1e3, 1e3, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1e-45, -1e-45, 1e-38, 3.4028234663852886e38, -3.4028234663852886e38, 1.0]),
)
NORMS = st.sampled_from([1e-6, 0.1, 1 / 3, 1.0, 7.3, 1e6])
MATRICES = st.integers(1, 6).flatmap(lambda n: arrays.arrays(np.float32, (n, 10), elements=MAGNITUDES))
BROKEN = st.sampled_from([np.nan, np.inf, -np.inf])


def as_gradients(matrix: Any) -> dict[str, Tensor]:
    """Ten numbers an example as two parameters, one of them a matrix."""
    values = torch.from_numpy(np.array(matrix, dtype=np.float32))
    return {"a": values[:, :6].reshape(-1, 2, 3), "b": values[:, 6:]}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(matrix=MATRICES, norm=NORMS)
def test_no_single_example_ever_counts_for_more_than_the_clipping_norm(matrix: Any, norm: float) -> None:
    for row in matrix:
        counted = clipped_sum(as_gradients(row[None]), mechanism(norm))
        assert float(np.linalg.norm(counted)) <= norm


@settings(max_examples=300, deadline=None, derandomize=True)
@given(matrix=MATRICES, norm=NORMS, broken=st.none() | BROKEN, place=st.integers(0, 9))
def test_adding_or_removing_any_example_moves_the_sum_by_no_more_than_the_sensitivity(
    matrix: Any, norm: float, broken: float | None, place: int
) -> None:
    if broken is not None:
        matrix[0, place] = broken
    rule = mechanism(norm)
    whole = clipped_sum(as_gradients(matrix), rule)
    assert np.isfinite(whole).all()
    for row in range(len(matrix)):
        without = clipped_sum(as_gradients(np.delete(matrix, row, axis=0)), rule)
        assert float(np.linalg.norm(whole - without)) <= rule.sensitivity


@settings(max_examples=200, deadline=None, derandomize=True)
@given(matrix=MATRICES, norm=NORMS)
def test_clipping_only_shortens_and_only_what_is_too_long(matrix: Any, norm: float) -> None:
    for row in matrix:
        long = np.asarray(row, dtype=np.float64)
        length = float(np.linalg.norm(long))
        counted = clipped_sum(as_gradients(row[None]), mechanism(norm))
        if length <= norm * (1 - 2e-6):
            np.testing.assert_array_equal(counted, long)
        elif length > 0:
            np.testing.assert_allclose(counted, long * (norm / length), rtol=3e-6)


def test_the_check_of_the_bound_notices_a_norm_taken_per_parameter() -> None:
    gradients = as_gradients(np.full((1, 10), 5.0))
    by_part = [clipped_sum({name: g}, mechanism()) for name, g in gradients.items()]
    assert float(np.linalg.norm(np.concatenate(by_part))) > 1
    assert float(np.linalg.norm(clipped_sum(gradients, mechanism()))) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(matrix=MATRICES, broken=BROKEN, place=st.integers(0, 9), private=st.booleans())
def test_an_example_with_nan_or_infinity_counts_as_zero_and_leaves_the_others(
    matrix: Any, broken: float, place: int, private: bool
) -> None:
    rule = mechanism(private=private)
    spoilt = np.insert(matrix, 0, 1.0, axis=0)
    spoilt[0, place] = broken
    np.testing.assert_allclose(
        clipped_sum(as_gradients(spoilt), rule), clipped_sum(as_gradients(matrix), rule), rtol=1e-12
    )


@pytest.mark.parametrize("private", [True, False])
def test_no_example_gives_zero(private: bool) -> None:
    nothing = clipped_sum(as_gradients(np.zeros((0, 10))), mechanism(private=private))
    assert nothing.shape == (10,)
    assert not nothing.any()


def test_a_zero_gradient_stays_zero() -> None:
    assert not clipped_sum(as_gradients(np.zeros((3, 10))), mechanism()).any()


def test_without_privacy_nothing_is_scaled() -> None:
    matrix = np.random.default_rng(1).normal(size=(4, 10)).astype(np.float32) * 1e4
    got = clipped_sum(as_gradients(matrix), mechanism(1e-3, private=False))
    np.testing.assert_allclose(got, matrix.astype(np.float64).sum(0), rtol=1e-12)


def test_the_sum_is_flat_float64_in_the_order_of_the_parameters() -> None:
    matrix = np.arange(10, dtype=np.float32)[None]
    got = clipped_sum(as_gradients(matrix), mechanism(1e3))
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, np.arange(10))


def test_splitting_a_batch_into_microbatches_does_not_change_the_sum(job: Job) -> None:
    network, examples = network_of(job), examples_of(job)
    gradients, rule = PerExampleGradients(network), mechanism(0.1)
    whole = clipped_sum(gradients.of(examples, None), rule)
    for size in (1, 2, 3):
        parts = [
            clipped_sum(gradients.of(examples[start : start + size], None), rule)
            for start in range(0, len(examples), size)
        ]
        np.testing.assert_allclose(np.sum(parts, axis=0), whole, atol=1e-6)
