"""One of four sites answers every round with something malformed, forged or hostile: the run goes on without it.

Its result, and every checkpoint, is bit for bit that of the run in which the site gives no update at all; the site is
named in the run's events, and told why in its next plan.
"""

import math
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from tests.conftest import MakeJob
from tests.integration.hostile import (
    HOSTILE,
    NAMES,
    Attack,
    Federation,
    LedgerAttack,
    Scene,
    failing,
    failure,
    head_by,
    honest,
    records,
    sealed,
)
from tests.integration.hostile_kinds import HASH, KINDS
from tests.integration.hostile_worlds import World, worlds

from cotune.server.fleet import Fleet, Request
from cotune.shared.chain import next_line, read_chain
from cotune.shared.codec import BLOCK, decode
from cotune.shared.methods import initial_values
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure
from cotune.shared.verification import verify_run
from cotune.shared.wire import answer_from_records, ledger_to_records
from cotune.simulations.federation import InlineFleet

TOLD: dict[str, str] = {}  # kind -> what was said of it


@pytest.fixture
def world(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Federations by name."""
    return worlds(make_job, tmp_path, monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    """Prints what became of each kind; seen with -s."""
    yield
    sys.stdout.write("\n" + "\n".join(f"{kind:<42} {said}" for kind, said in TOLD.items()) + "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_answer_has_no_effect_and_is_named_and_told(world: World, kind: str) -> None:
    expected = KINDS[kind]
    federation, quiet = world(expected.world)
    ran = federation.run(expected.attack, patience_s=expected.patience_s)
    rounds = range(federation.since, federation.job.run.rounds + 1)
    said = ran.said(HOSTILE)
    assert ran.bits() == quiet.bits()
    assert len(said) == len(rounds), said
    assert all(expected.words in message for message in said), said
    assert all(message.isprintable() and len(message) < 500 for message in said)
    assert not [message for name in NAMES if name != HOSTILE for message in ran.said(name)]
    notices = {plan.round: plan.notice for plan in ran.asked} | {rounds[-1] + 1: ran.progress.notices.get(HOSTILE)}
    for number in rounds:
        told = notices[number + 1] or ""
        assert told.startswith(f"round {number}: ") == (expected.words in told) == expected.told, told
    assert [len(entries) for entries in ran.accounts().values()] == [federation.job.run.rounds] * len(NAMES)
    TOLD[kind] = said[0].removeprefix(f"{HOSTILE}: ")[:90]


@pytest.mark.slow
def test_a_run_with_a_hostile_site_is_published_and_verified_as_without_it(world: World) -> None:
    page = failure(message="<script>alert(1)</script> [red]![/] \x1b[2J|`#")
    kinds: list[Attack] = [lambda _: page, KINDS["NaN"].attack]
    federation, _ = world("published")
    quiet, loud = federation.publish(failing), federation.publish(lambda s: kinds[s.plan.round - 1](s))
    weights = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in (quiet, loud)]
    assert weights[0] == weights[1]
    assert [check for run in (quiet, loud) for check in verify_run(run) if not check.passed] == []
    assert "alert(1)" in (loud.path / "events.jsonl").read_text()
    for page_of in (loud.path / "report" / "index.html", loud.adapter / "README.md"):
        assert "<script>alert(1)" not in page_of.read_text()


def test_a_long_header_is_not_read_at_all() -> None:
    bomb = records("update", "[" + "[]," * 1_300_000 + "[]]", None)
    tracemalloc.start()
    answer = answer_from_records(bomb, HOSTILE)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(answer, SiteFailure)
    assert most < 100_000


def test_sites_asked_again_without_a_wire_give_the_same_run(world: World) -> None:
    federation, quiet = world("trusted")
    ran = federation.run(honest, around=lambda _fleet: InlineFleet(quiet.run))
    assert ran.bits() == quiet.bits()


# --- claims that change nothing


def beside(made: RecordDict, name: str, record: MetricRecord | ConfigRecord | ArrayRecord) -> RecordDict:
    """An answer with another record beside it, or in place of one of its own."""
    made[name] = record
    return made


def believed(scene: Scene) -> RecordDict:
    """Newer heads of all other sites, which they never signed."""
    return sealed(scene, witnessed=[head_by(scene.key, name, 10**9, HASH) for name in NAMES if name != HOSTILE])


def two_arrays(scene: Scene) -> RecordDict:
    arrays = {"adapter": Array(scene.update.payload), "num_examples": Array(np.array([1e12]))}
    return beside(honest(scene), "adapter", ArrayRecord(arrays))


CLAIMS: dict[str, tuple[Attack, str]] = {
    "a trillion examples": (
        lambda s: beside(honest(s), "metrics", MetricRecord({"num_examples": 10**12, "loss": 1e308})),
        "",
    ),
    "settings of its own": (lambda s: beside(honest(s), "config", ConfigRecord({"weight": 1e308})), ""),
    "an array beside the adapter": (two_arrays, ""),
    "two charges": (lambda s: sealed(s, charges=2), ""),
    "heads other sites never signed": (believed, ""),
    "its answer twice": (lambda s: [honest(s), honest(s)], "it has answered already"),
    "another answer after it": (lambda s: [honest(s), sealed(s, s.update.payload[::-1].copy())], "answered already"),
    "garbage after it": (lambda s: [honest(s), RecordDict()], "not an update of this version"),
    "a refusal after it": (lambda s: [honest(s), failure(exit_code=6)], "the disk is full"),
    "garbage before it": (lambda s: [RecordDict(), honest(s)], "not an update of this version"),
    "a crash beside it": (lambda s: [Error(code=0), honest(s)], ""),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_site_says_besides_its_update_changes_no_bit(world: World, claim: str) -> None:
    attack, words = CLAIMS[claim]
    federation, quiet = world("trusted")
    ran = federation.run(attack)
    assert ran.bits() == quiet.bits()
    assert len(ran.said(HOSTILE)) == (federation.job.run.rounds if words else 0)
    assert all(words in message for message in ran.said(HOSTILE))
    assert not [message for name in NAMES if name != HOSTILE for message in ran.said(name)]
    assert HOSTILE not in ran.progress.notices
    assert all("refused" not in entry for entry in ran.accounts()[HOSTILE])


def test_a_crash_beside_garbage_is_not_asked_again_for_ever(world: World) -> None:
    federation, quiet = world("plain")
    ran = federation.run(lambda _scene: [Error(code=0), RecordDict()])
    assert ran.bits() == quiet.bits()
    assert len(ran.asked) == federation.job.run.rounds


class Intruded:
    """A fleet with one more voice."""

    def __init__(self, fleet: Fleet, said: Callable[[AdapterUpdate], Answer]) -> None:
        self._fleet, self._said = fleet, said
        self.sites, self.ledgers = fleet.sites, fleet.ledgers

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        for answer in self._fleet.ask(requests):
            if isinstance(answer, AdapterUpdate) and answer.header.site == HOSTILE:
                yield self._said(answer)
            yield answer


STRANGERS: dict[str, Callable[[AdapterUpdate], Answer]] = {
    "an update": lambda u: AdapterUpdate(u.header.model_copy(update={"site": "mallory"}), u.payload),
    "a failure": lambda _: SiteFailure(site="mallory", code="E-STORAGE", message="nobody asked it", exit_code=1),
    "a refusal": lambda _: SiteFailure(site="mallory", code="E-BUDGET", message="nobody asked it", exit_code=6),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_a_site_nobody_asked_is_named_and_changes_nothing(world: World, what: str) -> None:
    federation, quiet = world("trusted")
    ran = federation.run(honest, around=lambda fleet: Intruded(fleet, STRANGERS[what]))
    assert ran.bits() == quiet.bits()
    assert len(ran.said("mallory")) == federation.job.run.rounds
    assert all("nobody asked it" in message for message in ran.said("mallory"))
    assert ran.accounts().keys() == set(NAMES)
    assert ran.progress.absent == ()


# --- weight


Numbers = dict[str, np.ndarray]


def by_hand(federation: Federation, sent: Numbers) -> Numbers:
    """The adapter after one round: in order of names and in float64, the mean of the updates."""
    mean = np.zeros(federation.up.size)
    for name in NAMES:
        mean += 0.25 * sent[name].astype(np.float64)
    start = initial_values(federation.layout, federation.job.run.seed)
    return {name: start[name] + delta for name, delta in federation.up.unflatten(mean.astype(np.float32)).items()}


def length_of(arrays: Iterable[np.ndarray]) -> float:
    return math.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in arrays))


@pytest.mark.parametrize("length", [1.0, 9.9e3])
def test_no_site_weighs_more_than_one_of_k_whatever_it_claims(world: World, length: float) -> None:
    federation, _ = world("single")
    codec, size = federation.job.transport.codec_up, federation.up.size
    given = {update.header.site: update.payload for update in federation.given}
    payload = given[HOSTILE].copy()
    scales = payload[: 4 * -(-size // BLOCK)].view("<f4")
    scales *= np.float32(length / length_of([decode(payload, codec, size)]))
    sent = {name: decode(bytes_, codec, size) for name, bytes_ in {**given, HOSTILE: payload}.items()}
    claims = MetricRecord({"num_examples": 10**12, "weight": 1e308})
    ran = federation.run(lambda s: beside(sealed(s, payload, charges=2), "metrics", claims))
    expected = by_hand(federation, sent)
    without = by_hand(federation, {**sent, HOSTILE: np.zeros_like(sent[HOSTILE])})
    assert ran.said(HOSTILE) == []
    assert {name: ran.progress.arrays[name].tobytes() for name in expected} == {
        name: array.tobytes() for name, array in expected.items()
    }
    moved = length_of(expected[name].astype(np.float64) - without[name] for name in expected)
    assert 0 < moved <= length_of([sent[HOSTILE]]) / len(NAMES) * (1 + 1e-6)


@pytest.mark.parametrize(("claim", "direction"), [(1.7e308, 1), (1e-308, -1)])
def test_a_clipping_norm_counts_no_further_than_a_round_moves_it(world: World, claim: float, direction: int) -> None:
    federation, _ = world("single")
    privacy = federation.job.privacy
    most = privacy.clipping_rate * federation.job.train.local_steps
    others = [update.header.clipping_norm for update in federation.given if update.header.site != HOSTILE]
    moves = [math.log(norm / privacy.clipping_norm) for norm in others if norm] + [direction * most]
    ran = federation.run(lambda s: sealed(s, clipping_norm=claim))
    assert len(moves) == len(NAMES)
    assert max(map(abs, moves)) == most
    expected = privacy.clipping_norm * math.exp(sum(moves) / len(NAMES))
    assert ran.progress.clipping_norm == pytest.approx(expected, rel=1e-12)


# --- ledgers


def longer(replace: tuple[bytes, bytes] = (b"", b""), **changes: object) -> LedgerAttack:
    """The true ledger with one more charge, some of whose fields are others; None leaves a field out."""

    def attack(ledger: bytes, run_id: str) -> RecordDict:
        entries = read_chain(ledger)
        charge = next(e for e in entries if e.action == "budget.reserve" and e.fields["run_id"] == run_id)
        fields = {name: value for name, value in {**charge.fields, **changes}.items() if value is not None}
        line = next_line(entries[-1], "2026-01-01T00:00:00Z", "budget.reserve", fields)
        return ledger_to_records(ledger + line.replace(*replace))

    return attack


BROKEN = "its ledger is not one chain of what it released"
LEDGERS: dict[str, tuple[LedgerAttack, str]] = {
    "none": (lambda _ledger, _run: RecordDict(), ""),
    "garbage": (lambda _ledger, _run: ledger_to_records(b"garbage\n"), BROKEN),
    "half of it": (lambda ledger, _run: ledger_to_records(ledger[: len(ledger) // 2]), BROKEN),
    "a charge without a run": (longer(run_id=None), BROKEN),
    "a charge without an event": (longer(event=None), BROKEN),
    "an event that is a list": (longer(event=[1]), BROKEN),
    "an event of lists": (longer(event={"kind": []}), BROKEN),
    "a round that is text": (longer(round="x"), BROKEN),
    "a round that is infinite": (longer((b'"round": 777', b'"round": 1e999'), round=777), BROKEN),
    "a round nobody asked for": (longer(round=10**30), ""),
}


@pytest.mark.parametrize("kind", LEDGERS)
def test_a_hostile_ledger_at_the_end_is_named_and_loses_nothing(world: World, kind: str) -> None:
    attack, words = LEDGERS[kind]
    federation, quiet = world("trusted")
    ran = federation.run(honest, ledger=attack)
    assert ran.bits() == quiet.bits()
    assert ran.said(HOSTILE) == ([f"{HOSTILE}: {words}"] if words else [])
    rounds = {entry["round"] for entry in ran.accounts()[HOSTILE]}
    assert rounds >= set(range(1, federation.job.run.rounds + 1))
