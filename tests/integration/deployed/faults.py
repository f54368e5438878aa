"""The faults of the kill table: what is done to a federation while a run is under way, in processes and in cables."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from tests.integration.deployed.federation import OVER, Federation, Party, await_until

from cotune.shared.chain import read_torn_chain
from cotune.shared.runs import RunFolder

VICTIM = "site-2"  # whose machine things happen to
REACH_S = 600.0
GLANCE_S = 0.002
FULL_KIB = 4096  # left of a small disk by nothing but its filler
Strike = Callable[[Federation, RunFolder, int], None]


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        kind: F1 to F7.
        strike: Does it to a round that has just begun, and returns when it is over.
        may_recharge: Whether a round that was being trained may be lost by it, and charged again once.
        bound_s: How long it may take afterwards until a round is finished, on a quiet machine.
    """

    kind: str
    strike: Strike
    may_recharge: bool = False
    bound_s: float = 90.0


def in_round(run: RunFolder, number: int) -> bool:
    """Whether a round has begun, or the run is over."""
    state = run.state()
    return (state["status"] == "running" and state["round"] >= number) or state["status"] in OVER


def await_round(made: Federation, run: RunFolder, number: int) -> None:
    """Wait until a round has begun."""
    await_until(lambda: in_round(run, number), f"round {number} did not begin", REACH_S, made)


def kill(party: Party, who: str, sent: int = signal.SIGKILL) -> int:
    """Signal the processes of a kind; how many there were."""
    struck = 0
    for process in party.victims(who):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(sent)
            struck += 1
    return struck


def killing_late(who: str) -> Strike:
    """SIGKILL once the first site of the round has committed its update."""

    def strike(made: Federation, run: RunFolder, number: int) -> None:
        homes = [made.sites[site].home for site in run.job().data.sites]
        await_until(
            lambda: any(_committed(home, run.run_id, number) for home in homes), "no site trained", REACH_S, made
        )
        kill(owner(made, who), who)

    return strike


def killing(who: str, down_s: float = 0.0) -> Strike:
    """SIGKILL, again whenever it comes back, until `down_s` have passed."""

    def strike(made: Federation, run: RunFolder, number: int) -> None:
        party = owner(made, who)
        await_until(lambda: kill(party, who), f"there was no {who}", REACH_S, made)
        until = time.monotonic() + down_s
        while time.monotonic() < until:
            time.sleep(0.1)
            kill(party, who)

    return strike


def owner(made: Federation, who: str) -> Party:
    """On whose machine a kind of process runs."""
    return made.sites[VICTIM] if who in ("agent", "courier", "site up") else made.coordinator


def killing_up(who: str, back_after_s: float = 3.0) -> Strike:
    """SIGKILL of what keeps a party up, which takes all its processes along; brought up again as a service is."""

    def strike(made: Federation, run: RunFolder, number: int) -> None:
        party = owner(made, who)
        made.ups[party.machine.name].kill()
        made.ups[party.machine.name].wait()
        time.sleep(back_after_s)
        made.up(party)

    return strike


def killing_agent(point: str) -> Strike:
    """SIGKILL of the agent at a point of the round, seen in the ledger and the updates it writes."""

    def strike(made: Federation, run: RunFolder, number: int) -> None:
        site = made.sites[VICTIM]
        agents = site.victims("agent")
        reached = POINTS[point]
        deadline = time.monotonic() + REACH_S
        while not reached(site.home, run.run_id, number):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the agent never got to: {point}")
            time.sleep(GLANCE_S)
        for process in agents:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    return strike


def _entry(home: Path, run_id: str, number: int, action: str) -> bool:
    content = (home / "ledger.jsonl").read_bytes()
    entries, _ = read_torn_chain(content, None, 0)
    return any((e.action, e.fields.get("run_id"), e.fields.get("round")) == (action, run_id, number) for e in entries)


def _asked(home: Path, run_id: str, number: int) -> bool:
    del home, run_id, number
    return True


def _reserved(home: Path, run_id: str, number: int) -> bool:
    return _entry(home, run_id, number, "budget.reserve")


def _training(home: Path, run_id: str, number: int) -> bool:
    if not _reserved(home, run_id, number):
        return False
    time.sleep(0.02)
    return True


def _written(home: Path, run_id: str, number: int) -> bool:
    return (home / "updates" / f"{run_id}-{number}.safetensors").exists()


def _committed(home: Path, run_id: str, number: int) -> bool:
    return _entry(home, run_id, number, "budget.commit")


POINTS: Mapping[str, Callable[[Path, str, int], bool]] = {
    "as the round begins": _asked,
    "once it is charged": _reserved,
    "while it trains": _training,
    "once the update is written": _written,
    "once it is committed": _committed,
}


def stopping(who: str, seconds: float) -> Strike:
    """SIGSTOP, and SIGCONT later."""

    def strike(made: Federation, run: RunFolder, number: int) -> None:
        party = owner(made, who)
        stopped = party.victims(who)
        for process in stopped:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        for process in stopped:
            with contextlib.suppress(ProcessLookupError):  # a supervisor may have put another in its place
                os.kill(process.pid, signal.SIGCONT)

    return strike


def unplugging(seconds: float, times: int = 1, pause_s: float = 2.0) -> Strike:
    """Cut a site's cable, so often and so long."""

    def strike(made: Federation, run: RunFolder, number: int) -> None:
        machine = made.sites[VICTIM].machine
        for left in reversed(range(times)):
            machine.unplug()
            time.sleep(seconds)
            machine.plug()
            if left:
                time.sleep(pause_s)

    return strike


def slow(kbit: int) -> Strike:
    """A slow line from a site, for a whole round."""

    def strike(made: Federation, run: RunFolder, number: int) -> None:
        machine = made.sites[VICTIM].machine
        machine.slow_down(kbit)
        try:
            await_round(made, run, number + 1)
        finally:
            machine.speed_up()

    return strike


def wire_is(seconds: float, **line: object) -> Strike:
    """The line between sites and gateway as `wire.Line` says, for a while."""

    def strike(made: Federation, run: RunFolder, number: int) -> None:
        made.relay.be(**line)
        time.sleep(seconds)
        made.relay.heal()

    return strike


def filling(place: Callable[[Federation], Path], seconds: float) -> Strike:
    """Fill a small disk to its last block, and free it later."""

    def strike(made: Federation, run: RunFolder, number: int) -> None:
        with filled(place(made)):
            time.sleep(seconds)

    return strike


@contextlib.contextmanager
def filled(folder: Path) -> Generator[None]:
    """A disk without a free block; the filler goes afterwards."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(FULL_KIB))
        yield
    finally:
        filler.unlink(missing_ok=True)


FAULTS: Mapping[str, Fault] = {
    "coordinator's process killed in a round": Fault("F1", killing("coordinator")),
    "coordinator's process killed between answers": Fault("F1", killing_late("coordinator")),
    "fed up killed, up again after 3 s": Fault("F1", killing_up("fed up"), bound_s=150),
    "superlink killed, down 5 s": Fault("F2", killing("superlink", 5)),
    "superlink killed, down 30 s": Fault("F2", killing("superlink", 30), bound_s=150),
    "superlink killed, down 90 s": Fault("F2", killing("superlink", 90), bound_s=180),
    "superexec killed": Fault("F2", killing("superexec")),
    "gateway killed": Fault("F2", killing("gateway")),
    "courier killed": Fault("F3", killing("courier")),
    "site up killed, up again after 3 s": Fault("F3", killing_up("site up"), may_recharge=True, bound_s=150),
    **{
        f"agent killed {point}": Fault("F4", killing_agent(point), may_recharge=point != "once it is committed")
        for point in POINTS
    },
    "agent stopped 20 s": Fault("F5", stopping("agent", 20)),
    "courier stopped 70 s": Fault("F5", stopping("courier", 70)),
    "superlink stopped 20 s": Fault("F5", stopping("superlink", 20)),
    "coordinator's process stopped 70 s": Fault("F5", stopping("coordinator", 70), bound_s=150),
    "site cut off 5 s": Fault("F6", unplugging(5)),
    "site cut off 40 s": Fault("F6", unplugging(40)),
    "site cut off 120 s": Fault("F6", unplugging(120), bound_s=150),
    "site flapping every 2 s, ten times": Fault("F6", unplugging(2, 10)),
    "line of 1 Mbit/s": Fault("F6", slow(1000)),
    "line that swallows answers 20 s": Fault("F6", wire_is(20, swallow="down")),
    "line with 20 % resets 30 s": Fault("F6", wire_is(30, resets=0.2)),
    "line with 200 ms delay 20 s": Fault("F6", wire_is(20, delay_s=0.2)),
    "disk of a site's home full 15 s": Fault("F7", filling(lambda made: made.sites[VICTIM].home.parent, 15)),
    "disk of the coordinator's runs full 15 s": Fault("F7", filling(lambda made: made.coordinator.home / "runs", 15)),
    "disk of Flower's state full 15 s": Fault("F7", filling(lambda made: made.coordinator.home / "superlink", 15)),
}
