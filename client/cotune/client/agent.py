"""The site's agent: data, base model, policy, keys and ledger behind a Unix socket. Whoever may use the socket, the
courier, gets what `Site` lets out and nothing else. Run as `python -m cotune.client.agent --home HOME --socket SOCKET`.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from cotune.client.answering import device_text, failure_of, own_records, warm_trainer
from cotune.client.considering import consider
from cotune.client.countersigning import countersign
from cotune.client.data import SiteExamples, prepare
from cotune.client.frames import MAX_FRAME, answer_frame, foreign, pack, read_plan, unpack
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.policy import DatasetPolicy
from cotune.client.serving import alone, say, serve, shut_in
from cotune.client.site import Site
from cotune.client.work import WorkFolders
from cotune.shared.chain import reserved
from cotune.shared.codec import Payload
from cotune.shared.errors import (
    ConnectionFailed,
    CotuneError,
    ModelError,
    PrivacyError,
    RefusedError,
    RunFailed,
    place_of,
)
from cotune.shared.footprint import country, measuring
from cotune.shared.job import Job
from cotune.shared.model import locate
from cotune.shared.plan import ClaimRequest, LedgerRequest, RoundPlan, cotune_version
from cotune.shared.proposal import Proposal
from cotune.shared.update import Answer, SiteFailure
from cotune.shared.warm import loads, warm_network

MOST_WAITING = 4  # requests to train, the one that trains among them
PUBLIC = (RefusedError, ConnectionFailed, ModelError, PrivacyError, RunFailed)  # the rest may name what is the site's
Say = Callable[[str], None]
Asked = TypeVar("Asked", bound=BaseModel)


@dataclass(frozen=True, repr=False)
class HomeRecords:
    """`SiteData` of a real site: the file its policy names."""

    home: SiteHome

    def load(self, job: Job, site: str, dataset: DatasetPolicy) -> SiteExamples:
        """The data set's records as examples with their units."""
        del site  # a home has one
        return prepare(own_records(self.home, dataset, job), warm_network(job)[1], job)


class Agent:
    """What the socket's methods do.

    Guarantee: an answer holds what `Site.train`, `consider`, `countersign` and `Guard` give away, or a failure in
    public words. No text of an exception that cotune did not foresee gets out, or into the log.

    Edge cases: one request trains at a time, the next few wait, any more are refused by name (E-AGENT-BUSY); the
    other methods answer meanwhile. A request whose courier is gone is not begun; one that was begun is finished,
    so that its charge buys an update that can be asked for again.

    Args:
        home: The site's home. It is opened anew for each request: a ledger whose disk failed is not trusted again.
        say: Where a line a round goes.
    """

    def __init__(self, home: Path, say: Say) -> None:
        self._path, self._say = home, say
        opened = SiteHome.open(home)
        self._name, self._key = opened.name, opened.ledger.head.public_key
        self._work = WorkFolders(home / "work")
        self._trains = ThreadPoolExecutor(1, "train")
        self._places = threading.BoundedSemaphore(MOST_WAITING)
        self._job: Job | None = None
        self._doing: dict[str, Any] | None = None

    def train(self, frame: bytes, hung_up: Callable[[Callable[[], None]], object]) -> Iterator[bytes]:
        """Answer a plan: a frame a step, then the answer.

        Args:
            frame: The plan and the encoded global adapter.
            hung_up: Takes what is to be called when the courier is gone.
        """
        if not self._places.acquire(blocking=False):
            what = f"{self._name}: {MOST_WAITING} requests to train are here already"
            yield answer_frame(SiteFailure(site=self._name, code="E-AGENT-BUSY", message=what, exit_code=3))
            return
        frames: SimpleQueue[bytes | None] = SimpleQueue()

        def over(_task: Future[None]) -> None:
            self._places.release()
            frames.put(None)

        def forget() -> None:
            task.cancel()

        task = self._trains.submit(self._answer, frame, frames.put)
        task.add_done_callback(over)
        hung_up(forget)
        while (said := frames.get()) is not None:
            yield said

    def propose(self, frame: bytes) -> bytes:
        """Say where a proposed job stands."""
        asked = _read(Proposal, frame, "proposal")
        return pack({"standing": consider(SiteHome.open(self._path), asked).model_dump(mode="json")})

    def ledger(self, frame: bytes) -> bytes:
        """Hand out the ledger, the proof of what a run cost here, to a run that was charged here and is over."""
        asked = _read(LedgerRequest, frame, "request")
        home = SiteHome.open(self._path)
        if asked.site != self._name or not reserved(home.ledger.entries, run_id=asked.run_id):
            raise RefusedError(
                "E-PLAN", f"{self._name}: {asked.run_id} took no round here, so there is no proof to give"
            )
        if not (self._doing and self._doing["run_id"] == asked.run_id):
            self._work.end(asked.run_id)
        content = (home.path / "ledger.jsonl").read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # another thread may be writing a line
        return pack({"ledger": asked.run_id}, np.frombuffer(whole, dtype=np.uint8))

    def countersign(self, frame: bytes) -> bytes:
        """Sign a run's claim, if this site's own ledger bears it out."""
        return pack({"signature": countersign(SiteHome.open(self._path), _read(ClaimRequest, frame, "request"))})

    def describe(self, frame: bytes) -> bytes:
        """Who this is and what it does, without opening the home: always answered."""
        del frame  # it asks nothing
        who = {"site": self._name, "public_key": self._key, "cotune": cotune_version(), "pid": os.getpid()}
        doing = {"training": self._doing, "model_loads": loads(), "device": device_text()}
        return pack({"agent": {**who, **doing}})

    def failure(self, error: Exception) -> bytes:
        """An error as a frame."""
        return answer_frame(self._told(error))

    def sweep(self) -> None:
        """Remove what runs that were left have in the home."""
        self._work.sweep()

    def close(self) -> None:
        """Finish the round that is being trained, and begin no other."""
        self._trains.shutdown(cancel_futures=True)

    def _answer(self, frame: bytes, say: Callable[[bytes], None]) -> None:
        try:
            plan, adapter = read_plan(frame)
            answer = self._train(plan, adapter, lambda step: say(pack({"step": step})))
            what = f"{plan.run_id} round {plan.round}"
            self._say(f"{what}: {answer.code if isinstance(answer, SiteFailure) else 'gave its update'}")
            told = answer_frame(answer)
            if len(told) > MAX_FRAME:
                raise ConnectionFailed("E-MESSAGE-SIZE", f"{what}: the update is larger than {MAX_FRAME:,} bytes")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told in public words
            told = self.failure(error)
        say(told)

    def _train(self, plan: RoundPlan, adapter: Payload, progress: Callable[[int], None]) -> Answer:
        self._doing = {"run_id": plan.run_id, "round": plan.round}
        try:
            home = SiteHome.open(self._path)
            with measuring(home.footprint_path(plan.run_id)):
                self._let_in(Guard(home), plan)
                work = self._work.of(plan.run_id)
                return Site(Guard(home), HomeRecords(home), work).train(plan, adapter, warm_trainer(plan.job), progress)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told in public words
            return self._told(error)
        finally:
            self._doing = None
            if plan.round == plan.job.run.rounds:
                self._work.end(plan.run_id)

    def _let_in(self, guard: Guard, plan: RoundPlan) -> None:
        """Ask the guard before a base model is fetched, and again before it is loaded: both take what is not free.

        `Site.train` asks it in any case; so a job that is loaded already need not be asked here.
        """
        if plan.job != self._job:
            self._job = None
            guard.admit(plan, None)
            guard.admit(plan, locate(plan.job).sha256)
            self._job = plan.job

    def _told(self, error: Exception) -> SiteFailure:
        """An error as others may see it; for the log too, but for what is the site's own."""
        said = failure_of(self._name, error)
        if not isinstance(error, CotuneError):
            self._say(f"{said.code}  {type(error).__name__} at {place_of(error)}")
        elif not isinstance(error, PUBLIC):
            self._say(f"{error.code}  {error.message}")
            said = said.model_copy(update={"message": f"{self._name}: a fault of the site's own, which its log names"})
        return said


def _read(kind: type[Asked], frame: bytes, name: str) -> Asked:
    header, _ = unpack(frame)
    try:
        return kind.model_validate(header.get(name))
    except ValidationError:
        raise foreign(f"a {name}") from None


def main() -> None:
    """Answer on a socket until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m cotune.client.agent", description="The agent of a site.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--courier-user", help="who else may use the socket; needs root")
    asked = parser.parse_args()
    shut_in()
    try:
        country()
        agent = Agent(asked.home, say)
        with alone(asked.home / "agent.lock"):
            serve(agent, asked.socket, asked.courier_user)
    except CotuneError as error:
        say(f"{error.code}  {error.message}" + (f"\n  mend it: {error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
