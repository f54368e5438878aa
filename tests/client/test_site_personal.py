"""Sites that keep a B of their own: what leaves them, and when, and what they go on with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.client.rounds import by_hand
from tests.client.sites import PRIVATE, Records, numbers, site_of, trainer_of
from tests.client.test_site_rules import FULL, SEEDED, ask, memory, reopened, state_of, up

from cotune.shared.adapter import Vector
from cotune.shared.aggregation import A, B
from cotune.shared.job import Job
from cotune.shared.methods import initial_values, read

ROUNDS = 3


def job_of(make_job: Any, rule: str = "fedsa", **sections: Any) -> Job:
    return make_job(**{"run": {"rounds": ROUNDS}, "privacy": SEEDED, "aggregation": {"rule": rule}, **sections})


def test_a_leaves_every_round_and_b_in_the_last_alone(make_job: Any) -> None:
    job = job_of(make_job)
    trainer, site = trainer_of(job), site_of(job)
    for number in range(1, ROUNDS + 1):
        state, part = state_of(job, trainer, seed=number), up(job, trainer, number)
        delta = part.unflatten(numbers(ask(reopened(site), trainer, job, state, number)))
        now = read(trainer.network.adapted)
        assert all((delta[name] == now[name] - state[name]).all() for name in delta if A in name)
        kept = site.guard.home.updates.memory("run-1", number + 1)
        assert {name: array.tobytes() for name, array in kept.items()} == {n: now[n].tobytes() for n in now if B in n}
        returned = {name: array.tobytes() for name, array in delta.items() if B in name}
        assert returned == ({name: array.tobytes() for name, array in kept.items()} if number == ROUNDS else {})


def test_a_round_starts_from_the_shared_a_and_the_b_the_site_was_left_with(make_job: Any) -> None:
    """Full batches without noise, written out; not asked in the third round, it goes on with what it had."""
    train = {"batch_size": 30, "local_steps": 3, "learning_rate": 0.2, "proximal": 0.1}
    job = job_of(make_job, run={"rounds": 4}, privacy={"level": "none"}, data=FULL, train=train)
    trainer, site = trainer_of(job), site_of(job, Records(30))
    examples = site.data.load(job, "site-1", site.guard.home.policy.dataset[0]).examples
    own = {name: np.zeros(shape, dtype=np.float32) for name, shape in trainer.layout.shapes.items() if B in name}
    for number in (1, 2, 4):
        start: dict[str, Vector] = {**state_of(job, trainer, seed=number), **own}
        wanted = by_hand(job, number, start, examples=examples)
        ask(reopened(site), trainer, job, start, number)
        now = read(trainer.network.adapted)
        for name in now:
            np.testing.assert_allclose(now[name], wanted[name], rtol=1e-3, atol=5e-6, err_msg=name)
        own = site.guard.home.updates.memory("run-1", number + 1)
        assert all(own[name].any() for name in own)


def test_a_and_b_are_clipped_and_noised_together_as_where_both_are_shared(make_job: Any) -> None:
    """From the same start the steps are the same to the last bit: what is shared changes, not what is trained."""
    updates = {}
    for rule in ("fedsa", "fedavg_ab"):
        job = job_of(make_job, rule)
        trainer = trainer_of(job)
        update = ask(site_of(job), trainer, job, initial_values(trainer.layout, job.run.seed))
        updates[rule] = update.header, up(job, trainer, 1).unflatten(numbers(update)), read(trainer.network.adapted)
    (header, part, now), (other, whole, then) = updates["fedsa"], updates["fedavg_ab"]
    assert header.event == other.event, "and costs the same"
    assert part.keys() == {name for name in whole if A in name}
    assert all(part[name].tobytes() == whole[name].tobytes() for name in part)
    assert all(now[name].tobytes() == then[name].tobytes() for name in now)


@pytest.mark.parametrize("privacy", [PRIVATE, SEEDED], ids=["secret noise", "seeded noise"])
def test_a_round_asked_for_again_gives_the_same_bytes_and_leaves_the_sites_b_alone(make_job: Any, privacy: Any) -> None:
    job = job_of(make_job, privacy=privacy, transport={"codec_up": "int8"})
    trainer, site = trainer_of(job), site_of(job)
    states = {number: state_of(job, trainer, seed=number) for number in range(1, ROUNDS + 1)}
    given = {number: ask(site, trainer, job, state, number) for number, state in states.items()}
    kept = {number: memory(site, number + 1) for number in states}
    assert len({tuple(kept[number].values()) for number in kept}) == ROUNDS
    for number in (2, 1, 3, 2):
        again = ask(reopened(site), trainer, job, states[number], number)
        assert again.payload.tobytes() == given[number].payload.tobytes()
        assert {n: memory(site, n + 1) for n in states} == kept
