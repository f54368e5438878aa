"""Answers that were changed at random, before or after they were signed: read without an error, and not counted."""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import MakeJob
from tests.integration.hostile import (
    HOSTILE,
    Federation,
    Scene,
    edited,
    failure,
    head_by,
    header_of,
    honest,
    records,
    sealed,
)
from tests.integration.hostile_kinds import EDITS, HASH
from tests.integration.hostile_worlds import FOUND, World, worlds

from cotune.server.collecting import Collected, Collector
from cotune.server.fleet import Request
from cotune.server.spool import Spool
from cotune.server.witness import Witness
from cotune.shared.plan import LedgerRequest
from cotune.shared.runs import RunFolder
from cotune.shared.signing import sign
from cotune.shared.update import MAX_CHARGES, AdapterUpdate, Answer, SiteFailure
from cotune.shared.wire import MAX_WORDS, answer_from_records, answer_to_records


@pytest.fixture
def world(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Federations by name."""
    return worlds(make_job, tmp_path, monkeypatch)


class One:
    """A fleet of one site that has its answer ready."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def sites(self) -> Sequence[str]:
        return [HOSTILE]

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        yield from [self._answer for _ in requests]

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        yield from [(request.site, b"") for request in requests]


@dataclass(frozen=True)
class Desk:
    """Where answers of one site to one plan are judged; it knows the site's key."""

    federation: Federation
    scene: Scene
    folder: Path

    def judge(self, answer: Answer) -> Collected:
        plan, up, witness = self.scene.plan, self.federation.up, Witness(self.folder / "heads.json")
        witness.keep(self.scene.update.header)
        with Spool(self.folder / "spool", {plan.rank: up}, {plan.rank: {}}, {}) as spool:
            requests = {HOSTILE: Request(plan, np.zeros(4 * up.size, dtype=np.uint8))}
            return Collector(RunFolder(self.folder), requests, {HOSTILE: up.size}, witness, spool).collect(
                One(answer), 1
            )


@pytest.fixture
def desk(world: World, tmp_path: Path) -> Desk:
    federation, quiet = world("plain")
    world("late")
    plan = quiet.asked[-1]
    return Desk(federation, federation.scene(plan, federation.genuine(plan)), tmp_path)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("0" * 64)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
words = st.one_of(
    st.text(max_size=9), st.sampled_from(["\\ud800", "NaN", "1e999", "9" * 400, "[" * 300, "null", "\x00"])
)
Made = tuple[RecordDict, bool]  # and whether the site's own key signed it


def mutated(scene: Scene) -> st.SearchStrategy[Made]:
    """The honest answer with something changed, before or after it is signed; or something else altogether."""
    header, payload = header_of(scene), scene.update.payload
    text, data = json.dumps(header), Array(payload).data

    def field(name: str, value: object) -> Made:
        return edited(scene, **{name: value}), False

    def resealed(name: str, value: Any) -> Made:
        try:
            return sealed(scene, **{name: value}), True
        except ValueError:  # no header can say that
            return field(name, value)

    def spliced(at: int, left_out: int, word: str) -> Made:
        return records("update", text[:at] + word + text[at + left_out :], payload), False

    def array(at: int, left_out: int, new: bytes) -> Made:
        content = data[:at] + new + data[at + left_out :]
        return records("update", header, Array("uint8", payload.shape, "numpy.ndarray", content)), False

    def flipped(place: int, byte: int) -> Made:
        changed = payload.copy()
        changed[place % changed.size] ^= byte
        return sealed(scene, changed), True

    def failed(said: dict[str, Any]) -> Made:
        return failure(**said), False

    names, few = st.sampled_from([*header, "extra"]), st.integers(0, 20)
    said = st.dictionaries(st.sampled_from(["site", "code", "message", "exit_code", "x"]), json_values)
    spoken = st.fixed_dictionaries({"message": st.text(), "exit_code": st.integers(-9, 300)})
    return st.one_of(
        st.just((honest(scene), False)),
        st.builds(field, names, json_values),
        st.builds(resealed, names, json_values),
        st.builds(spliced, st.integers(0, len(text)), few, words),
        st.builds(array, st.integers(0, len(data)), few, st.binary(max_size=9)),
        st.builds(flipped, st.integers(0, payload.size), st.integers(0, 255)),
        st.builds(failed, st.one_of(said, spoken)),
        st.tuples(st.builds(records, words, st.just(text), st.just(payload)), st.just(False)),
    )


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_changed_answer_is_rejected_by_name_and_an_unchanged_one_admitted(desk: Desk, examples: int) -> None:
    genuine, admitted = desk.scene.update, Counter[bool]()

    @settings(max_examples=examples, database=None)
    @given(mutated(desk.scene))
    def check(made: Made) -> None:
        answer = answer_from_records(made[0], HOSTILE)
        found = desk.judge(answer)
        if isinstance(answer, SiteFailure):
            assert found.failures == [answer]
            assert answer.site == HOSTILE
            assert answer.message.isprintable()
            assert len(answer.message) <= MAX_WORDS
        elif HOSTILE in found.rejected:
            assert found.rejected[HOSTILE].isprintable()
        else:
            own = {"signature"} | ({"charges", "witnessed", "head", "update_sha256"} if made[1] else set())
            assert answer.header.model_dump(exclude=own) == genuine.header.model_dump(exclude=own)
            assert made[1] or answer.payload.tobytes() == genuine.payload.tobytes()
            assert answer.header.charges <= MAX_CHARGES
        admitted[HOSTILE in found.received] += 1

    check()
    assert admitted[True] > 0
    assert admitted[False] > examples / 2


def envelope(desk: Desk, chance: random.Random, pool: Sequence[AdapterUpdate]) -> RecordDict:
    """A genuine envelope that was edited after signing, is another's, or is signed by another key."""
    scene, stranger = desk.scene, Ed25519PrivateKey.from_private_bytes(chance.randbytes(32))
    other = chance.choice(pool)
    theirs = other.header.model_dump(mode="json")
    fit = {
        "site": HOSTILE,
        "run_id": scene.plan.run_id,
        "round": scene.plan.round,
        "base_sha256": scene.plan.base_sha256,
    }
    own, changed = scene.update.header.head, scene.update.payload.copy()
    changed[chance.randrange(changed.size)] ^= chance.randrange(1, 256)
    field = chance.choice([name for name in EDITS if name != "signature"])
    return chance.choice([
        lambda: edited(scene, **{field: EDITS[field][0]}),
        lambda: edited(scene, **{name: chance.randbytes(32).hex() for name in chance.sample(HASHES, 2)}),
        lambda: edited(scene, signature=other.header.signature),
        lambda: edited(scene, signature=sign(stranger, "cotune-update", scene.update.header.message())),
        lambda: edited(scene, signature=sign(scene.key, "cotune-job", scene.update.header.message())),
        lambda: edited(scene, head=head_by(stranger, HOSTILE, own.seq + chance.randrange(99), HASH)),
        lambda: records("update", header_of(scene), changed),
        lambda: sealed(scene, changed, by=stranger),
        lambda: sealed(scene, by=stranger, head=head_by(stranger, HOSTILE, own.seq + 1, HASH)),
        lambda: answer_to_records(other),
        lambda: records("update", {**theirs, **fit}, other.payload),
        lambda: records("update", {**header_of(scene), "update_sha256": theirs["update_sha256"]}, other.payload),
    ])()  # fmt: skip


HASHES = ("job_sha256", "base_sha256", "update_sha256")


def test_of_a_thousand_forged_edited_and_replayed_envelopes_none_is_accepted(desk: Desk) -> None:
    genuine, chance = desk.scene.update, random.Random(11)  # noqa: S311 - no secret
    pool = [u for federation, _ in FOUND.values() for u in federation.given if u is not genuine]
    reasons: Counter[str] = Counter()
    for _ in range(1000):
        found = desk.judge(answer_from_records(envelope(desk, chance, pool), HOSTILE))
        assert not found.received
        reasons.update([*found.rejected.values(), *(failure.message for failure in found.failures)])
    assert reasons.total() == 1000
    assert desk.judge(answer_from_records(honest(desk.scene), HOSTILE)).received.keys() == {HOSTILE}
    sys.stdout.write("".join(f"\n{count:4} of 1000 envelopes: {reason}" for reason, count in reasons.most_common()))
