"""A site's courier for one federation: fetches a message, asks the site's agent, sends the answer.

Run as `python -m cotune.client.courier_process --folder COURIER/FEDERATION`. It reads no record, holds no policy and
runs nothing that a coordinator sent. Flower's own client would start a process for each message, and stays away for
good after one failed heartbeat; this one does neither.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import RecordDict

from cotune.client.agent_link import AgentLink
from cotune.client.bounded_sending import SIZE
from cotune.client.courier import refused, signed, trained
from cotune.client.courier_folder import CourierFolder
from cotune.client.fleet_link import AWAY, CLOCK, REFUSED, TLS, FleetLink, Incoming, RunOver, read_incoming
from cotune.client.mailbox import Mailbox
from cotune.shared.bundle import require_bundle
from cotune.shared.errors import ConnectionFailed, CotuneError, RefusedError, RunFailed, StorageError
from cotune.shared.files import write_json
from cotune.shared.plan import ClaimRequest
from cotune.shared.proposal import Proposal
from cotune.shared.wire import ledger_to_records, query_from_records, standing_to_records

PATIENCE_S = 90.0  # Flower keeps a dead courier's place for twice its heartbeat, at most a minute by default
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
HEARTBEAT_SHARE = 0.8
MAX_RUNS = 100
KEPT_OUT = (REFUSED, TLS, CLOCK)
ANSWERED_BY_NAME = (SIZE, "E-WIRE")  # the rest is tried again


class Courier:
    """What a courier does, and where it stands.

    Args:
        folder: The courier's folder for one federation, which nobody else holds.
    """

    def __init__(self, folder: CourierFolder) -> None:
        self._folder, self._settings = folder, folder.settings
        self._link, self._agent, self._mailbox = FleetLink(folder), AgentLink(folder.socket), Mailbox(folder.path)
        self._bundles: dict[int, RefusedError | None] = {}
        self._pulled: bytes | None = None  # until the disk has it
        self._stop, self._noting, self._state = threading.Event(), threading.Lock(), ""

    def run(self) -> None:
        """Carry messages until SIGTERM.

        Raises:
            ConnectionFailed: E-NODE-REFUSED, E-TLS or E-CLOCK: the coordinator did not let it in, or is another,
                for longer than a dead courier's place is kept.
        """
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        try:
            self._enter()
            heart.start()
            for wait_s in self._waits():
                self._stop.wait(wait_s)
        finally:
            self._stop.set()
            if heart.ident:
                heart.join(timeout=LONGEST_WAIT_S)  # a late heartbeat would bring the node back
            with contextlib.suppress(ConnectionFailed, RunOver):
                self._link.deactivate()
            self._link.close()

    def _waits(self) -> Iterator[float]:
        """Work; yields how long to wait before the next piece of it."""
        failed_s = FIRST_WAIT_S
        while True:
            try:
                worked = self._step()
                failed_s = FIRST_WAIT_S
                yield 0.0 if worked else self._settings.poll_s
            except RunOver:
                self._forget()
            except (ConnectionFailed, StorageError) as error:
                self._note("away", error)
                yield failed_s
                failed_s = min(2 * failed_s, LONGEST_WAIT_S)
                if error.code in KEPT_OUT:
                    self._enter()

    def _step(self) -> bool:
        """One piece of work: send an answer that is there, or make one; False if there is nothing to do."""
        kept = self._mailbox.incoming or self._pulled
        with _given_up():
            incoming = read_incoming(kept) if kept else None
        if incoming is None:
            incoming = self._link.pull()
            self._note("online")
        if incoming is None:
            return False
        self._pulled = incoming.raw
        if incoming.is_expired or incoming.message.metadata.dst_node_id != self._link.node_id:
            raise RunOver
        outgoing = self._mailbox.outgoing
        if outgoing:
            with _given_up():
                self._link.push(outgoing)
            self._note("online")
            with contextlib.suppress(ConnectionFailed, RunOver):
                self._link.confirm(incoming)
            self._forget()
            self._say("answer sent")
            return True
        self._mailbox.take_in(incoming.raw)
        answer = self._answer(incoming)
        if incoming.is_expired:
            raise RunOver
        self._mailbox.put_out(self._link.packed(answer, incoming))
        return True

    def _forget(self) -> None:
        self._pulled = None
        self._mailbox.clear()

    def _answer(self, incoming: Incoming) -> RecordDict:
        """The answer to a message.

        Guarantee: nothing reaches the agent of a run whose bundle is not this version's own, byte for byte, and no
        text of an unforeseen error gets out, only its type's name.

        Edge cases: a message that is too large, malformed or of no kind we know is answered with a failure's name.
        """
        try:
            self._require_bundle(incoming.run_id)
            return self._asked(incoming.message.metadata.message_type, self._link.content(incoming))
        except ConnectionFailed as error:
            if error.code not in ANSWERED_BY_NAME:
                raise
            said = error
        except CotuneError as error:
            said = error
        except RunOver:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the coordinator must not wait for it, nor read it
            said = RunFailed("E-INTERNAL", type(error).__name__)
        self._say(f"refused: {said.code}")
        return refused(said)

    def _asked(self, kind: str, records: RecordDict) -> RecordDict:
        if kind == "train":
            return trained(records, lambda plan, payload: self._agent.train(plan, payload, lambda _step: None))
        if kind != "query":
            raise ConnectionFailed("E-WIRE", "the message is of a kind no courier carries")
        asked = query_from_records(records)
        if isinstance(asked, Proposal):
            return standing_to_records(self._agent.propose(asked))
        if isinstance(asked, ClaimRequest):
            return signed(asked, self._agent.countersign)
        return ledger_to_records(self._agent.ledger(asked))

    def _require_bundle(self, run_id: int) -> None:
        """Hold a run's bundle against this version's, once."""
        if run_id not in self._bundles:
            if len(self._bundles) >= MAX_RUNS:
                self._bundles.clear()
            try:
                require_bundle(self._link.bundle(run_id))
                self._bundles[run_id] = None
            except RefusedError as error:
                self._bundles[run_id] = error
        if refusal := self._bundles[run_id]:
            raise refusal

    def _enter(self) -> None:
        """Become the node: at once by its known number, or as soon as the place of one that died is free."""
        self._link.node_id = self._known_node()
        self._note("connecting")
        began, wait_s = time.monotonic(), FIRST_WAIT_S
        while True:
            try:
                self._come_back()
                self._note("online")
                return
            except ConnectionFailed as error:
                self._note("away" if error.code == AWAY else "refused", error)
                if error.code == AWAY:
                    began = time.monotonic()  # nobody refused anything
                elif time.monotonic() - began > PATIENCE_S:
                    raise
            self._stop.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S / 3)

    def _come_back(self) -> None:
        if self._link.node_id:
            try:
                self._link.heartbeat()
                return
            except ConnectionFailed as error:
                if error.code != REFUSED:
                    raise
                self._link.node_id = 0  # it is no longer ours, perhaps another's: not to be signed off
        self._link.activate()

    def _beat(self) -> None:
        """Say again and again that this node lives, whatever happens in between."""
        wait_s = HEARTBEAT_SHARE * self._settings.heartbeat_s
        while not self._stop.wait(wait_s):
            try:
                self._come_back()
                wait_s = HEARTBEAT_SHARE * self._settings.heartbeat_s
            except Exception as error:  # noqa: BLE001 - a thread that ended would leave the site away for good
                self._say(f"heartbeat failed: {error.code if isinstance(error, CotuneError) else type(error).__name__}")
                wait_s = FIRST_WAIT_S * 2

    def _known_node(self) -> int:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((self._folder.path / "courier.json").read_bytes())["node_id"])
        return 0

    def _note(self, state: str, error: CotuneError | None = None) -> None:
        """Write down where this courier stands, when it changes; `cotune site status` reads it."""
        said = f"{state} {error.code}  {error.message}" if error else state
        with self._noting:
            if said == self._state:
                return
            self._state = said
            self._say(said)
            where = {
                "state": state,
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
                "pid": os.getpid(),
                "node_id": self._link.node_id,
                "code": error.code if error else None,
                "message": error.message if error else None,
            }
            with contextlib.suppress(StorageError):
                write_json(self._folder.path / "courier.json", where)

    def _say(self, what: str) -> None:
        sys.stderr.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {self._settings.federation}: {what}\n")


@contextlib.contextmanager
def _given_up() -> Generator[None]:
    """What was kept and cannot be read any more, or what Flower will never take, is not tried again."""
    try:
        yield
    except ConnectionFailed as error:
        if error.code == "E-WIRE":
            raise RunOver from None
        raise


def main() -> None:
    """Carry messages until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m cotune.client.courier_process", description=(__doc__ or "")[:80])
    parser.add_argument("--folder", type=Path, required=True, help="the courier's folder for one federation")
    folder = CourierFolder(parser.parse_args().folder.absolute())
    signal.signal(signal.SIGTERM, _end)
    try:
        with folder.alone():
            Courier(folder).run()
    except CotuneError as error:
        sys.stderr.write(f"{error.code}  {error.message}\n" + (f"  mend it: {error.hint}\n" if error.hint else ""))
        sys.exit(error.exit_code)


def _end(_signal: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)  # whatever it was at, what counts is on the disk


if __name__ == "__main__":
    main()
