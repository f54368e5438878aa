"""What a site answers by each rule, rank and codec, and what it keeps from one round for the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.client.rounds import by_hand
from tests.client.sites import PRIVATE, Records, numbers, plan_of, request, site_of, trainer_of

from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.site import LOST, Site
from cotune.client.training import Trainer
from cotune.shared.adapter import Layout, Vector, nested
from cotune.shared.aggregation import CONTROL, OFFSET_A, OFFSET_B, RULES, A, B, returned
from cotune.shared.codec import decode, encode
from cotune.shared.errors import CotuneError
from cotune.shared.job import Job
from cotune.shared.methods import initial_values, read
from cotune.shared.schedule import public_seed, rates_of
from cotune.shared.update import AdapterUpdate

SEEDED = {**PRIVATE, "noise": "test"}  # the same job gives the same noise
FULL = {"records_per_site": 30}  # with a batch of thirty: every record, every step


def state_of(job: Job, trainer: Trainer, seed: int = 3) -> dict[str, Vector]:
    """A global state in the middle of a run: frozen parts as they began, all else other than zero."""
    random, layout = np.random.default_rng(seed), trainer.layout

    def moved(shape: tuple[int, ...]) -> Vector:
        return (random.normal(size=shape) * 0.05).astype(np.float32)

    state = {**initial_values(layout, job.run.seed), **{name: moved(layout.shapes[name]) for name in layout.trained}}
    if job.rule.offset:
        for name in [name for name in layout.shapes if A in name]:
            state[name.replace(A, OFFSET_A)] = moved((3, layout.shapes[name][1]))
            state[name.replace(A, OFFSET_B)] = moved((layout.shapes[name.replace(A, B)][0], 3))
    if job.train.scaffold:
        state |= {name + CONTROL: moved(layout.shapes[name]) for name in layout.trained}
    return state


def ask(site: Site, trainer: Trainer, job: Job, state: dict[str, Vector], number: int = 1) -> AdapterUpdate:
    """One round of a site."""
    return site.train(*request(job, trainer, state, number), trainer, lambda _step: None)


def reopened(site: Site) -> Site:
    """The same site after a restart."""
    return Site(Guard(SiteHome.open(site.guard.home.path)), site.data, None)


def memory(site: Site, before: int) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in site.guard.home.updates.memory("run-1", before).items()}


def up(job: Job, trainer: Trainer, number: int) -> Layout:
    """What an update of a round holds."""
    return returned(job.rule, trainer.layout.at_rank(job.rank_of("site-1")), number, job.run.rounds)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.personal])
def test_by_every_rule_the_update_is_what_was_trained_minus_what_came(make_job: Any, rule: str) -> None:
    job = make_job(privacy=SEEDED, aggregation={"rule": rule})
    trainer, site = trainer_of(job), site_of(job)
    base = {n: p.detach().clone() for n, p in trainer.network.adapted.named_parameters() if ".lora_" not in n}
    state = state_of(job, trainer)
    for number in (1, 2):
        update, part = ask(site, trainer, job, state, number), up(job, trainer, number)
        delta = part.unflatten(numbers(update))
        assert all(delta[name].all() for name in part.trained)
        if not job.rule.core:
            now = read(trainer.network.adapted)
            assert all((delta[name] == now[name] - state[name]).all() for name in part.trained)
            moved = {name for name in now if (now[name] != state[name]).any()}
            assert moved == set(part.trained), "what does not travel does not move"
        after = dict(trainer.network.adapted.named_parameters())
        assert all(torch.equal(after[name], weight) for name, weight in base.items())


def test_a_site_at_a_smaller_rank_trains_vectors_of_that_rank_along_the_first_rows_of_a(make_job: Any) -> None:
    job = make_job(privacy=SEEDED, lora={"r": 4, "ranks": {"site-1": 1}})
    trainer = trainer_of(job)
    state = state_of(job, trainer)
    update = ask(site_of(job), trainer, job, nested(state, 1))
    inside, small = read(trainer.network.adapted), trainer.layout.at_rank(1)
    assert numbers(update).shape == (small.size,) and small.size * 4 == trainer.layout.size
    full = initial_values(trainer.layout, job.run.seed)
    assert all(inside[name].tobytes() == full[name][:1].tobytes() for name in full if A in name)
    moved = small.unflatten(numbers(update))
    assert all((moved[name] == inside[name] - state[name][:, :1]).all() and moved[name].all() for name in moved)


def test_a_small_site_and_a_whole_one_share_a_trainer_and_neither_shows_in_the_other(make_job: Any) -> None:
    job = make_job(privacy=SEEDED, aggregation={"rule": "product_svd"}, lora={"r": 4, "ranks": {"site-1": 2}})
    shared, names = trainer_of(job), ("site-1", "site-2", "site-1")
    state, together = state_of(job, shared), []
    sites = {name: site_of(job, name=name) for name in set(names)}
    for number, name in enumerate(names):
        arrays = nested(state, job.rank_of(name))
        plan, payload = request(job, shared, arrays, number // 2 + 1, name)
        together.append(sites[name].train(plan, payload, shared, int).payload)
    for number, name in ((0, "site-1"), (1, "site-2")):
        alone = trainer_of(job)
        plan, payload = request(job, alone, nested(state, job.rank_of(name)), 1, name)
        assert site_of(job, name=name).train(plan, payload, alone, int).payload.tobytes() == together[number].tobytes()
    assert [len(payload) for payload in together] == [len(together[0]), 2 * len(together[0]), len(together[0])]


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_a_round_starts_from_the_adapter_as_it_was_decoded(make_job: Any, codec: str) -> None:
    job = make_job(privacy={"level": "none"}, transport={"codec_down": codec})
    trainer = trainer_of(job)
    state = state_of(job, trainer)
    plan, payload = request(job, trainer, state)
    assert len(payload) < 3 * trainer.layout.size
    decoded = decode(payload, codec, trainer.layout.size)
    assert (decoded != trainer.layout.flatten(state)).any()
    update = site_of(job).train(plan, payload, trainer, int)
    np.testing.assert_array_equal(numbers(update), trainer.layout.flatten(read(trainer.network.adapted)) - decoded)
    exact = plan_of(job, trainer.layout.flatten(state), trainer)
    with pytest.raises(CotuneError) as caught:
        site_of(job).train(exact, payload, trainer, int)
    assert (caught.value.code, "global adapter" in caught.value.message) == ("E-PLAN", True)


# What the codec lost


def lossy(job: Job, codec: str, *, feedback: bool = True) -> Job:
    return job.replace(transport={"codec_up": codec, "error_feedback": feedback})


def rounds_of(job: Job, order: tuple[int, ...]) -> tuple[Site, dict[int, AdapterUpdate]]:
    """One site's rounds, each by a new process; the global adapter does not move."""
    trainer, site = trainer_of(job), site_of(job)
    state, updates = state_of(job, trainer), dict[int, AdapterUpdate]()
    for number in order:
        site = reopened(site)
        updates[number] = ask(site, trainer, job, state, number)
    return site, updates


@pytest.mark.parametrize(
    ("codec", "rule"), [("int8", "ffa"), ("int4", "fed_sb"), ("topk", "fedavg_ab"), ("fp16", "alternating_steps")]
)
def test_the_next_update_carries_exactly_what_the_codec_lost(make_job: Any, codec: str, rule: str) -> None:
    plain = make_job(run={"rounds": 4}, privacy={**SEEDED, "epsilon": 9.0}, aggregation={"rule": rule})
    order = (1, 2, 4)  # the site is not asked in round 3
    exact = {number: numbers(update) for number, update in rounds_of(plain, order)[1].items()}
    job = lossy(plain, codec)
    site, updates = rounds_of(job, order)
    lost, said = np.zeros_like(exact[1]), []
    for number in order:
        carried = exact[number] + lost
        wanted = encode(carried, codec, public_seed(job, "up", "site-1", number))
        assert updates[number].payload.tobytes() == wanted.tobytes()
        said.append(decode(wanted, codec, lost.size))
        lost = carried - said[-1]
        assert lost.any()
        kept = site.guard.home.updates.memory("run-1", number + 1)
        assert {name: array.tobytes() for name, array in kept.items()} == {LOST: lost.tobytes()}
    np.testing.assert_allclose(sum(said) + lost, sum(exact.values()), rtol=1e-4, atol=1e-6)


def test_without_error_feedback_nothing_is_carried_or_kept(make_job: Any) -> None:
    plain = make_job(privacy=SEEDED)
    exact = {number: numbers(update) for number, update in rounds_of(plain, (1, 2))[1].items()}
    job = lossy(plain, "int8", feedback=False)
    site, updates = rounds_of(job, (1, 2))
    for number, update in updates.items():
        wanted = encode(exact[number], "int8", public_seed(job, "up", "site-1", number))
        assert update.payload.tobytes() == wanted.tobytes()
        assert memory(site, number + 1) == {}


def test_a_round_asked_for_again_gives_the_same_int8_bytes_and_leaves_what_is_carried_alone(make_job: Any) -> None:
    """With secret noise a round that was trained anew, or encoded anew, would show."""
    job = lossy(make_job(privacy=PRIVATE), "int8")
    trainer, site = trainer_of(job), site_of(job)
    state = state_of(job, trainer)
    first = ask(site, trainer, job, state, 1)
    carried = memory(site, 2)
    second = ask(site, trainer, job, state, 2)
    for number, given in ((1, first), (2, second), (1, first)):
        again = ask(reopened(site), trainer, job, state, number)
        assert again.payload.tobytes() == given.payload.tobytes()
        assert again.header.update_sha256 == given.header.update_sha256
        assert memory(site, 2) == carried != memory(site, 3)


def test_a_round_that_was_lost_and_trained_again_carries_the_loss_once(make_job: Any) -> None:
    job = lossy(make_job(privacy={**SEEDED, "epsilon": 9.0}), "int8")
    trainer, wanted = trainer_of(job), rounds_of(job, (1, 2))[1][2]
    site, state = site_of(job), state_of(job, trainer)

    def die(_step: int) -> None:
        raise MemoryError

    ask(site, trainer, job, state, 1)
    with pytest.raises(MemoryError):
        site.train(*request(job, trainer, state, 2), trainer, die)
    again = ask(reopened(site), trainer, job, state, 2)
    assert again.payload.tobytes() == wanted.payload.tobytes()
    assert (again.header.charges, wanted.header.charges) == (2, 1)


# SCAFFOLD


@pytest.mark.parametrize(("schedule", "rule"), [("constant", "fedavg_ab"), ("linear", "ffa")])
def test_scaffold_over_rounds_is_the_algorithm_written_out(make_job: Any, schedule: str, rule: str) -> None:
    """Karimireddy et al. 2020, algorithm 1, option II: c_i <- c_i - c + (x - y_i) / (sum of rates)."""
    train = {"batch_size": 30, "local_steps": 3, "learning_rate": 0.2, "scaffold": True, "schedule": schedule}
    open_ = {"level": "none"}
    job = make_job(run={"rounds": 4}, privacy=open_, data=FULL, train=train, aggregation={"rule": rule})
    trainer, site = trainer_of(job), site_of(job, Records(30))
    examples = site.data.load(job, "site-1", site.guard.home.policy.dataset[0]).examples
    own = {name: np.zeros(trainer.layout.shapes[name], dtype=np.float32) for name in trainer.layout.trained}
    for number in (1, 2, 4):  # not asked in round 3
        state = state_of(job, trainer, seed=number)
        correction = {name: state[name + CONTROL] - own[name] for name in own}
        start = {name: array for name, array in state.items() if CONTROL not in name}
        wanted = by_hand(job, number, start, correction, examples)
        delta = trainer.layout.unflatten(numbers(ask(reopened(site), trainer, job, state, number)))
        own = {n: own[n] - state[n + CONTROL] + (start[n] - wanted[n]) / sum(rates_of(job, number)) for n in own}
        kept = site.guard.home.updates.memory("run-1", number + 1)
        assert set(kept) == {name + CONTROL for name in own}
        for name in own:
            np.testing.assert_allclose(delta[name], wanted[name] - start[name], rtol=1e-3, atol=5e-6, err_msg=name)
            np.testing.assert_allclose(kept[name + CONTROL], own[name], rtol=1e-3, atol=5e-5, err_msg=name)


def test_a_round_asked_for_again_leaves_the_control_variate_alone(make_job: Any) -> None:
    job = make_job(run={"rounds": 3}, privacy=PRIVATE, train={"scaffold": True}, transport={"codec_up": "int8"})
    trainer, site = trainer_of(job), site_of(job)
    states = {number: state_of(job, trainer, seed=number) for number in (1, 2)}
    given = {number: ask(site, trainer, job, state, number) for number, state in states.items()}
    kept = {number: memory(site, number + 1) for number in states}
    assert kept[1] != kept[2] and set(kept[1]) == {name + CONTROL for name in trainer.layout.trained}
    for number in (2, 1, 2):
        again = ask(reopened(site), trainer, job, states[number], number)
        assert again.payload.tobytes() == given[number].payload.tobytes()
        assert {n: memory(site, n + 1) for n in states} == kept


# What is refused


def test_a_plan_of_another_rank_is_refused_before_any_record_is_read(make_job: Any) -> None:
    job, records = make_job(privacy=PRIVATE, lora={"r": 4, "ranks": {"site-1": 2}}), Records()
    trainer = trainer_of(job)
    state = state_of(job, trainer)
    for rank in (1, 3, 4):
        flat = trainer.layout.at_rank(rank).flatten(nested(state, rank))
        plan = plan_of(job, flat, trainer, rank=rank)
        with pytest.raises(CotuneError) as caught:
            site_of(job, records).train(plan, encode(flat, "fp32", 0), trainer, int)
        assert (caught.value.code, caught.value.exit_code) == ("E-PLAN", 6)
        assert "rank" in caught.value.message
    assert not records.asked
    assert numbers(ask(site_of(job, records), trainer, job, nested(state, 2))).any()


@pytest.mark.parametrize("rule", [rule for rule, facts in RULES.items() if not facts.offset])
def test_a_plan_that_adds_to_the_base_weights_by_a_rule_that_does_not_is_refused(make_job: Any, rule: str) -> None:
    """The site allowed a model by its hash; other weights come with a rule that says so, and by no back door."""
    job, records = make_job(privacy=PRIVATE, aggregation={"rule": rule}), Records()
    trainer = trainer_of(job)
    layout = trainer.layout
    extra = {n.replace(A, OFFSET_A): np.ones((1, shape[1]), np.float32) for n, shape in layout.shapes.items() if A in n}
    extra |= {
        n.replace(B, OFFSET_B): np.ones((shape[0], 1), np.float32) for n, shape in layout.shapes.items() if B in n
    }
    with pytest.raises(CotuneError) as caught:
        ask(site_of(job, records), trainer, job, {**state_of(job, trainer), **extra})
    assert (caught.value.code, "base weights" in caught.value.message) == ("E-PLAN", True)
    assert not records.asked


def test_training_that_leaves_the_finite_numbers_is_said_and_gives_no_update(make_job: Any) -> None:
    job = make_job(privacy={**PRIVATE, "clipping_norm": 1e3}, train={"learning_rate": 3e38})
    trainer, site = trainer_of(job), site_of(job)
    with pytest.raises(CotuneError) as caught:
        ask(site, trainer, job, state_of(job, trainer))
    assert (caught.value.code, caught.value.param) == ("E-DIVERGED", "train.learning_rate")
    assert [entry.action for entry in site.guard.home.ledger.entries][-1] == "budget.reserve", "it stays charged"
    assert site.guard.home.updates.read("run-1", 1) is None
