"""The agent through its real socket: one round at a time, one model a process, and nothing but what a site lets out."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tests.client.agents import NAME, RealSite, until, update_of

from cotune.client.agent_link import SERVICE, AgentLink
from cotune.client.frames import MAX_FRAME, read_answer, unpack
from cotune.client.home import SiteHome
from cotune.client.serving import alone, require_place
from cotune.shared.bundle import bundle_sha256
from cotune.shared.chain import read_chain, reserved
from cotune.shared.errors import CotuneError, RefusedError, StorageError
from cotune.shared.footprint import footprint
from cotune.shared.plan import ClaimRequest, LedgerRequest
from cotune.shared.proposal import Proposal
from cotune.shared.signing import verify
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure, payload_sha256

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path: Path, tiny_causal: Path) -> RealSite:
    return RealSite.make(tmp_path, tiny_causal)


@pytest.fixture
def process(site: RealSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.delenv("COTUNE_FOOTPRINT")
    with site.agent(tmp_path / "agent.log") as process:
        yield process


def frames(site: RealSite, method: str, frame: bytes) -> list[bytes]:
    """What comes back for any bytes, read without the courier's own link."""
    with grpc.insecure_channel(f"unix:{site.socket}", [("grpc.max_send_message_length", -1)]) as channel:
        return list(channel.unary_stream(f"/{SERVICE}/{method}")(frame, timeout=60))


def proposal(site: RealSite, **changes: Any) -> Proposal:
    said = {"run_id": "run-1", "job": site.job, "site": NAME, "bundle_sha256": bundle_sha256(), **changes}
    return Proposal(**said)


def test_a_life_of_an_agent(site: RealSite, process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """In one process, because each start loads the model library: what holds of a site's rounds holds one by one."""
    _it_is_closed_to_others(site, process)
    _it_loads_its_model_once(site)
    _it_keeps_what_it_used_of_energy(site)
    _it_answers_while_it_trains(site)
    _it_trains_one_at_a_time(site)
    _it_finishes_for_a_courier_that_hung_up(site)
    _it_keeps_features_in_its_home_until_a_run_is_over(site)
    _it_says_what_a_frame_lacks(site)
    _it_gives_its_ledger_to_runs_it_took_part_in(site)
    _it_refuses_a_frame_that_is_too_large_before_it_is_in_memory(site, process)
    _a_second_one_is_refused(site, process)
    assert "study" not in (tmp_path / "agent.log").read_text().replace("st-mary", "")


def _it_is_closed_to_others(site: RealSite, process: subprocess.Popen[bytes]) -> None:
    mode = site.socket.stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    assert psutil.Process(process.pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
    said = site.link().describe()
    assert (said["site"], said["pid"], said["training"], said["model_loads"]) == (NAME, process.pid, None, 0)
    assert str(site.home) not in str(said)


def _it_loads_its_model_once(site: RealSite) -> None:
    """Several rounds, then another run of the same model."""
    for plan in (site.plan(1), site.plan(2), site.plan(3), site.plan(1, run_id="run-2")):
        update = update_of(site.ask(plan))
        header = update.header
        assert header.update_sha256 == payload_sha256(update.payload)
        assert verify(header.head.public_key, "cotune-update", header.message(), header.signature)
        assert np.array_equal(update_of(site.ask(plan)).payload, update.payload)
        assert site.charges(plan.round, plan.run_id) == 1
    assert site.link().describe()["model_loads"] == 1


def _it_keeps_what_it_used_of_energy(site: RealSite) -> None:
    """By run, all rounds of it, in a file that is nobody else's to read."""
    kept = SiteHome.open(site.home).footprint_path
    earlier = footprint(kept("run-1"))
    update_of(site.ask(site.plan(11)))
    now = footprint(kept("run-1"))
    assert now["energy_kwh"] > earlier["energy_kwh"] > 0 and now["seconds"] > earlier["seconds"]
    assert footprint(kept("run-2"))["energy_kwh"] > 0
    assert stat.S_IMODE(kept("run-1").stat().st_mode) & 0o077 == 0


def _it_answers_while_it_trains(site: RealSite) -> None:
    seen: list[tuple[Any, str]] = []

    def look(step: int) -> None:
        if step == 1:
            standing = site.link().propose(proposal(site, run_id="run-3"))
            seen.append((site.link().describe()["training"], standing.state))
            assert verify(site.entries_key(), "cotune-standing", standing.message(), standing.signature)

    gate = threading.Thread(target=lambda: [site.ask(site.plan(n)) for n in (5, 6, 7)])
    gate.start()  # keeps it busy after our own round too
    update_of(site.link().train(site.plan(4), site.adapter, look))
    gate.join()
    [(training, state)] = seen
    assert training["run_id"] == "run-1"
    assert state == "approved"


def _it_trains_one_at_a_time(site: RealSite) -> None:
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(site.ask(site.plan(8)))) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures = [answer for answer in answers if isinstance(answer, SiteFailure)]
    assert {failure.code for failure in failures} <= {"E-AGENT-BUSY"}
    assert len({update_of(a).header.update_sha256 for a in answers if isinstance(a, AdapterUpdate)}) == 1
    assert site.charges(8) == 1


def _it_finishes_for_a_courier_that_hung_up(site: RealSite) -> None:
    from cotune.client.frames import plan_frame

    with grpc.insecure_channel(f"unix:{site.socket}") as channel:
        call = channel.unary_stream(f"/{SERVICE}/Train")(plan_frame(site.plan(9), site.adapter))
        assert "step" in unpack(next(iter(call)))[0]
        call.cancel()
    until(lambda: site.link().describe()["training"] is None)
    assert site.charges(9) == 1
    update_of(site.ask(site.plan(9)))
    assert site.charges(9) == 1


def _it_keeps_features_in_its_home_until_a_run_is_over(site: RealSite) -> None:
    work = site.home / "work" / "run-1"
    assert stat.S_IMODE(work.stat().st_mode) == 0o700
    assert any(work.iterdir()), "nothing would be kept: the test would prove nothing"
    update_of(site.ask(site.plan(site.job.run.rounds)))
    assert not work.exists()


def _it_says_what_a_frame_lacks(site: RealSite) -> None:
    for method in ("Train", "Propose", "Ledger", "Countersign"):
        for frame in (b"", b"\n", b"[]\n", b"{}\n", b"\xff\n", b'{"plan": 3}\n', b"[" * 100_000 + b"\n"):
            [said] = frames(site, method, frame)
            failure = read_answer(said)
            assert isinstance(failure, SiteFailure) and failure.code == "E-WIRE", (method, frame[:20], failure)


def _it_gives_its_ledger_to_runs_it_took_part_in(site: RealSite) -> None:
    assert (site.home / "work" / "run-2").exists()
    ledger = site.link().ledger(LedgerRequest(run_id="run-2", site=NAME))
    assert len(reserved(read_chain(ledger), run_id="run-2")) == 1
    assert not (site.home / "work" / "run-2").exists()
    with pytest.raises(CotuneError) as caught:
        site.link().countersign(ClaimRequest(run_id="run-2", site=NAME, claim="{}"))
    assert (caught.value.code, caught.value.exit_code) == ("E-CLAIM-FORM", 6)
    for asked in (LedgerRequest(run_id="run-9", site=NAME), LedgerRequest(run_id="run-2", site="charite")):
        with pytest.raises(CotuneError) as caught:
            site.link().ledger(asked)
        assert caught.value.code == "E-PLAN"


def _a_second_one_is_refused(site: RealSite, process: subprocess.Popen[bytes]) -> None:
    with pytest.raises(RefusedError) as caught, alone(site.home / "agent.lock"):
        pass
    assert caught.value.code == "E-AGENT-RUNNING" and str(process.pid) in caught.value.message
    with pytest.raises(RefusedError) as caught:
        require_place(site.socket)
    assert caught.value.code == "E-AGENT-RUNNING"


def _it_refuses_a_frame_that_is_too_large_before_it_is_in_memory(
    site: RealSite, process: subprocess.Popen[bytes]
) -> None:
    before = psutil.Process(process.pid).memory_info().rss
    with pytest.raises(grpc.RpcError) as caught:
        frames(site, "Train", b"{" * (MAX_FRAME + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert psutil.Process(process.pid).memory_info().rss - before < MAX_FRAME / 8
    too_large = np.zeros(MAX_FRAME, dtype=np.uint8)
    said = site.link().train(site.plan(10), too_large, lambda _step: None)
    assert isinstance(said, SiteFailure) and said.code == "E-MESSAGE-SIZE"
    assert site.charges(10) == 0


def test_a_socket_that_was_left_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    import socket

    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(left))
    require_place(left)
    assert not left.exists()
    require_place(left)
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    for path in (other, tmp_path / ("x" * 120)):
        with pytest.raises(StorageError) as caught:
            require_place(path)
        assert caught.value.code == "E-AGENT-SOCKET"
    assert other.read_text() == "mine"


def test_an_agent_that_stays_away_is_named(tmp_path: Path, site: RealSite) -> None:
    link = AgentLink(tmp_path / "nobody.sock", patience_s=0.3)
    said = link.train(site.plan(), site.adapter, lambda _step: None)
    assert isinstance(said, SiteFailure)
    assert (said.site, said.code, said.exit_code) == (NAME, "E-AGENT-AWAY", 3)
    with pytest.raises(CotuneError) as caught:
        link.describe()
    assert caught.value.code == "E-AGENT-AWAY"


def test_the_couriers_end_loads_no_tensor_library() -> None:
    code = (
        "import sys, cotune.client.agent_link;"
        "print([name for name in ('torch', 'transformers', 'peft', 'safetensors.torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
