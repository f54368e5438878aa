"""A core between frozen factors is clipped by its own gradient; an offset is in the base weights while it is used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.oracles import BERT, CLASSIFY, assert_close
from tests.client.rounds import OPEN, PRIVATE, by_person, examples_of, network_of, stream, train, trainer_of
from torch import Tensor
from torch.nn import functional

from cotune.client.data import SiteExamples
from cotune.client.gradients import PerExampleGradients
from cotune.client.leaves import Leaves, merged
from cotune.client.training import RoundResult, Start, Trainer
from cotune.shared.adapter import Vector
from cotune.shared.aggregation import CORE, OFFSET_A, OFFSET_B, A, B
from cotune.shared.examples import Example
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import initial_values, layout, read, trainable, write
from cotune.shared.network import Network
from cotune.shared.privacy.mechanism import Mechanism, mechanism_of

SB = {"rule": "fed_sb"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(params=["completion", "classify"])
def job(request: pytest.FixtureRequest, make_job: Any, tiny_encoder: Path) -> Job:
    """Jobs that train a core; a classifier trains its head beside it."""
    if request.param == "completion":
        return make_job(aggregation=SB, privacy=PRIVATE)
    changes = {"model": {"base": str(tiny_encoder)}, "task": CLASSIFY, "lora": {"target_modules": BERT}}
    return make_job(aggregation=SB, privacy=PRIVATE, **changes)


def somewhere(job: Job) -> dict[str, Vector]:
    """Orthonormal factors, and numbers other than zero in all that is trained."""
    shape, random = trainer_of(job).layout, np.random.default_rng(11)
    moved = {name: random.normal(size=shape.shapes[name]).astype(np.float32) * 0.3 for name in shape.trained}
    return {**initial_values(shape, job.run.seed), **moved}


class PlainCore:
    """The reference: every lora_B is B core of two tensors, and torch finds the core's gradient by itself."""

    def __init__(self, job: Job, arrays: dict[str, Vector]) -> None:
        self.network, self.leaves = network_of(job), dict[str, Tensor]()
        write(self.network.adapted, arrays)
        for path, module in self.network.adapted.named_modules():
            if not path.endswith(".lora_B.default"):
                continue
            name = f"{path.removesuffix('.default')}.weight"
            frozen, core = (torch.from_numpy(arrays[n].copy()) for n in (name, name.replace(B, CORE)))
            module.forward = lambda x, frozen=frozen, core=core: functional.linear(x, frozen @ core)
            self.leaves[name.replace(B, CORE)] = core.requires_grad_()
        self.leaves |= {n: p for n, p in trainable(self.network.adapted).items() if B not in n}

    def of(self, examples: list[Example]) -> dict[str, Tensor]:
        """The sum of the examples' gradients, each found alone."""
        for example in examples:
            self.network.losses([example], None).sum().backward()
        found = {name: leaf.grad.clone() for name, leaf in sorted(self.leaves.items()) if leaf.grad is not None}
        for leaf in self.leaves.values():
            leaf.grad = None
        return found


def test_a_cores_per_example_gradients_are_those_of_plain_autograd_on_the_core(job: Job) -> None:
    arrays, examples, network = somewhere(job), examples_of(job)[:7], network_of(job)
    write(network.adapted, arrays)
    shape, plain = layout(network.adapted, job.rule), PlainCore(job, arrays)
    assert sum(CORE in name for name in shape.trained) > 0 and not any(B in name for name in shape.trained)
    found = PerExampleGradients(network).of(examples, None).gradients
    got = Leaves(network.adapted, shape, arrays).gradients(found, shape.trained)
    alone = [plain.of([example]) for example in examples]
    assert tuple(got) == shape.trained
    assert_close(got, {name: torch.stack([each[name] for each in alone]) for name in shape.trained})


def round_of(trainer: Trainer, start: Start, data: SiteExamples, mechanism: Mechanism) -> RoundResult:
    return trainer.train_round(start, data, Features(trainer.network, data.examples), mechanism, stream(), int)


@pytest.mark.parametrize("microbatch", [1, 4, 64])
@pytest.mark.parametrize("norm", [1e-3, 0.05, 1e3])
def test_a_persons_rows_are_summed_and_clipped_by_the_norm_of_the_core(
    make_job: Any, microbatch: int, norm: float
) -> None:
    job = make_job(
        aggregation=SB,
        privacy={"noise_multiplier": 1.0, "delta": 1e-3, "clipping_norm": norm},
        train={"microbatch": microbatch, "local_steps": 1},
    )
    arrays, data = somewhere(job), by_person(examples_of(job))
    everybody = replace(mechanism_of(job), sampling_probability=1.0, noise_multiplier=1e-12)
    result = round_of(trainer_of(job), Start(1, arrays), data, everybody)
    plain, wanted = PlainCore(job, arrays), dict[str, Any]()
    for unit in range(data.units):
        own = plain.of([data.examples[row] for row in data.rows(unit)])
        length = torch.cat([gradient.flatten() for gradient in own.values()]).norm()
        wanted = {n: wanted.get(n, 0) + g * min(1.0, norm / float(length)) for n, g in own.items()}
    for name, total in wanted.items():
        moved = (arrays[name] - result.arrays[name]) * job.train.batch_size / job.train.learning_rate
        atol = max(3e-4 * float(total.abs().max()), 6e-6)  # what fp32 keeps of a small step on a core of 0.3
        np.testing.assert_allclose(moved, total.numpy(), rtol=2e-3, atol=atol, err_msg=name)


def test_after_a_round_the_network_computes_with_the_core_that_is_sent(job: Job) -> None:
    trainer, arrays, data = trainer_of(job), somewhere(job), by_person(examples_of(job))
    result = round_of(trainer, Start(1, arrays), data, mechanism_of(job))
    assert all((result.arrays[name] != arrays[name]).all() for name in trainer.layout.trained)
    inside = read(trainer.network.adapted)
    for name, value in inside.items():
        if A in name:
            assert value.tobytes() == arrays[name].tobytes(), "A is frozen"
        elif B in name:
            core = result.arrays[name.replace(B, CORE)]
            np.testing.assert_allclose(value, arrays[name] @ core, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(value, result.arrays[name])


# An offset


def offsets(network: Network, job: Job, rank: int = 3) -> dict[str, Vector]:
    """A frozen addition to the base weights of every adapted layer."""
    random, found = np.random.default_rng(12), dict[str, Vector]()
    for name, (_, inner) in layout(network.adapted, job.rule).shapes.items():
        if A not in name:
            continue
        outer = read(network.adapted)[name.replace(A, B)].shape[0]
        found[name.replace(A, OFFSET_A)] = random.normal(size=(rank, inner)).astype(np.float32) * 0.2
        found[name.replace(A, OFFSET_B)] = random.normal(size=(outer, rank)).astype(np.float32) * 0.2
    return found


def base_weights(network: Network) -> dict[str, Tensor]:
    """Copies of everything but the adapter."""
    return {n: p.detach().clone() for n, p in network.adapted.named_parameters() if ".lora_" not in n}


def add_by_hand(network: Network, job: Job, added: dict[str, Vector]) -> set[str]:
    """Put the offset into the base weights for good; names of the weights that were changed."""
    parameters, changed = dict(network.adapted.named_parameters()), set[str]()
    for name in (name for name in added if OFFSET_A in name):
        weight = f"{name.partition(OFFSET_A)[0]}.base_layer.weight"
        product = added[name.replace(OFFSET_A, OFFSET_B)].astype(np.float64) @ added[name].astype(np.float64)
        more = torch.from_numpy(job.lora.alpha / job.lora.r * product)
        parameters[weight].data = (parameters[weight].data.double() + more).to(parameters[weight].dtype)
        changed.add(weight)
    return changed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_offset_adds_s_b_a_and_is_taken_out_to_the_bit(make_job: Any, dtype: str) -> None:
    job = make_job(model={"dtype": dtype}, aggregation={"rule": "fedex"}, lora={"alpha": 3.0})
    network, reference = network_of(job), network_of(job)
    added, before = offsets(network, job), base_weights(network)
    changed = add_by_hand(reference, job, added)
    assert len(changed) == 4
    with merged(network.adapted, added):
        inside, wanted = base_weights(network), base_weights(reference)
        for name, weight in wanted.items():
            torch.testing.assert_close(inside[name], weight, rtol=1e-6 if dtype == "float32" else 8e-3, atol=1e-6)
            assert torch.equal(inside[name], before[name]) == (name not in changed)
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(network).items())


def test_base_weights_come_back_also_when_the_round_fails(make_job: Any) -> None:
    job = make_job(aggregation={"rule": "fedex"})
    network = network_of(job)
    added, before = offsets(network, job), base_weights(network)
    broken = {**added, "base_model.model.model.layers.2.self_attn.q_proj.offset_A.other": np.zeros((1, 1), np.float32)}
    for arrays, error in ((added, MemoryError), (broken, KeyError)):
        with pytest.raises(error), merged(network.adapted, arrays):
            raise MemoryError
        assert all(torch.equal(weight, before[name]) for name, weight in base_weights(network).items())


def test_a_round_with_an_offset_is_the_round_of_a_model_that_has_it_in_its_weights(make_job: Any) -> None:
    job = make_job(privacy=OPEN, aggregation={"rule": "fedex"}, train={"local_steps": 3})
    reference, trainer = network_of(job), trainer_of(job)
    added, before = offsets(trainer.network, job), base_weights(trainer.network)
    add_by_hand(reference, job, added)
    wanted = train(Trainer(reference, job, "0" * 64), job)
    data = SiteExamples(examples_of(job), np.arange(30), 30)
    start = Start(1, {**read(trainer.network.adapted), **added})
    got = round_of(trainer, start, data, mechanism_of(job)).arrays
    without = train(trainer_of(job), job)
    assert set(got) == set(trainer.layout.trained), "the offset is the coordinator's: no site changes it"
    for name in got:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=2e-6, err_msg=name)
        assert np.abs(got[name] - without[name]).max() > 1e-4, name
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(trainer.network).items())
