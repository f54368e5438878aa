"""`cotune site up` as an administrator starts it: the agent and the couriers live as long as it does, and no longer."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tests.client.agents import RealSite, until, update_of
from tests.client.federations import COORDINATOR, invite_for

from cotune.client.courier_folder import courier_folder
from cotune.client.home import SiteHome
from cotune.client.joining import join
from cotune.shared.plan import RoundPlan

pytestmark = pytest.mark.slow
CLI = (sys.executable, "-m", "cotune.shared.cli", "site")
OTHER = "nobody"


def joined_site(folder: Path, model: Path) -> RealSite:
    """A site that joined a federation whose coordinator is away."""
    site = RealSite.make(folder, model)
    home = SiteHome.open(site.home)
    join(home, invite_for(home, address="localhost:1"))
    return replace(site, socket=courier_folder(site.home) / "agent.sock")


def signed(site: RealSite, number: int) -> RoundPlan:
    return site.plan(number, signature=COORDINATOR.sign("cotune-job", site.job.sha256().encode()))


@contextmanager
def up(site: RealSite, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command, once its agent answers; afterwards all of it is gone."""
    log = site.home.parent / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*CLI, "up", "--home", str(site.home), *options], stdout=output, stderr=output)
    try:
        until(lambda: process.poll() is not None or site.socket.exists(), 300)
        assert process.poll() is None, log.read_text()
        site.await_agent()
        yield process
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
    finally:
        process.kill()
        process.wait()


def said(*arguments: object) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([*CLI, *map(str, arguments), "--json"], capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


def courier_pid(site: RealSite) -> int:
    """The courier's process, once it is there."""
    until(lambda: json.loads((site.home / "up.json").read_bytes())["children"]["courier-north"]["pid"])
    return json.loads((site.home / "up.json").read_bytes())["children"]["courier-north"]["pid"]


def test_a_site_that_is_up_survives_its_agents_death(tmp_path: Path, tiny_causal: Path) -> None:
    site = joined_site(tmp_path, tiny_causal)
    with up(site):
        update = update_of(site.ask(signed(site, 1)))
        first = site.link().describe()["pid"]
        os.kill(first, signal.SIGKILL)
        assert np.array_equal(update_of(site.ask(signed(site, 1))).payload, update.payload)
        assert site.link().describe()["pid"] != first
        assert site.charges(1) == 1
        assert courier_pid(site)
        code, envelope = said("up", "--home", site.home)
        assert (code, envelope["error"]["code"]) == (4, "E-UP-RUNNING")
        code, envelope = said("status", "--home", site.home)
        checks = {(check["name"], check["verdict"]) for check in envelope["data"]["checks"]}
        assert code == 1, "its coordinator is away"
        assert {("agent", "ok"), ("data notes", "ok"), ("north", "fault")} <= checks
    with up(site):  # over the socket and files that were left
        assert np.array_equal(update_of(site.ask(signed(site, 1))).payload, update.payload)
    assert "patient" not in (site.home / "logs" / "agent.log").read_text()


def test_a_killed_supervisor_leaves_nobody_and_the_next_one_starts(tmp_path: Path, tiny_causal: Path) -> None:
    site = joined_site(tmp_path, tiny_causal)
    with pytest.raises(psutil.NoSuchProcess), up(site) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
        process.wait()
    with up(site):
        update_of(site.ask(signed(site, 1)))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may pass through; pytest's own are closed to him."""
    folder = Path(tempfile.mkdtemp(prefix="cotune-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_other(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, user=OTHER, extra_groups=[], capture_output=True, text=True, check=False, cwd="/")


def may_run_us() -> bool:
    """Whether the other user can read this installation."""
    try:
        return as_other(sys.executable, "-c", "import cotune.client.agent_link").returncode == 0
    except PermissionError:
        return False


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may start another user's process")
def test_a_courier_of_another_user_reaches_the_agent_and_none_of_the_sites_files(
    open_folder: Path, tiny_causal: Path
) -> None:
    if not may_run_us():
        pytest.skip("the other user cannot read this installation")
    site = joined_site(open_folder, tiny_causal)
    notes = open_folder / "notes.jsonl"
    notes.chmod(0o600)
    with up(site, "--courier-user", OTHER):
        other = pwd.getpwnam(OTHER).pw_uid
        assert (site.socket.stat().st_uid, oct(site.socket.stat().st_mode & 0o777)) == (other, "0o600")
        assert site.socket.parent.stat().st_uid == other
        tether = psutil.Process(courier_pid(site))
        assert {member.uids().effective for member in (tether, *tether.children())} == {other}
        link = "from pathlib import Path; from cotune.client.agent_link import AgentLink"
        asked = f"{link}; print(AgentLink(Path({str(site.socket)!r})).describe()['site'])"
        assert as_other(sys.executable, "-c", asked).stdout.strip() == "st-mary"
        for path in (*(site.home / name for name in ("site.key", "policy.toml", "ledger.jsonl")), notes):
            assert as_other("cat", str(path)).returncode != 0, path
