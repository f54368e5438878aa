"""A process that trains, one for each of the engine's couriers: it may die without taking the courier along.

Flower keeps a courier that died in its pool, and every later task that meets it fails. So the courier only carries
messages; the warm model lives in a child process, which is started again when it has died.

Frames on both pipes: a JSON line, then as many bytes as its `bytes` says.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import IO, Any

import numpy as np

from cotune.shared.codec import Payload
from cotune.shared.plan import RoundPlan
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure, UpdateHeader


class Worker:
    """A child process that answers plans; started at the first one, and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def answer(self, plan: RoundPlan, adapter: Payload) -> Answer:
        """What `scenario.answer_plan` says in the child.

        Raises:
            ChildProcessError: The child died over it. Flower tells the coordinator that there is no answer: a site
                that said so itself would not be asked again, as any site could.
        """
        process = self._running()
        assert process.stdin is not None and process.stdout is not None  # noqa: S101 - made with pipes
        try:
            _send(process.stdin, plan.model_dump(mode="json", by_alias=True), adapter)
            header, payload = _receive(process.stdout)
        except (OSError, EOFError, ValueError):
            process.communicate()
            self._process = None
            raise ChildProcessError(f"the process that trained it died ({process.returncode})") from None
        if "failure" in header:
            return SiteFailure.model_validate(header["failure"])
        return AdapterUpdate(UpdateHeader.model_validate(header["update"]), payload)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "cotune.simulations.worker"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process


_WORKER = Worker()


def answer(plan: RoundPlan, adapter: Payload) -> Answer:
    """What this process's worker says; a `courier.Answerer`.

    A function, because Ray copies the app with every message: a worker in it would be a new one each time.
    """
    return _WORKER.answer(plan, adapter)


def _send(pipe: IO[bytes], header: dict[str, Any], payload: Payload | None = None) -> None:
    content = b"" if payload is None else payload.tobytes()
    pipe.write(json.dumps({"header": header, "bytes": len(content)}).encode() + b"\n" + content)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], Payload]:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    frame = json.loads(line)
    content = pipe.read(frame["bytes"])
    if len(content) < frame["bytes"]:
        raise EOFError
    return frame["header"], np.frombuffer(content, dtype=np.uint8)


def main() -> None:
    """Answer plans until the courier closes the pipe."""
    from cotune.simulations.scenario import answer_plan

    requests = sys.stdin.buffer
    # Libraries may print: what they print must not get among the frames.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                header, adapter = _receive(requests)
                answer = answer_plan(RoundPlan.model_validate(header), adapter)
                if isinstance(answer, SiteFailure):
                    _send(answers, {"failure": answer.model_dump()})
                else:
                    _send(answers, {"update": answer.header.model_dump(mode="json")}, answer.payload)


if __name__ == "__main__":
    main()
