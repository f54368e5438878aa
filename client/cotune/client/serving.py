"""A service on a Unix socket that one user may use, and the process that offers it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import signal
import socket as sockets
import stat
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import grpc

from cotune.client.frames import MAX_FRAME
from cotune.shared.errors import JobError, RefusedError, StorageError, place_of
from cotune.shared.files import storage_errors

SERVICE = "cotune.Agent"
THREADS = 12
LIMITS = [
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_send_message_length", MAX_FRAME),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # a courier that waits looks whether we live
]
LONGEST_PATH = 107  # bytes; sockaddr_un
SWEEP_S = 60.0
STOP_S = 8.0  # below what a supervisor waits before it kills


class Methods(Protocol):
    """What is offered: frames in, frames out."""

    def train(self, frame: bytes, hung_up: Callable[[Callable[[], None]], object]) -> Iterator[bytes]:
        """Answer with any number of frames."""
        ...

    def propose(self, frame: bytes) -> bytes:
        """Answer with one; so do the next three."""
        ...

    def countersign(self, frame: bytes) -> bytes: ...  # noqa: D102

    def ledger(self, frame: bytes) -> bytes: ...  # noqa: D102

    def describe(self, frame: bytes) -> bytes: ...  # noqa: D102

    def failure(self, error: Exception) -> bytes:
        """The answer that says what went wrong."""
        ...

    def sweep(self) -> None:
        """Called now and then."""
        ...

    def close(self) -> None:
        """Called once nothing is answered any more."""
        ...


def serve(methods: Methods, socket: Path, user: str | None) -> None:
    """Offer the methods until SIGTERM or SIGINT.

    Edge cases: a frame beyond MAX_FRAME is refused by its length, before it is taken into memory; more requests
    at once than there are threads are refused (both RESOURCE_EXHAUSTED).

    Args:
        methods: What is offered.
        socket: Where; it and its folder are for one user alone.
        user: Who that is, if not this process's own.

    Raises:
        RefusedError: E-AGENT-RUNNING: somebody listens there.
        StorageError: E-AGENT-SOCKET: there cannot be a socket.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    pool = ThreadPoolExecutor(THREADS, "answer")
    server = grpc.server(pool, [_handlers(methods)], options=LIMITS, maximum_concurrent_rpcs=THREADS)
    _listen(server, socket, user)
    server.start()
    while not stop.wait(SWEEP_S):
        methods.sweep()
    server.stop(STOP_S).wait()
    methods.close()


@contextlib.contextmanager
def alone(lock: Path) -> Generator[None]:
    """Be the only agent of a home, also where two were given two sockets.

    Raises:
        RefusedError: E-AGENT-RUNNING.
    """
    with storage_errors(lock):
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _running(lock.parent, os.pread(file, 20, 0).decode(errors="replace")) from None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)


def shut_in() -> None:
    """Make this process leave nothing behind: no core dump, no file for others, no telemetry, no text of an exception.

    A base model may still be fetched from the hub, where a site allows it.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "FLWR_TELEMETRY_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    sys.excepthook = lambda kind, error, _trace: say(f"E-INTERNAL  {kind.__name__} at {place_of(error)}")
    threading.excepthook = lambda seen: say(f"E-INTERNAL  {seen.exc_type.__name__}")


def say(text: str) -> None:
    """A line of the log."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _handlers(methods: Methods) -> grpc.GenericRpcHandler:
    def once(method: Callable[[bytes], bytes]) -> grpc.RpcMethodHandler[bytes, bytes]:
        def answer(frame: bytes, _context: grpc.ServicerContext) -> bytes:
            try:
                return method(frame)
            except Exception as error:  # noqa: BLE001 - left to grpc, its text would be sent and logged
                return methods.failure(error)

        return grpc.unary_unary_rpc_method_handler(answer)

    def train(frame: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from methods.train(frame, context.add_callback)
        except Exception as error:  # noqa: BLE001 - as above
            yield methods.failure(error)

    named = {
        "Train": grpc.unary_stream_rpc_method_handler(train),
        "Propose": once(methods.propose),
        "Ledger": once(methods.ledger),
        "Countersign": once(methods.countersign),
        "Describe": once(methods.describe),
    }
    return grpc.method_handlers_generic_handler(SERVICE, named)


def _listen(server: Any, socket: Path, user: str | None) -> None:
    require_place(socket)
    try:
        bound = server.add_insecure_port(f"unix:{socket}")
    except RuntimeError:
        bound = 0
    if not bound:
        raise StorageError("E-AGENT-SOCKET", f"{socket}: cannot be listened on", hint="cotune site status")
    with storage_errors(socket):
        socket.chmod(0o600)
    if user is not None:
        give(socket, user)


def give(path: Path, user: str) -> None:
    """Give a file or folder to another user.

    Raises:
        JobError: E-COURIER-USER: there is none of that name, or it takes rights this process lacks.
    """
    try:
        shutil.chown(path, user)
    except (LookupError, PermissionError) as error:
        why = "no such user" if isinstance(error, LookupError) else "this takes root"
        raise JobError(
            "E-COURIER-USER", f"{path} cannot be given to {user!a}: {why}", param="--courier-user", hint="useradd"
        ) from None


def require_place(socket: Path) -> None:
    """Clear a socket away that nobody listens on; see that there can be one.

    Raises:
        RefusedError: E-AGENT-RUNNING: somebody listens on it.
        StorageError: E-AGENT-SOCKET: the path is too long, or there is something else.
    """
    if len(os.fsencode(socket)) > LONGEST_PATH:
        raise StorageError(
            "E-AGENT-SOCKET", f"{socket}: a socket's path has at most {LONGEST_PATH} bytes", hint="a shorter --home"
        )
    try:
        mode = socket.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StorageError("E-AGENT-SOCKET", f"{socket}: there is something that is no socket", hint=f"rm {socket}")
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(socket))
        except ConnectionRefusedError:
            with storage_errors(socket):
                socket.unlink(missing_ok=True)
            return
        except OSError as error:
            raise StorageError("E-AGENT-SOCKET", f"{socket}: {error.strerror}") from None
    raise _running(socket, "")


def _running(what: Path, pid: str) -> RefusedError:
    by = f" (process {pid})" if pid.isdigit() else ""
    return RefusedError("E-AGENT-RUNNING", f"{what}: an agent runs already{by}", hint="cotune site status")
