"""The round loop over sites that misbehave: named, left out, and without effect on the result."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import load_file
from tests.server.answers import head_of, key_of, update_of

from cotune.server import coordinator
from cotune.server.checkpoint import STATE, load_checkpoint
from cotune.server.conduct import conduct
from cotune.server.coordinator import Coordinator, Outcome
from cotune.server.evaluation import GlobalEvaluator
from cotune.server.fleet import Request
from cotune.shared.adapter import Vector, flat_sha256
from cotune.shared.aggregation import returned
from cotune.shared.chain import SignedHead, head_message, next_line, read_chain
from cotune.shared.errors import CotuneError, RunFailed, StorageError
from cotune.shared.methods import initial_values, layout_of
from cotune.shared.model import locate
from cotune.shared.plan import LedgerRequest, RoundPlan
from cotune.shared.planning import resolve
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.runs import RunFolder, create_run
from cotune.shared.signing import public_key_line, sign
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure

Answerer = Callable[[RoundPlan, Vector], Answer | list[Answer]]
NAMES = ("site-1", "site-2", "site-3")
ROUNDS = 2
KEY = Ed25519PrivateKey.generate()  # of nobody
EXPECTED: dict[str, dict[str, bytes]] = {}  # results of honest sites, which do not depend on the test


def honest(plan: RoundPlan, adapter: Vector, delta: Vector | None = None, **changes: object) -> AdapterUpdate:
    """An update of the right form; its numbers depend on the site, the round and the adapter it starts from."""
    if delta is None:
        seed = [sum(plan.site.encode()), plan.round, int(flat_sha256(adapter)[:8], 16)]
        delta = np.random.default_rng(seed).standard_normal(adapter.size).astype(np.float32)
    return update_of(plan, delta, **changes)


class Sites:
    """A fleet in this process; each site has its own way to answer."""

    def __init__(self, answers: dict[str, Answerer], order: Sequence[str] | None = None) -> None:
        self.answers = answers
        self.order = order or sorted(answers)
        self.asked: list[RoundPlan] = []
        self.books: dict[str, bytes] = {}

    def sites(self) -> Sequence[str]:
        return sorted(self.answers)

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        by_site = {request.plan.site: request for request in requests}
        for site in (site for site in self.order if site in by_site):
            plan, payload = by_site[site]
            self.asked.append(plan)
            answers = self.answers[site](plan, payload.view("<f4").copy())
            yield from answers if isinstance(answers, list) else [answers]

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        for request in requests:
            if request.site in self.books:
                yield request.site, self.books[request.site]


@pytest.fixture
def start(make_job, tmp_path: Path):
    """Make a run; a second call makes another of the same job."""

    def make(out: Path | None = None, **sections: dict) -> RunFolder:
        merged: dict[str, dict] = {
            "run": {"rounds": ROUNDS},
            "privacy": {"noise_multiplier": 3.0},
            "eval": {"data": None},
            **sections,
        }
        return create_run(out or tmp_path / "runs", resolve(make_job(**merged)), b"")

    return make


def coordinate(run: RunFolder, fleet: Sites) -> Outcome:
    job = run.job()
    layout, config = layout_of(job, locate(job))
    return Coordinator(run, layout, config, GlobalEvaluator(job)).run(fleet)


def fleet(bad: Answerer | None = None, **more: object) -> Sites:
    return Sites({name: bad if bad and name == "site-2" else honest for name in NAMES}, **more)


def bits(outcome: Outcome) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in outcome.arrays.items()}


def expected(start: Callable[[], RunFolder], *names: str) -> dict[str, bytes]:
    """The result of these sites alone; computed once."""
    key = " ".join(names)
    if key not in EXPECTED:
        EXPECTED[key] = bits(coordinate(start(), Sites(dict.fromkeys(names, honest))))
    return EXPECTED[key]


def said(run: RunFolder, site: str) -> list[str]:
    return [event["message"] for event in run.events() if event["type"] == "site" and site in event["message"]]


def accounts(run: RunFolder) -> dict:
    return json.loads((run.privacy / "accountant.json").read_text())["sites"]


def test_the_order_in_which_sites_answer_does_not_change_a_bit(start) -> None:
    back = coordinate(start(), fleet(order=NAMES[::-1]))
    assert bits(back) == expected(start, *NAMES)
    assert bits(back) != expected(start, "site-1", "site-3")


def test_every_round_moves_the_adapter_by_the_mean_of_the_updates(start) -> None:
    run, sites = start(run={"rounds": 1}), fleet()
    outcome = coordinate(run, sites)
    job = run.job()
    layout = layout_of(job, locate(job))[0]
    flat = np.zeros(layout.size, dtype=np.float32)
    updates = [honest(plan, flat).delta("fp32", layout.size).astype(np.float64) for plan in sites.asked]
    assert layout.flatten(outcome.arrays) == pytest.approx(np.mean(updates, axis=0), abs=1e-6)


def crash(plan: RoundPlan, _adapter: Vector) -> Answer:
    return SiteFailure(site=plan.site, code="E-SITE-CRASH", message="failed (Flower code 0)")


def refuse(plan: RoundPlan, _adapter: Vector) -> Answer:
    return SiteFailure(site=plan.site, code="E-BUDGET", message="my budget is spent", exit_code=6)


def with_value(value: float, position: int = 0) -> Answerer:
    def answer(plan: RoundPlan, adapter: Vector) -> Answer:
        delta = np.zeros_like(adapter)
        delta[position] = value
        return honest(plan, adapter, delta)

    return answer


def changed(**changes: object) -> Answerer:
    return lambda plan, adapter: honest(plan, adapter, **changes)


def of_numbers(numbers: np.ndarray) -> Answerer:
    """An update whose payload is no bytes."""
    return lambda plan, adapter: AdapterUpdate(honest(plan, adapter).header, numbers)


def unsigned(plan: RoundPlan, adapter: Vector) -> Answer:
    update = honest(plan, adapter)
    return AdapterUpdate(update.header.model_copy(update={"signature": ""}), update.payload)


EVENT = {"kind": "dp-sgd", "sampling_probability": 1 / 3, "noise_multiplier": 0.01, "steps": 2}
BAD: dict[str, tuple[Answerer, str]] = {
    "NaN": (with_value(np.nan), "192 finite numbers"),
    "infinity": (with_value(-np.inf, 5), "192 finite numbers"),
    "a wrong shape": (lambda p, a: honest(p, a, np.ones(a.size + 1, np.float32)), "expected 768 bytes"),
    "a wrong type": (of_numbers(np.zeros(768)), "float64"),
    "the global adapter": (lambda p, a: honest(p, a, np.zeros_like(a)), "echoes the global adapter"),
    "no signature": (unsigned, "not signed"),
    "a changed signature": (changed(head=head_of("site-2", 1, KEY)), "not by its own key"),
    "a wrong hash": (changed(update_sha256="0" * 64), "hash"),
    "another event": (changed(event=EVENT), "than was planned"),
    "no event": (changed(event={}), "what was released"),
    "a huge norm": (with_value(1e20), "norm"),
    "another round": (changed(round=99), "another plan"),
    "another run": (changed(run_id="yesterday"), "another plan"),
    "another job": (changed(job_sha256="0" * 64), "another job"),
    "another adapter": (changed(base_sha256="0" * 64), "another"),
    "a crash": (crash, "failed"),
    "a refusal": (refuse, "budget"),
    "no answer at all": (lambda p, a: [], ""),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_is_named_and_the_result_is_that_without_the_site(start, kind: str) -> None:
    answer, words = BAD[kind]
    run = start()
    with_bad = coordinate(run, fleet(answer))
    assert bits(with_bad) == expected(start, "site-1", "site-3")
    assert "site-2" not in with_bad.traffic
    messages = said(run, "site-2")
    assert len(messages) == (ROUNDS if words else 0)
    assert all(words in message for message in messages)
    assert not said(run, "site-1")
    assert len(accounts(run)["site-2"]) == ROUNDS  # it was asked, so it is charged


def test_a_site_nobody_asked_is_named_and_not_counted(start) -> None:
    def with_stranger(plan: RoundPlan, adapter: Vector) -> list[Answer]:
        return [honest(plan, adapter), honest(plan, adapter, site="mallory")]

    run = start()
    outcome = coordinate(run, fleet(with_stranger))
    assert bits(outcome) == expected(start, *NAMES)
    assert all("nobody asked it" in message for message in said(run, "mallory"))
    assert len(said(run, "mallory")) == ROUNDS


def test_a_second_answer_of_a_site_is_named_and_not_counted(start) -> None:
    def twice(plan: RoundPlan, adapter: Vector) -> list[Answer]:
        return [honest(plan, adapter), honest(plan, adapter, np.ones_like(adapter))]

    run = start()
    outcome = coordinate(run, fleet(twice))
    assert bits(outcome) == expected(start, *NAMES)
    assert len(said(run, "site-2")) == ROUNDS


def test_too_few_sites_pause_the_run_and_it_goes_on_when_they_are_back(start) -> None:
    run = start(federation={"sites": 3, "min_sites": 3})
    with pytest.raises(RunFailed) as caught:
        conduct(run, fleet(crash), "test")
    assert (caught.value.code, caught.value.exit_code) == ("E-MIN-SITES", 1)
    assert "site-2" in caught.value.message
    assert run.run_id in (caught.value.hint or "")
    assert run.state()["status"] == "paused"
    assert run.state()["error"]["code"] == "E-MIN-SITES"
    outcome = coordinate(run, fleet())
    assert load_checkpoint(run) is not None
    assert {site: len(entries) for site, entries in accounts(run).items()} == dict.fromkeys(NAMES, ROUNDS)
    assert outcome.traffic.keys() == set(NAMES)


def test_a_run_every_site_refuses_ends_as_refused(start) -> None:
    run = start()
    with pytest.raises(CotuneError) as caught:
        conduct(run, Sites(dict.fromkeys(NAMES, refuse)), "test")
    assert (caught.value.code, caught.value.exit_code) == ("E-BUDGET", 6)
    assert run.state()["status"] == "failed"
    assert run.state()["error"]["exit_code"] == 6
    assert not run.adapter.exists()


def test_refusals_among_crashes_are_no_refusal_of_the_run(start) -> None:
    with pytest.raises(RunFailed) as caught:
        coordinate(start(), Sites({"site-1": refuse, "site-2": crash, "site-3": crash}))
    assert caught.value.code == "E-MIN-SITES"


def test_a_round_is_charged_before_any_site_is_asked(start) -> None:
    run = start()
    charged: list[int] = []

    def look(plan: RoundPlan, adapter: Vector) -> Answer:
        charged.append(len(accounts(run)[plan.site]))
        return honest(plan, adapter)

    coordinate(run, Sites(dict.fromkeys(NAMES, look)))
    assert charged == [number for number in range(1, ROUNDS + 1) for _ in NAMES]


def rounds_of(run: RunFolder) -> dict[str, list[int]]:
    return {site: [entry["round"] for entry in entries] for site, entries in accounts(run).items()}


def test_an_interruption_in_a_round_costs_nothing_and_changes_no_bit(start) -> None:
    def stop_in_round_2(plan: RoundPlan, adapter: Vector) -> Answer:
        if plan.round == 2:
            raise KeyboardInterrupt
        return honest(plan, adapter)

    whole = coordinate(start(run={"rounds": 3}), fleet())
    run = start(run={"rounds": 3})
    with pytest.raises(KeyboardInterrupt):
        conduct(run, fleet(stop_in_round_2), "test")
    assert run.state()["status"] == "cancelled"
    kept = load_checkpoint(run)
    assert kept is not None
    assert kept.round == 1
    sites = fleet()
    assert bits(coordinate(run, sites)) == bits(whole)
    assert sorted({plan.round for plan in sites.asked}) == [2, 3]
    assert rounds_of(run) == {name: [1, 2, 3] for name in NAMES}
    assert run.job().steps == sum(entry["event"]["steps"] for entry in accounts(run)["site-1"])


def test_a_run_interrupted_again_and_again_costs_no_more_and_ends_as_it_would_have(start) -> None:
    left = [1, 1, 2]  # rounds in which the next processes stop

    def stop(plan: RoundPlan, adapter: Vector) -> Answer:
        if left and plan.round == left[0]:
            left.pop(0)
            raise KeyboardInterrupt
        return honest(plan, adapter)

    run = start()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            coordinate(run, fleet(stop))
    assert bits(coordinate(run, fleet(stop))) == expected(start, *NAMES)
    assert rounds_of(run) == {name: [1, 2] for name in NAMES}
    rows = [(row["round"], row["site"]) for row in run.metrics() if row.get("site")]
    assert sorted(rows) == [(number, site) for number in (1, 2) for site in NAMES]


def test_a_damaged_newest_checkpoint_does_not_stop_the_run(start) -> None:
    def stop_in_round_3(plan: RoundPlan, adapter: Vector) -> Answer:
        if plan.round == 3:
            raise KeyboardInterrupt
        return honest(plan, adapter)

    whole = coordinate(start(run={"rounds": 4}), fleet())
    run = start(run={"rounds": 4})
    with pytest.raises(KeyboardInterrupt):
        coordinate(run, fleet(stop_in_round_3))
    (run.checkpoints / "round-00002" / STATE).write_bytes(b"")
    sites = fleet()
    assert bits(coordinate(run, sites)) == bits(whole)
    assert sorted({plan.round for plan in sites.asked}) == [2, 3, 4]
    again = load_checkpoint(run)
    assert again is not None
    assert again.round == 4
    assert rounds_of(run) == {name: [1, 2, 3, 4] for name in NAMES}


# What goes from round to round


def test_a_site_whose_update_was_not_used_is_told_why_in_its_next_plan_until_one_is(start) -> None:
    def wrong_in(*rounds: int) -> Answerer:
        return lambda p, a: honest(p, a, update_sha256="0" * 64) if p.round in rounds else honest(p, a)

    run, sites = start(run={"rounds": 4}), Sites({**dict.fromkeys(NAMES, honest), "site-2": wrong_in(1, 2)})
    coordinate(run, sites)
    notices = {(plan.site, plan.round): plan.notice for plan in sites.asked if plan.notice}
    words = "its hash does not match"
    assert notices == {("site-2", 2): f"round 1: {words}", ("site-2", 3): f"round 2: {words}"}
    assert [event["data"]["rejected"] for event in run.events() if event["type"] == "round"] == [
        ["site-2"], ["site-2"], [], [],
    ]  # fmt: skip


def test_a_notice_outlives_an_interruption_and_a_round_in_which_its_site_was_silent(start) -> None:
    def answer(plan: RoundPlan, adapter: Vector) -> Answer | list[Answer]:
        return [honest(plan, adapter, round=99), []][plan.round - 1] if plan.round < 3 else honest(plan, adapter)

    def stop(plan: RoundPlan, adapter: Vector) -> Answer:
        if plan.round == 2:
            raise KeyboardInterrupt
        return honest(plan, adapter)

    run = start(run={"rounds": 3})
    with pytest.raises(KeyboardInterrupt):
        coordinate(run, Sites({"site-1": honest, "site-2": answer, "site-3": stop}))
    sites = Sites({"site-1": honest, "site-2": answer, "site-3": honest})
    coordinate(run, sites)
    told = {plan.round: plan.notice for plan in sites.asked if plan.site == "site-2"}
    assert told == dict.fromkeys((2, 3), "round 1: it answers another plan")


def test_a_site_that_joins_late_is_asked_from_the_next_round_on(start) -> None:
    run, sites = start(run={"rounds": 3}), Sites({"site-1": honest, "site-3": honest})

    def newcomer_after(plan: RoundPlan, adapter: Vector) -> Answer:
        if plan.round == 1:  # it comes while the first round is going on
            sites.answers["site-2"] = honest
            sites.order = NAMES
        return honest(plan, adapter)

    sites.answers["site-1"] = newcomer_after
    outcome = coordinate(run, sites)
    assert [(p.round, p.site) for p in sites.asked] == [
        (1, "site-1"), (1, "site-3"), *((number, site) for number in (2, 3) for site in NAMES),
    ]  # fmt: skip
    assert rounds_of(run) == {"site-1": [1, 2, 3], "site-2": [2, 3], "site-3": [1, 2, 3]}
    assert outcome.traffic.keys() == set(NAMES)
    joined = [plan for plan in sites.asked if plan.site == "site-2"]
    assert {plan.base_sha256 for plan in joined} == {p.base_sha256 for p in sites.asked if p.site == "site-1"} - {
        sites.asked[0].base_sha256
    }, "it starts from where the others are"


def test_a_site_that_failed_stays_last_in_line_until_it_answers_again(start) -> None:
    federation = {"sites": 3, "selection": "available", "sites_per_round": 2}
    late = lambda p, _a: SiteFailure(site=p.site, code="E-TIMEOUT", message="late", exit_code=3)  # noqa: E731
    run, sites = start(run={"rounds": 6}, federation=federation), fleet(late)
    coordinate(run, sites)
    asked = {number: sorted(p.site for p in sites.asked if p.round == number) for number in range(1, 7)}
    first = min(number for number, names in asked.items() if "site-2" in names)
    assert first < 6
    assert all(asked[number] == ["site-1", "site-3"] for number in range(first + 1, 7))
    kept = load_checkpoint(run)
    assert kept is not None
    assert kept.absent == ("site-2",)


def test_no_site_takes_more_rounds_than_the_job_lets_it_also_after_an_interruption(start) -> None:
    federation = {"sites": 3, "selection": "random", "sites_per_round": 1, "max_rounds_per_site": 2}
    whole = fleet()
    wanted = bits(coordinate(start(run={"rounds": 6}, federation=federation), whole))
    run, left = start(run={"rounds": 6}, federation=federation), [4]

    def stop(plan: RoundPlan, adapter: Vector) -> Answer:
        if left and plan.round == left[0]:
            left.pop()
            raise KeyboardInterrupt
        return honest(plan, adapter)

    with pytest.raises(KeyboardInterrupt):
        coordinate(run, Sites(dict.fromkeys(NAMES, stop)))
    again = fleet()
    assert bits(coordinate(run, again)) == wanted
    order = [(plan.round, plan.site) for plan in whole.asked]
    assert [(plan.round, plan.site) for plan in again.asked] == order[3:]
    assert Counter(site for _, site in order) == dict.fromkeys(NAMES, 2)
    assert all(len(numbers) == 2 for numbers in rounds_of(run).values())


def test_a_quorum_ends_a_round_and_who_was_not_waited_for_stays_charged(start) -> None:
    run, sites = start(federation={"sites": 3, "quorum": 2}), fleet()
    outcome = coordinate(run, sites)
    assert bits(outcome) == expected(start, "site-1", "site-2")
    assert rounds_of(run) == {name: [1, 2] for name in NAMES}
    assert outcome.traffic.keys() == {"site-1", "site-2"}


def test_a_run_without_any_site_ends_by_name(start) -> None:
    with pytest.raises(RunFailed) as caught:
        coordinate(start(), Sites({}))
    assert caught.value.code == "E-NO-SITE"


@pytest.mark.parametrize("rule", ["product_svd", "alternating_rounds", "fedex", "flora_stack", "fed_sb", "fedsa"])
def test_every_kind_of_rule_runs_over_codecs_both_ways_and_goes_on_as_if_never_interrupted(start, rule: str) -> None:
    ranks = {"site-2": 1} if rule in ("product_svd", "alternating_rounds", "flora_stack") else {}
    job = {"aggregation": {"rule": rule}, "lora": {"ranks": ranks}, "run": {"rounds": 3},
           "transport": {"codec_up": "int8", "codec_down": "bf16"}}  # fmt: skip
    sizes: dict[tuple[str, int], int] = {}
    left = [3]

    def answer(plan: RoundPlan, _payload: Vector) -> Answer:
        layout = layout_of(plan.job, locate(plan.job))[0].at_rank(plan.rank)
        size = sizes.setdefault((plan.site, plan.round), returned(plan.job.rule, layout, plan.round, 3).size)
        delta = np.random.default_rng([plan.round, *plan.site.encode()]).standard_normal(size).astype(np.float32)
        return update_of(plan, delta / 10)

    def stop(plan: RoundPlan, payload: Vector) -> Answer:
        if left and plan.round == left[0]:
            left.pop()
            raise KeyboardInterrupt
        return answer(plan, payload)

    whole = coordinate(start(**job), Sites(dict.fromkeys(NAMES, answer)))
    run, sites = start(**job), Sites(dict.fromkeys(NAMES, stop))
    with pytest.raises(KeyboardInterrupt):
        coordinate(run, sites)
    assert bits(coordinate(run, sites)) == bits(whole)
    offsets = {plan.round: plan.offset_rank for plan in sites.asked}
    assert (offsets[1] == 0) and (bool(offsets[3]) == (rule in ("fedex", "flora_stack")))
    assert {plan.site: plan.rank for plan in sites.asked} == {**dict.fromkeys(NAMES, 2), **ranks}
    by_round = {p.round: {q.base_sha256 for q in sites.asked if q.round == p.round} for p in sites.asked}
    assert all(len(hashes) == 1 + len(ranks) for hashes in by_round.values())
    assert all(np.isfinite(array).all() for array in whole.arrays.values())
    assert {name.split(".")[-2] for name in whole.arrays} == {"lora_A", "lora_B"}, "what is published is plain"


# Adapters of single sites


def with_own_b(plan: RoundPlan, payload: Vector) -> Answer:
    """An update of what the round returns; its numbers depend on the site, the round and what came."""
    layout = layout_of(plan.job, locate(plan.job))[0]
    size = returned(plan.job.rule, layout, plan.round, plan.job.run.rounds).size
    seed = [plan.round, *plan.site.encode(), int(flat_sha256(payload)[:8], 16)]
    return update_of(plan, np.random.default_rng(seed).standard_normal(size).astype(np.float32))


def own_adapters(run: RunFolder) -> dict[str, dict[str, bytes]]:
    read = {p.name: load_file(p / "adapter_model.safetensors") for p in sorted(run.personal.iterdir())}
    return {site: {name: array.tobytes() for name, array in arrays.items()} for site, arrays in read.items()}


def test_each_site_ends_with_the_mean_a_and_its_own_b_and_the_run_with_the_mean_b(start) -> None:
    run, sites = start(aggregation={"rule": "fedsa"}), Sites(dict.fromkeys(NAMES, with_own_b))
    outcome = coordinate(run, sites)
    layout, given = layout_of(run.job(), locate(run.job()))[0], dict[str, dict[str, Vector]]()
    shared = layout.only([name for name in layout.trained if "lora_A" in name])
    a = {name: array for name, array in initial_values(layout, run.job().run.seed).items() if "lora_A" in name}
    for number in (1, 2):
        up, plans = (shared, layout)[number - 1], [plan for plan in sites.asked if plan.round == number]
        assert {plan.base_sha256 for plan in plans} == {flat_sha256(shared.flatten(a))}, "A alone is sent"
        updates = {plan.site: with_own_b(plan, shared.flatten(a)) for plan in plans}
        given = {s: up.unflatten(u.payload.view("<f4")) for s, u in updates.items() if isinstance(u, AdapterUpdate)}
        means = {n: sum(1 / 3 * given[s][n].astype("f8") for s in NAMES) for n in up.trained}
        a = {name: (array + means[name]).astype(np.float32) for name, array in a.items()}
    saved = own_adapters(run)
    assert set(saved) == set(NAMES)
    for name in layout.trained:
        for site in NAMES:
            wanted = outcome.arrays[name] if name in a else given[site][name]
            assert saved[site][name] == wanted.tobytes()
        np.testing.assert_array_equal(outcome.arrays[name], a[name] if name in a else np.float32(means[name]))
    rounds = [event["data"] for event in run.events() if event["type"] == "round"]
    assert ["bias" in data for data in rounds] == [False, True], "as long as sites keep B there are no products"


@pytest.mark.parametrize("after", ["the last round", "the last checkpoint"])
def test_the_sites_own_adapters_are_those_of_a_run_that_was_not_interrupted(start, monkeypatch, after: str) -> None:
    whole = start(aggregation={"rule": "fedsa"})
    expected_bits = bits(coordinate(whole, Sites(dict.fromkeys(NAMES, with_own_b))))
    run, step = start(aggregation={"rule": "fedsa"}), {"the last round": "save_checkpoint"}.get(after, "score_personal")
    real, seen = getattr(coordinator, step), list[int]()

    def dies(*given: Any) -> Any:
        seen.append(1)
        if len(seen) == (ROUNDS if step == "save_checkpoint" else 1):
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(coordinator, step, dies)
        with pytest.raises(KeyboardInterrupt):
            coordinate(run, Sites(dict.fromkeys(NAMES, with_own_b)))
    assert set(own_adapters(run)) == set(NAMES)
    assert bits(coordinate(run, Sites(dict.fromkeys(NAMES, with_own_b)))) == expected_bits
    assert own_adapters(run) == own_adapters(whole)


def test_a_site_that_misses_the_last_round_has_no_adapter_of_its_own_and_is_named(start) -> None:
    def late(plan: RoundPlan, payload: Vector) -> Answer:
        return refuse(plan, payload) if plan.round == ROUNDS else with_own_b(plan, payload)

    run = start(aggregation={"rule": "fedsa"})
    (run.personal / "site-2").mkdir(parents=True)  # of a last round that was interrupted, when it was there
    coordinate(run, Sites({"site-1": with_own_b, "site-2": late, "site-3": with_own_b}))
    assert set(own_adapters(run)) == {"site-1", "site-3"}
    assert "site-2: no update in the last round, so it has no adapter of its own" in said(run, "site-2")


# What it cost


def book(run: RunFolder, rounds: Sequence[int]) -> list[bytes]:
    """The lines of a ledger that charges these rounds of the run."""
    event = mechanism_of(run.job()).event(run.job().train.local_steps).to_dict()
    fields = {"dataset": "d", "unit": "record", "run_id": run.run_id, "job_sha256": run.job().sha256(), "event": event}
    lines = [next_line(None, "", "site.init", {})]
    for number in rounds:
        last = read_chain(b"".join(lines))[-1]
        lines.append(next_line(last, "", "budget.reserve", {**fields, "round": number}))
    return lines


def signed_book(lines: Sequence[bytes], site: str, seq: int) -> SignedHead:
    """The head of a ledger's line, signed by the site."""
    sha256 = read_chain(b"".join(lines))[seq - 1].sha256
    signature = sign(key_of(site), "cotune-head", head_message(site, seq, sha256))
    return SignedHead(
        site=site, seq=seq, sha256=sha256, public_key=public_key_line(key_of(site).public_key()), signature=signature
    )


def run_with_book(start: Any, rounds: Sequence[int], shown: Callable[[list[bytes]], bytes]) -> RunFolder:
    """A run of two rounds in which site-1 signs heads of one ledger and shows, at the end, another or the same."""
    run, sites = start(), fleet()
    lines = book(run, rounds)
    heads = {1: 2, 2: len(lines)}
    sites.answers["site-1"] = lambda p, a: honest(p, a, head=signed_book(lines, "site-1", heads[p.round]))
    sites.books["site-1"] = shown(lines)
    coordinate(run, sites)
    return run


def test_a_round_its_site_had_to_take_twice_is_charged_twice_by_the_sites_own_ledger(start) -> None:
    run = run_with_book(start, [1, 2, 2], b"".join)
    assert rounds_of(run) == {"site-1": [1, 2, 2], "site-2": [1, 2], "site-3": [1, 2]}
    assert run.ledger("site-1").read_bytes() == b"".join(book(run, [1, 2, 2]))
    assert not said(run, "site-1")


NO_BOOKS: dict[str, tuple[Sequence[int], Callable[[list[bytes]], bytes]]] = {
    "no ledger": ([1, 2], lambda lines: b"a ledger of site-1"),
    "nothing": ([1, 2], lambda lines: b""),
    "one cut short": ([1, 2], lambda lines: b"".join(lines[:-1])),
    "one that never charged": ([2, 2], b"".join),
    "another one": ([1, 2], lambda lines: b"".join([*lines[:-1], lines[-1].replace(b'"d"', b'"e"')])),
}


@pytest.mark.parametrize("kind", NO_BOOKS)
def test_a_ledger_that_is_not_the_one_its_site_signed_takes_nothing_back(start, kind: str) -> None:
    run = run_with_book(start, *NO_BOOKS[kind])
    assert rounds_of(run)["site-1"] == [1, 2]
    assert all("refused" not in entry for entry in accounts(run)["site-1"])
    assert said(run, "site-1") == ["site-1: its ledger is not one chain of what it released"]


def test_a_site_that_will_not_answer_again_after_an_interruption_stays_charged(start) -> None:
    def stop(plan: RoundPlan, adapter: Vector) -> Answer:
        raise KeyboardInterrupt

    run = start()
    with pytest.raises(KeyboardInterrupt):
        coordinate(run, Sites({"site-1": honest, "site-2": honest, "site-3": stop}))
    coordinate(run, fleet(refuse))
    entries = accounts(run)["site-2"]
    assert [(entry["round"], "refused" in entry) for entry in entries] == [(1, False), (2, True)]


def test_a_defect_of_a_fleet_is_named_without_its_text(start) -> None:
    def broken(_plan: RoundPlan, _adapter: Vector) -> Answer:
        raise ValueError("canary secret text")

    run = start()
    with pytest.raises(ValueError, match="canary"):
        conduct(run, fleet(broken), "test")
    assert (run.state()["status"], run.state()["error"]["code"]) == ("failed", "E-INTERNAL")
    assert "canary" not in "".join(path.read_text() for path in run.path.rglob("*.json*"))


@pytest.fixture
def small_disk(mount_disk: Callable[[int], Path]) -> Path:
    return mount_disk(256)


def test_a_disk_that_fills_up_in_a_round_fails_the_run_and_keeps_what_was_saved(start, small_disk: Path) -> None:
    def fill_in_round_2(plan: RoundPlan, adapter: Vector) -> Answer:
        if plan.round == 2:
            with (small_disk / "filler").open("wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 64):
                        pass
                except OSError:
                    pass
        return honest(plan, adapter)

    run = start(small_disk, run={"rounds": 3})
    with pytest.raises(CotuneError) as caught:
        conduct(run, fleet(fill_in_round_2), "test")
    assert isinstance(caught.value, StorageError)
    assert (caught.value.code, caught.value.exit_code) == ("E-STORAGE", 1)
    assert [path.name for path in run.checkpoints.iterdir()] == ["round-00001"]
    kept = load_checkpoint(run)
    assert kept is not None
    assert kept.round == 1
    assert len(accounts(run)["site-1"]) == 2
    assert not [path for path in run.path.rglob("*") if ".tmp" in path.name]
    (small_disk / "filler").unlink()
    coordinate(run, fleet())
    assert len(accounts(run)["site-1"]) == 3
    assert run.metrics()
    assert run.events()
