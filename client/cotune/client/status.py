"""`cotune site status`: everything a site needs to take part, looked at before a round finds it missing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cotune.client.agent_link import AgentLink
from cotune.client.budget import account
from cotune.client.courier_folder import SOCKET, CourierFolder, courier_folder
from cotune.client.home import SiteHome
from cotune.client.joining import joined
from cotune.client.preflight import Check, fault, reach
from cotune.shared.errors import CotuneError, JobError
from cotune.shared.footprint import INSTALL, footprint, is_measured
from cotune.shared.plan import cotune_version
from cotune.shared.report.wording import small
from cotune.shared.supervision import running

LEAST_DISK, LITTLE_DISK = 100 * 2**20, 2 * 2**30
SHOWN = ("cotune", "flwr", "torch", "transformers", "grpcio")
UP = "cotune site up"
DRIVER_S = 10.0


def checks(path: Path) -> Iterator[Check]:
    """Look at a site, one thing after the other; a home that cannot be opened is the last thing looked at."""
    yield Check("versions", "ok", ", ".join(f"{name} {version(name)}" for name in SHOWN))
    try:
        home = SiteHome.open(path)
    except CotuneError as error:
        yield fault("home", error)
        return
    yield Check("home", "ok", f"{home.name}: policy sound, ledger whole with {home.ledger.head.seq} entries")
    if home.is_simulated:
        yield Check("home", "note", "a SIMULATED site: noise of a public seed is let in; not for real records")
    yield from _data(home)
    yield _disk(home.path)
    yield from _agent(home.path)
    yield _energy(home)
    yield from _federations(home)


def faults(found: list[Check]) -> list[Check]:
    """Those that failed."""
    return [each for each in found if each.verdict == "fault"]


def error_of(found: list[Check]) -> JobError:
    """What `cotune site status` ends with when something failed."""
    failed = faults(found)
    message = f"{len(failed)} of {len(found)} checks failed: {', '.join(sorted({each.name for each in failed}))}"
    error = JobError("E-SITE-STATUS", message, hint=next((each.hint for each in failed if each.hint), None))
    error.exit_code = 1
    return error


def text_of(found: list[Check]) -> str:
    """The checks for people."""
    lines: list[str] = []
    for each in found:
        lines.append(f"{each.verdict:6}{each.name:16}{each.text}")
        lines += [f"{'':22}mend it: {each.hint}"] if each.hint and each.verdict != "ok" else []
    return "\n".join(lines)


def _data(home: SiteHome) -> Iterator[Check]:
    changed = "its file changed since the last round: the next one trains on it as it is; what was spent stays spent"
    texts = {"unchanged": "its file is the one the ledger knows", "new": "its file is not registered yet"}
    for dataset in home.policy.dataset:
        try:
            state = home.files.state(dataset)
            yield Check(f"data {dataset.id}", "note" if state == "changed" else "ok", texts.get(state, changed))
        except CotuneError as error:
            yield fault(f"data {dataset.id}", error)
        left, total = account(home.ledger.entries, dataset).left, dataset.budget.epsilon_total
        verdict = "ok" if left > 0 else "note"
        yield Check(f"budget {dataset.id}", verdict, f"epsilon {left:.3f} of {total:g} left", "cotune site budget")
    own = [line for line in home.jobs.own_lines() if line["rule"] != "update not used"]
    if own:
        yield Check("data", "note", f"its records kept a job out: {json.dumps(own[-1]['text'])}", "cotune site log")


def _disk(path: Path) -> Check:
    free = shutil.disk_usage(path).free
    text = f"{free / 2**30:.1f} GiB free"
    if free < LEAST_DISK:
        return Check("disk", "fault", f"{text}: the ledger may not be written", f"free space on the disk of {path}")
    return Check("disk", "ok" if free > LITTLE_DISK else "note", text)


def _agent(path: Path) -> Iterator[Check]:
    up = running(path)
    for name, child in (up or {"children": {}})["children"].items():
        restarts = f", {child['restarts']} restarts" if child["restarts"] else ""
        verdict = "ok" if child["state"] == "running" else "note"
        yield Check(name, verdict, f"{child['state']} since {child['since']}{restarts}", f"see {path}/logs/{name}.log")
    try:
        said = AgentLink(courier_folder(path) / SOCKET, patience_s=0.0).describe()
    except CotuneError as error:
        yield Check("agent", "fault", error.message, error.hint) if up else Check("agent", "note", "not running", UP)
        yield _device_here()
        return
    yield _agent_text(said)
    yield Check("device", "ok", str(said["device"]))


def _agent_text(said: dict[str, Any]) -> Check:
    if said["cotune"] != cotune_version():
        text = f"the agent runs cotune {said['cotune']}, installed is {cotune_version()}"
        return Check("agent", "fault", text, f"cotune site down, then {UP}")
    doing = said["training"]
    busy = f"trains round {doing['round']} of {doing['run_id']}" if doing else "waits for a round"
    return Check("agent", "ok", f"process {said['pid']} {busy}; base model loaded {said['model_loads']} times")


def _energy(home: SiteHome) -> Check:
    """What this machine used for each run: it stays here, unless an administrator tells it."""
    runs = [found for path in home.path.glob("footprint/*.json") if (found := footprint(path))]
    if not runs:
        return Check("energy", "ok", "no round was measured" if is_measured() else f"not measured: {INSTALL}")
    used, co2 = (small(1000 * sum(run.get(name, 0.0) for run in runs)) for name in ("energy_kwh", "co2_kg"))
    where = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, each in {home.path / 'footprint'}"
    return Check("energy", "ok", f"{used} Wh, {co2} g CO2 equivalent for {where}")


def _device_here() -> Check:
    """What the driver says: the agent, when it runs, says what the model library sees."""
    command = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_S, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return Check("device", "ok", "no NVIDIA GPU: a model would train on the CPU")
    return Check("device", "ok", "; ".join(line for line in found if line))


def _federations(home: SiteHome) -> Iterator[Check]:
    federations = sorted(joined(home))
    if not federations:
        yield Check("federations", "fault", "none joined", "cotune site join INVITE")
    try:
        known = home.coordinators.all()
    except CotuneError as error:
        yield fault("federations", error)
        return
    for federation in federations:
        folder = CourierFolder(courier_folder(home.path) / federation)
        yield from reach(folder, known.get(federation))
        yield from _courier(folder.path)


def _courier(folder: Path) -> Iterator[Check]:
    """What the courier last said of itself."""
    try:
        said = json.loads((folder / "courier.json").read_bytes())
        state, since, message = said["state"], said["since"], said.get("message")
    except (OSError, ValueError, KeyError, TypeError):
        return
    runs = CourierFolder(folder).is_held
    verdict, where = (
        ("ok" if runs and state == "online" else "note"),
        "courier" if runs else "no courier runs; the last was",
    )
    yield Check(folder.name, verdict, f"{where} {state} since {since}{f': {message}' if message else ''}")
