"""A federation of four real sites behind Flower's records, one of which answers as a test says.

The sites are simulated ones with keys, ledgers and noise of their own; the coordinator asks them through its own
`GridFleet`. Any number of coordinators can be begun over one federation: asked for a round again, a site gives the
same update, so a round is trained once. Where what a hostile site sent changed anything, the others refuse the next
plan, whose adapter is another.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from cotune.client.courier import signed
from cotune.server.checkpoint import Progress, load_checkpoint
from cotune.server.conduct import conduct
from cotune.server.coordinator import Coordinator, Outcome
from cotune.server.evaluation import GlobalEvaluator
from cotune.server.fleet import Fleet
from cotune.server.grid import GridFleet
from cotune.shared.aggregation import returned
from cotune.shared.chain import SignedHead, head_message
from cotune.shared.codec import Payload
from cotune.shared.job import Job
from cotune.shared.keyfile import SigningKey
from cotune.shared.methods import layout_of
from cotune.shared.model import locate
from cotune.shared.plan import ClaimRequest, LedgerRequest, RoundPlan
from cotune.shared.runs import RunFolder, create_run
from cotune.shared.signing import public_key_line, sign
from cotune.shared.update import AdapterUpdate, SiteFailure, UpdateHeader, payload_sha256
from cotune.shared.wire import (
    answer_to_records,
    ledger_to_records,
    plan_from_records,
    query_from_records,
)
from cotune.simulations.scenario import answer_plan, begin, sign_claim

HOSTILE = "site-1"  # the first to answer
NAMES = (HOSTILE, "site-2", "site-3", "site-4")
PATIENCE_S = 60.0
Reply = RecordDict | Error | list[RecordDict | Error]  # an empty list: nothing comes in time


@dataclass(frozen=True)
class Scene:
    """What the hostile site has in its hands when it is to answer a plan.

    Attributes:
        plan: What it was asked.
        update: What it would answer if it were honest.
        peers: The other sites' answers of this round.
        past: Its own honest answers of the rounds before.
        key: Its signing key.
    """

    plan: RoundPlan
    update: AdapterUpdate
    peers: Mapping[str, AdapterUpdate]
    past: Sequence[AdapterUpdate]
    key: Ed25519PrivateKey


Attack = Callable[[Scene], Reply]
LedgerAttack = Callable[[bytes, str], RecordDict]  # the true ledger and the name of the run


def honest(scene: Scene) -> RecordDict:
    """What the site itself would send."""
    return answer_to_records(scene.update)


def failing(scene: Scene) -> RecordDict:
    """No update, for a reason of the site's own."""
    return answer_to_records(SiteFailure(site=scene.plan.site, code="E-STORAGE", message="the disk is full"))


def header_of(scene: Scene, **changes: object) -> dict[str, Any]:
    """The honest header as JSON, with other values."""
    return {**scene.update.header.model_dump(mode="json"), **changes}


def records(kind: Any, header: Any, array: NDArray[Any] | Array | None) -> RecordDict:
    """Flower records of any content; a header that is no text is written as JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    made = RecordDict({"header": ConfigRecord({"kind": kind, "json": text})})
    if array is not None:
        made["adapter"] = ArrayRecord({"adapter": array if isinstance(array, Array) else Array(array)})
    return made


def edited(scene: Scene, **changes: object) -> RecordDict:
    """The honest update with a header that was changed after it was signed."""
    return records("update", header_of(scene, **changes), scene.update.payload)


def sealed(
    scene: Scene, payload: Payload | None = None, *, by: Ed25519PrivateKey | None = None, **changes: object
) -> RecordDict:
    """An update with other values that is signed all the same, by the site's own key unless another is given."""
    payload = scene.update.payload if payload is None else payload
    said = {**header_of(scene, update_sha256=payload_sha256(payload)), **changes}
    header = UpdateHeader.model_validate_json(json.dumps(said))
    said["signature"] = sign(by or scene.key, "cotune-update", header.message())
    return records("update", said, payload)


def numbers(scene: Scene, values: NDArray[np.floating]) -> RecordDict:
    """A well signed update of these numbers in fp32."""
    return sealed(scene, values.astype("<f4").view(np.uint8))


def failure(**changes: object) -> RecordDict:
    """The records of a failure, of any content."""
    return records("failure", {"site": HOSTILE, "code": "E-STORAGE", "message": "the disk is full", **changes}, None)


def head_by(key: Ed25519PrivateKey, site: str, seq: int, sha256: str) -> dict[str, Any]:
    """A ledger head that this key signed."""
    signature = sign(key, "cotune-head", head_message(site, seq, sha256))
    public = public_key_line(key.public_key())
    head = SignedHead(site=site, seq=seq, sha256=sha256, public_key=public, signature=signature)
    return head.model_dump(mode="json")


@dataclass(frozen=True)
class Ran:
    """What a coordinator has to show."""

    run: RunFolder
    outcome: Outcome
    asked: Sequence[RoundPlan]
    progress: Progress

    def bits(self) -> dict[str, bytes]:
        """The adapter to be published, every checkpoint on disk, and the fingerprints of all there were."""
        files = [*self.run.checkpoints.rglob("*.safetensors"), self.run.path / "checkpoints.jsonl"]
        found = {str(path.relative_to(self.run.path)): path.read_bytes() for path in files}
        return found | {name: array.tobytes() for name, array in self.outcome.arrays.items()}

    def said(self, site: str) -> list[str]:
        """The messages of the run's events about a site."""
        return [e["message"] for e in self.run.events() if e["type"] == "site" and e["message"].startswith(site)]

    def accounts(self) -> dict[str, list[dict[str, Any]]]:
        """The coordinator's account by site."""
        return json.loads((self.run.privacy / "accountant.json").read_text())["sites"]


class Federation:
    """Four sites that live as long as the tests; each call of `run` is a coordinator that knows nothing of others.

    Args:
        job: What is run.
        out: An empty folder.
        since: The first round in which the hostile site is hostile.

    Attributes:
        layout: Of the adapter.
        up: Of an update.
        given: Every honest answer so far.
    """

    def __init__(self, job: Job, out: Path, since: int) -> None:
        self.job, self.since, self._out = job, since, out
        self._first = create_run(out / "first", job, b"")
        begin(self._first)
        self.layout, self._config = layout_of(job, locate(job))
        self.up = returned(job.rule, self.layout, 1, job.run.rounds)
        self._evaluator = GlobalEvaluator(job)
        self.given: list[AdapterUpdate] = []
        self._given: dict[str, AdapterUpdate] = {}
        self._read: dict[str, tuple[RoundPlan, AdapterUpdate]] = {}

    def run(
        self,
        attack: Attack,
        *,
        ledger: LedgerAttack | None = None,
        patience_s: float = PATIENCE_S,
        around: Callable[[Fleet], Fleet] = lambda fleet: fleet,
    ) -> Ran:
        """All rounds of a run in which the hostile site answers so from round `since` on."""
        run, wires = self._begin(), Wires(self, attack, ledger)
        coordinator = Coordinator(run, self.layout, self._config, self._evaluator)
        outcome = coordinator.run(around(GridFleet(cast(Grid, wires), NAMES, patience_s, len(NAMES))))
        progress = load_checkpoint(run)
        assert progress is not None
        return Ran(run, outcome, wires.asked, progress)

    def publish(self, attack: Attack) -> RunFolder:
        """Such a run from its first round to its report."""
        run, wires = self._begin(), Wires(self, attack, None)
        conduct(run, GridFleet(cast(Grid, wires), NAMES, PATIENCE_S, len(NAMES)), "inline")
        return run

    def _begin(self) -> RunFolder:
        """A folder for one more coordinator, under the name the sites know."""
        folder = self._out / uuid.uuid4().hex / self._first.run_id
        shutil.copytree(self._first.path, folder, ignore=shutil.ignore_patterns("sites"))
        return RunFolder(folder)

    def read(self, content: RecordDict) -> tuple[RoundPlan, AdapterUpdate]:
        """A plan that came, and what its site answers by itself."""
        text = str(content.config_records["header"]["json"])
        if text not in self._read:
            plan, payload = plan_from_records(content)
            self._read[text] = plan, self.genuine(plan, payload)
        return self._read[text]

    def ledger(self, site: str) -> bytes:
        """A site's true ledger."""
        return (self._first.sites / site / "ledger.jsonl").read_bytes()

    def genuine(self, plan: RoundPlan, payload: Payload | None = None) -> AdapterUpdate:
        """What this site answers by itself: the same for the same plan; no payload for one it had."""
        asked = plan.model_copy(update={"notice": None}).model_dump_json()
        if asked not in self._given:
            assert payload is not None
            answer = answer_plan(plan, payload)
            assert isinstance(answer, AdapterUpdate), answer
            self._given[asked] = answer
            self.given.append(answer)
        return self._given[asked]

    def scene(self, plan: RoundPlan, update: AdapterUpdate) -> Scene:
        """What the hostile site can make its answer of; the others have their answers ready."""
        now = [u for u in self.given if u.header.round == plan.round]
        peers = {u.header.site: u for u in now if u.header.site != HOSTILE}
        past = [u for u in self.given if u.header.round < plan.round and u.header.site == HOSTILE]
        return Scene(plan, update, peers, past, SigningKey.load(self._first.sites / HOSTILE / "site.key").private)


class Wires:
    """What `GridFleet` needs of Flower's grid, within this process: each site is a node."""

    def __init__(self, federation: Federation, attack: Attack, ledger: LedgerAttack | None) -> None:
        self._federation, self._attack, self._ledger = federation, attack, ledger
        self._sent: dict[str, tuple[Message, Callable[[], Reply]]] = {}
        self.asked: list[RoundPlan] = []

    def get_node_ids(self) -> list[int]:
        """Flower's numbers of the nodes."""
        return list(range(1, len(NAMES) + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to their nodes, which train at once."""
        pushed: list[str] = []
        for message in messages:
            identifier = message.metadata.__dict__["_message_id"] = uuid.uuid4().hex  # as Flower's own grids do
            self._sent[identifier] = message, self._reply(message)
            pushed.append(identifier)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages, once."""
        arrived: list[Message] = []
        for message, reply in [self._sent.pop(identifier) for identifier in message_ids if identifier in self._sent]:
            found = reply()
            arrived += [Message(one, reply_to=message) for one in (found if isinstance(found, list) else [found])]
        return arrived

    def _reply(self, message: Message) -> Callable[[], Reply]:
        """What will be replied: the hostile site makes it up when all are ready."""
        if message.metadata.message_type == "query":
            return partial(self._read, query_from_records(message.content))
        plan, update = self._federation.read(message.content)
        if plan.site != HOSTILE:
            return partial(answer_to_records, update)
        self.asked.append(plan)
        attack = self._attack if plan.round >= self._federation.since else honest
        return lambda: attack(self._federation.scene(plan, update))

    def _read(self, request: LedgerRequest | ClaimRequest) -> RecordDict:
        if isinstance(request, ClaimRequest):
            return signed(request, sign_claim)
        ledger = self._federation.ledger(request.site)
        if request.site == HOSTILE and self._ledger is not None:
            return self._ledger(ledger, request.run_id)
        return ledger_to_records(ledger)
