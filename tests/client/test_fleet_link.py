"""A courier's calls to a coordinator that is there but does not answer as it should."""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
import time
from collections.abc import Callable, Generator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.server.doors import make_tls

from cotune.client.courier_folder import CourierFolder, CourierSettings, furnish_courier
from cotune.client.fleet_link import FleetLink
from cotune.shared.errors import ConnectionFailed

Answer = Callable[[BaseHTTPRequestHandler], None]
TEN_MINUTES = 600


@contextlib.contextmanager
def coordinator(folder: Path, answer: Answer) -> Generator[FleetLink]:
    """A link to a server with a certificate of its own that answers every call so."""
    tls = make_tls(folder / "tls")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library calls it so
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    furnish_courier(folder / "courier")
    courier = CourierFolder(folder / "courier" / "north")
    settings = CourierSettings(federation="north", address=f"localhost:{server.server_port}", site="st-mary")
    courier.write(settings, tls.ca.read_text())
    link = FleetLink(courier)
    try:
        yield link
    finally:
        link.close()
        server.shutdown()
        server.server_close()


def unauthorised(seconds_behind: float) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response_only(401)
        handler.send_header("date", formatdate(time.time() - seconds_behind, usegmt=True))
        handler.send_header("content-length", "0")
        handler.end_headers()

    return answer


@pytest.mark.parametrize(
    ("behind", "code"), [(TEN_MINUTES, "E-CLOCK"), (-TEN_MINUTES, "E-CLOCK"), (0, "E-NODE-REFUSED")]
)
def test_a_clock_that_is_off_is_named_and_not_taken_for_a_refusal_of_the_key(
    tmp_path: Path, behind: float, code: str
) -> None:
    with coordinator(tmp_path, unauthorised(behind)) as link, pytest.raises(ConnectionFailed) as caught:
        link.activate()
    assert caught.value.code == code
    if behind:
        said = re.search(r"clock is (-?\d+) s", caught.value.message)
        assert said and abs(int(said[1]) - behind) <= 5


def test_a_heartbeat_on_a_dead_line_ends_long_before_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.client.bounded_sending.HEARTBEAT_TIMEOUT_S", 0.3)
    for_ever = threading.Event()

    def silent(_: BaseHTTPRequestHandler) -> None:
        for_ever.wait(30)

    with coordinator(tmp_path, silent) as link:
        link.node_id, began = 7, time.monotonic()
        with pytest.raises(ConnectionFailed) as caught:
            link.heartbeat()
        waited = time.monotonic() - began
        for_ever.set()
    assert caught.value.code == "E-COORDINATOR-AWAY"
    assert 0.2 < waited < 10, "the other calls wait for two minutes"
