"""What goes out: encoded once for a rank, named by the hash of what sites decode, with all they need and no more."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from tests.server.rounds import RANK, job_of, layout_of, state_of

from cotune.server.sending import offset_rank_of, sending
from cotune.shared.adapter import Vector, flat_sha256, nested
from cotune.shared.aggregation import CONTROL, OFFSET_A, OFFSET_B, returned, sent
from cotune.shared.codec import CODECS, decode, encoded_bytes
from cotune.shared.job import Job

LOSSY = [name for name, codec in CODECS.items() if not codec.lossless and name != "topk"]


def with_offset(state: Mapping[str, Vector], rank: int) -> dict[str, Vector]:
    random, shapes = np.random.default_rng(7), {}
    for module, out in (("m0", 5), ("m1", 9)):
        shapes |= {f"{module}{OFFSET_A}weight": (rank, 7), f"{module}{OFFSET_B}weight": (out, rank)}
    extra = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {**state, **extra}


def read(job: Job, payload: np.ndarray, rank: int, offset_rank: int = 0) -> tuple[dict[str, Vector], str]:
    """What a site of this rank reads, as `Site.train` does, and the hash it finds."""
    down = sent(job.rule, layout_of(job).at_rank(rank), offset_rank, job.train.scaffold)
    flat = decode(payload, job.transport.codec_down, down.size)
    return down.unflatten(flat), flat_sha256(flat)


@pytest.mark.parametrize("codec", ["fp32", *LOSSY])
@pytest.mark.parametrize("rank", [1, RANK])
def test_a_site_decodes_what_the_coordinator_says_it_starts_from(codec: str, rank: int) -> None:
    job = job_of(transport={"codec_down": codec}, aggregation={"rule": "fedavg_ab"})
    state = state_of(layout_of(job))
    made = sending(job, layout_of(job), state, rank, 2)
    arrays, sha256 = read(job, made.payload, rank)
    assert made.sha256 == sha256
    assert all(made.arrays[name].tobytes() == array.tobytes() for name, array in arrays.items())
    exact = nested(state, rank)
    assert made.arrays.keys() == exact.keys()
    different = [name for name in arrays if made.arrays[name].tobytes() != exact[name].tobytes()]
    assert bool(different) == (codec != "fp32")
    assert made.payload.nbytes == encoded_bytes(
        codec, sent(job.rule, layout_of(job).at_rank(rank), 0, controls=False).size
    )


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_not_sent_is_not_rounded(codec: str) -> None:
    job = job_of(transport={"codec_down": codec})
    state = state_of(layout_of(job))
    made = sending(job, layout_of(job), state, RANK, 1)
    for name in layout_of(job).shapes:
        assert (made.arrays[name].tobytes() == state[name].tobytes()) == (name not in layout_of(job).trained), name


def test_the_same_round_is_encoded_the_same_again_and_another_round_or_rank_otherwise() -> None:
    job = job_of(transport={"codec_down": "int4"}, aggregation={"rule": "fedavg_ab"})
    state = state_of(layout_of(job))
    first, again, later, other = (
        sending(job.replace(run={"seed": seed}), layout_of(job), state, RANK, number)
        for seed, number in ((17, 1), (17, 1), (17, 2), (18, 1))
    )
    assert first.payload.tobytes() == again.payload.tobytes()
    assert first.sha256 == again.sha256
    assert len({first.sha256, later.sha256, other.sha256}) == 3


def test_a_smaller_rank_is_sent_the_first_rows_of_a_and_columns_of_b() -> None:
    job = job_of(aggregation={"rule": "fedavg_ab"})
    state = state_of(layout_of(job))
    made = sending(job, layout_of(job), state, 2, 1)
    for module in ("m0", "m1"):
        np.testing.assert_array_equal(made.arrays[f"{module}.lora_A.weight"], state[f"{module}.lora_A.weight"][:2])
        np.testing.assert_array_equal(made.arrays[f"{module}.lora_B.weight"], state[f"{module}.lora_B.weight"][:, :2])
    assert made.up == returned(job.rule, layout_of(job).at_rank(2), 1, job.run.rounds)


@pytest.mark.parametrize(("rank", "offset_rank"), [(RANK, 4), (1, 4), (RANK, 1)])
def test_an_offset_is_sent_whole_at_every_rank_and_its_rank_is_said(rank: int, offset_rank: int) -> None:
    job = job_of(aggregation={"rule": "flora_stack"})
    state = with_offset(state_of(layout_of(job)), offset_rank)
    made = sending(job, layout_of(job), state, rank, 3)
    assert made.offset_rank == offset_rank_of(state) == offset_rank
    arrays, sha256 = read(job, made.payload, rank, offset_rank)
    assert sha256 == made.sha256
    for name in (name for name in state if "offset" in name):
        assert arrays[name].tobytes() == state[name].tobytes()
    assert not any("offset" in name for name in made.up.trained), "no site changes it"


def test_before_there_is_an_offset_its_rank_is_zero() -> None:
    job = job_of(aggregation={"rule": "fedex"})
    assert sending(job, layout_of(job), state_of(layout_of(job)), RANK, 1).offset_rank == 0


def test_control_variates_are_sent_with_the_adapter_and_do_not_come_back() -> None:
    job = job_of(train={"scaffold": True})
    layout, random = layout_of(job), np.random.default_rng(8)
    controls = {name + CONTROL: random.normal(size=layout.shapes[name]).astype(np.float32) for name in layout.trained}
    made = sending(job, layout, {**state_of(layout), **controls}, RANK, 1)
    arrays, _ = read(job, made.payload, RANK)
    assert {name for name in arrays if name.endswith(CONTROL)} == set(controls)
    assert all(arrays[name].tobytes() == array.tobytes() for name, array in controls.items())
    assert made.up == layout


@pytest.mark.parametrize(("number", "factor"), [(1, "lora_B"), (2, "lora_A")])
def test_where_factors_take_turns_both_are_sent_and_the_one_whose_turn_it_is_comes_back(
    number: int, factor: str
) -> None:
    job = job_of(aggregation={"rule": "alternating_rounds"})
    made = sending(job, layout_of(job), state_of(layout_of(job)), RANK, number)
    arrays, _ = read(job, made.payload, RANK)
    assert set(arrays) == set(layout_of(job).trained)
    assert {name.split(".")[1] for name in made.up.trained if "lora" in name} == {factor}
