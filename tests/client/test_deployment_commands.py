"""`cotune site up` and `status`: what would make every round fail has a name before a round finds it."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from tests.client.federations import invite_for

from cotune.client.courier_folder import courier_folder
from cotune.client.home import SiteHome
from cotune.client.joining import join, write_request
from cotune.server.authority import create_authority, ensure_server_certificate
from cotune.shared.cli import run
from cotune.shared.files import write_json

HOST = "localhost"


@dataclass
class Door:
    """A coordinator's gateway as far as a site's preflight goes: TLS of its own authority, a health check, a clock."""

    folder: Path
    port: int = 0
    status: int = 200
    ahead: timedelta = timedelta()
    asked: list[str] = field(default_factory=list)

    @property
    def ca(self) -> str:
        return (self.folder / "ca.crt").read_text()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    door = Door(tmp_path / "tls")
    door.folder.mkdir()
    create_authority(door.folder, "north", datetime.now(UTC))
    ensure_server_certificate(door.folder, [HOST], datetime.now(UTC))

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            door.asked.append(self.requestline + str(self.headers))
            self.send_response_only(door.status if self.path == "/health" else 404)
            self.send_header("Date", format_datetime(datetime.now(UTC) + door.ahead, usegmt=True))
            self.end_headers()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is called there
            del format, args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(door.folder / "server.crt", door.folder / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda request, client_address: None  # a client that trusts nobody hangs up
    door.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield door
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def home(make_home: Any) -> SiteHome:
    made = make_home()
    write_request(made)
    return made


@pytest.fixture
def joined_home(home: SiteHome, door: Door) -> SiteHome:
    join(home, invite_for(home, address=door.address, ca=door.ca))
    return home


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """The exit code and envelope of a command."""
    code = run(["site", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, json.loads(out)


def verdicts(envelope: dict[str, Any], name: str) -> dict[str, str]:
    """What was found of one thing, and how it was judged."""
    return {check["text"]: check["verdict"] for check in envelope["data"]["checks"] if check["name"] == name}


def break_policy(home: SiteHome) -> None:
    with (home.path / "policy.toml").open("a") as file:
        file.write("[alow]\n")


def roll_back(home: SiteHome) -> None:
    ledger = home.path / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))


def lose_data(home: SiteHome) -> None:
    Path(home.policy.dataset[0].path).unlink()


def break_courier(home: SiteHome) -> None:
    (courier_folder(home.path) / "north" / "courier.toml").write_text("federation = 3\n")


def take_socket(home: SiteHome) -> None:
    (courier_folder(home.path) / "agent.sock").write_text("a file")


@pytest.mark.parametrize(
    ("fault", "code", "exit_code"),
    [
        (break_policy, "E-POLICY-KEY", 4),
        (roll_back, "E-LEDGER-BEHIND", 1),
        (lose_data, "E-DATA-FILE", 4),
        (break_courier, "E-COURIER-VALUE", 4),
        (take_socket, "E-AGENT-SOCKET", 1),
    ],
)
def test_a_site_that_could_take_part_in_nothing_does_not_start(
    joined_home: SiteHome,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[SiteHome], None],
    code: str,
    exit_code: int,
) -> None:
    fault(joined_home)
    found, envelope = told(capsys, "up", "--home", joined_home.path)
    assert (found, envelope["error"]["code"]) == (exit_code, code)
    assert envelope["error"]["hint"]
    assert not (joined_home.path / "up.json").exists(), "nothing was started"


def test_a_site_that_joined_nothing_does_not_start(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    code, envelope = told(capsys, "up", "--home", home.path)
    assert (code, envelope["error"]["code"]) == (4, "E-NOT-JOINED")
    assert "join INVITE" in envelope["error"]["hint"]
    code, envelope = told(capsys, "status", "--home", home.path)
    assert (code, verdicts(envelope, "federations")) == (1, {"none joined": "fault"})


def test_a_courier_user_who_is_not_there_is_named(joined_home: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    code, envelope = told(capsys, "up", "--home", joined_home.path, "--courier-user", "nobody-of-that-name")
    assert (code, envelope["error"]["code"]) == (4, "E-COURIER-USER")


def test_status_of_a_site_that_is_ready(
    joined_home: SiteHome,
    door: Door,
    notes: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COTUNE_FOOTPRINT")
    code, envelope = told(capsys, "status", "--home", joined_home.path)
    assert (code, envelope["status"]) == (0, "ok"), envelope
    assert verdicts(envelope, "data notes") == {"its file is the one the ledger knows": "ok"}
    assert verdicts(envelope, "budget notes") == {"epsilon 4.000 of 4 left": "ok"}
    assert verdicts(envelope, "agent") == {"not running": "note"}
    assert verdicts(envelope, "energy") == {"no round was measured": "ok"}
    assert set(verdicts(envelope, "north").values()) == {"ok"}
    assert door.asked and "st-mary" not in "".join(door.asked), "a look tells nobody who looked"
    before = (joined_home.path / "ledger.jsonl").read_bytes()
    notes.write_text(notes.read_text() + notes.read_text().splitlines()[0] + "\n")
    code, envelope = told(capsys, "status", "--home", joined_home.path)
    [(text, verdict)] = verdicts(envelope, "data notes").items()
    assert (code, verdict) == (0, "note") and "changed" in text
    notes.unlink()
    code, envelope = told(capsys, "status", "--home", joined_home.path)
    [(text, verdict)] = verdicts(envelope, "data notes").items()
    assert (code, verdict) == (1, "fault") and "E-DATA-FILE" in text and envelope["error"]["code"] == "E-SITE-STATUS"
    assert (joined_home.path / "ledger.jsonl").read_bytes() == before, "to look is not to log"


def test_status_adds_up_the_energy_of_all_runs(joined_home: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    for run_id, used in (("run-1", 0.002), ("run-2", 0.0005)):
        write_json(joined_home.footprint_path(run_id), {"energy_kwh": used, "co2_kg": used / 2})
    _, envelope = told(capsys, "status", "--home", joined_home.path)
    [text] = verdicts(envelope, "energy")
    assert text.startswith("2.50 Wh, 1.25 g CO2 equivalent for 2 runs") and str(joined_home.path) in text


def sick(door: Door, home: SiteHome) -> None:
    del home
    door.status = 503


def ten_minutes_behind(door: Door, home: SiteHome) -> None:
    del home
    door.ahead = timedelta(minutes=10)


def ten_seconds_ahead(door: Door, home: SiteHome) -> None:
    del home
    door.ahead = timedelta(seconds=-10)


def another_authority(door: Door, home: SiteHome) -> None:
    """The site joined with a certificate that did not sign this server's."""
    other = door.folder.parent / "other"
    other.mkdir()
    create_authority(other, "north", datetime.now(UTC))
    join(home, invite_for(home, address=door.address, ca=(other / "ca.crt").read_text()))


def swapped_pin(door: Door, home: SiteHome) -> None:
    """Whoever has the courier's folder puts an authority of his own there."""
    another_authority(door, home)
    (courier_folder(home.path) / "north" / "ca.crt").write_text(door.ca)


def nobody_there(door: Door, home: SiteHome) -> None:
    join(home, invite_for(home, address="localhost:1", ca=door.ca))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (sick, "E-UPSTREAM"),
        (ten_minutes_behind, "E-CLOCK"),
        (ten_seconds_ahead, "E-CLOCK"),
        (another_authority, "E-CERT-CA"),
        (swapped_pin, "not the certificate this site joined with"),
        (nobody_there, "E-REACH"),
    ],
)
def test_status_names_what_keeps_a_site_from_its_coordinator(
    joined_home: SiteHome,
    door: Door,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Door, SiteHome], None],
    word: str,
) -> None:
    spoil(door, joined_home)
    code, envelope = told(capsys, "status", "--home", joined_home.path)
    failed = [text for text, verdict in verdicts(envelope, "north").items() if verdict == "fault"]
    assert code == 1
    assert len(failed) == 1 and word in failed[0], failed


def test_status_of_a_home_that_cannot_be_opened_says_so_and_ends(
    joined_home: SiteHome, capsys: pytest.CaptureFixture[str]
) -> None:
    roll_back(joined_home)
    code, envelope = told(capsys, "status", "--home", joined_home.path)
    [(text, verdict)] = verdicts(envelope, "home").items()
    assert (code, verdict) == (1, "fault") and "E-LEDGER-BEHIND" in text
    assert envelope["error"]["hint"]


def test_down_of_a_site_that_is_not_up_says_so(joined_home: SiteHome, capsys: pytest.CaptureFixture[str]) -> None:
    code, envelope = told(capsys, "down", "--home", joined_home.path)
    assert (code, envelope["data"]["ran"]) == (0, False)
