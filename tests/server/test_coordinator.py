"""The round loop over sites that misbehave: named, left out, and without effect on the result."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from cotune.server.checkpoint import load_checkpoint
from cotune.server.conduct import conduct
from cotune.server.coordinator import Coordinator, Outcome
from cotune.server.evaluation import GlobalEvaluator
from cotune.shared.adapter import Vector, flat_sha256
from cotune.shared.chain import SignedHead
from cotune.shared.errors import CotuneError, RunFailed, StorageError
from cotune.shared.methods import layout_of
from cotune.shared.model import locate
from cotune.shared.plan import LedgerRequest, RoundPlan
from cotune.shared.planning import resolve
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.runs import RunFolder, create_run
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure, UpdateHeader

Answerer = Callable[[RoundPlan, Vector], Answer | list[Answer]]
NAMES = ("site-1", "site-2", "site-3")
ROUNDS = 2
EXPECTED: dict[str, dict[str, bytes]] = {}  # results of honest sites, which do not depend on the test
SIGN: list[Callable[[str, int], SignedHead]] = []


@pytest.fixture(autouse=True)
def _sign(sign_head: Callable[[str, int], SignedHead]) -> None:
    """How sites sign, for the functions below that are no tests."""
    SIGN[:] = [sign_head]


def honest(plan: RoundPlan, adapter: Vector, delta: Vector | None = None, **changes: object) -> AdapterUpdate:
    """An update of the right form; its numbers depend on the site, the round and the adapter it starts from."""
    if delta is None:
        seed = [sum(plan.site.encode()), plan.round, int(flat_sha256(adapter)[:8], 16)]
        delta = np.random.default_rng(seed).standard_normal(adapter.size).astype(np.float32)
    header = {
        "site": plan.site,
        "round": plan.round,
        "job_sha256": plan.job.sha256(),
        "base_sha256": plan.base_sha256,
        "update_sha256": flat_sha256(delta) if delta.dtype.kind == "f" else "0" * 64,
        "event": mechanism_of(plan.job).event(plan.job.train.local_steps).to_dict(),
        "head": SIGN[0](plan.site, plan.round),
        **changes,
    }
    return AdapterUpdate(UpdateHeader.model_validate(header), delta)


class Sites:
    """A fleet in this process; each site has its own way to answer."""

    def __init__(self, answers: dict[str, Answerer], order: Sequence[str] | None = None) -> None:
        self.answers = answers
        self.order = order or sorted(answers)
        self.asked: list[RoundPlan] = []

    def sites(self) -> Sequence[str]:
        return sorted(self.answers)

    def ask(self, plans: Sequence[RoundPlan], adapter: Vector) -> Iterator[Answer]:
        by_site = {plan.site: plan for plan in plans}
        for site in self.order:
            self.asked.append(by_site[site])
            answers = self.answers[site](by_site[site], adapter.copy())
            yield from answers if isinstance(answers, list) else [answers]

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        for request in requests:
            yield request.site, b"a ledger of " + request.site.encode()


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
    updates = [honest(plan, flat).delta.astype(np.float64) for plan in sites.asked]
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


EVENT = {"kind": "dp-sgd", "sampling_probability": 1 / 3, "noise_multiplier": 0.01, "steps": 2}
BAD: dict[str, tuple[Answerer, str]] = {
    "NaN": (with_value(np.nan), "NaN"),
    "infinity": (with_value(-np.inf, 5), "infinite"),
    "a wrong shape": (lambda p, a: honest(p, a, np.zeros(a.size + 1, np.float32)), "expected 192 fp32"),
    "a wrong type": (lambda p, a: honest(p, a, np.zeros(a.size)), "float64"),
    "a wrong hash": (changed(update_sha256="0" * 64), "hash"),
    "another event": (changed(event=EVENT), "than was planned"),
    "no event": (changed(event={}), "what was released"),
    "a huge norm": (with_value(1e20), "norm"),
    "another round": (changed(round=99), "another plan"),
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


def test_an_interruption_in_a_round_costs_that_round_and_no_more(start) -> None:
    def stop_in_round_2(plan: RoundPlan, adapter: Vector) -> Answer:
        if plan.round == 2:
            raise KeyboardInterrupt
        return honest(plan, adapter)

    run = start(run={"rounds": 3})
    with pytest.raises(KeyboardInterrupt):
        conduct(run, fleet(stop_in_round_2), "test")
    assert run.state()["status"] == "cancelled"
    kept = load_checkpoint(run)
    assert kept is not None
    assert kept.round == 1
    sites = fleet()
    coordinate(run, sites)
    assert sorted({plan.round for plan in sites.asked}) == [2]
    for entries in accounts(run).values():
        assert [entry["round"] for entry in entries] == [1, 2, 2]
    assert run.job().steps == sum(entry["event"]["steps"] for entry in accounts(run)["site-1"])


def test_a_run_interrupted_in_every_round_ends_by_name(start) -> None:
    def stop(_plan: RoundPlan, _adapter: Vector) -> Answer:
        raise KeyboardInterrupt

    run = start()
    for _ in range(ROUNDS):
        with pytest.raises(KeyboardInterrupt):
            coordinate(run, fleet(stop))
    with pytest.raises(RunFailed) as caught:
        coordinate(run, fleet())
    assert caught.value.code == "E-NO-ROUND"


def test_a_damaged_newest_checkpoint_does_not_stop_the_run(start) -> None:
    run = start(run={"rounds": 4})

    def stop_in_round_3(plan: RoundPlan, adapter: Vector) -> Answer:
        if plan.round == 3:
            raise KeyboardInterrupt
        return honest(plan, adapter)

    with pytest.raises(KeyboardInterrupt):
        coordinate(run, fleet(stop_in_round_3))
    (run.checkpoints / "round-00002" / "adapter_model.safetensors").write_bytes(b"")
    coordinate(run, fleet())
    again = load_checkpoint(run)
    assert again is not None
    assert again.round == 2
    assert len(accounts(run)["site-1"]) == 4


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
