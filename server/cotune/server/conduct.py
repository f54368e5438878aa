"""One run from its folder to its published result, over any fleet; the run's status says how it ended."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path

from cotune.server.approval import Approval
from cotune.server.coordinator import Coordinator
from cotune.server.deployed import DeployedFleet
from cotune.server.evaluation import GlobalEvaluator
from cotune.server.fleet import Fleet
from cotune.server.publish import Adapted, note, publish
from cotune.server.signatories import Signatories
from cotune.server.trust import ON_FIRST_USE, Trust
from cotune.shared.errors import CotuneError, JobError, RunFailed
from cotune.shared.methods import layout_of
from cotune.shared.model import locate
from cotune.shared.runs import RunFolder, Status

LOOK_S = 5.0  # others hold a run for a moment to see whether it is held
LOST = "E-SUPERLINK-LOST"  # the run is not at fault: it goes on where its messages go again
ENDS: dict[str, Status] = {
    "E-MIN-SITES": "paused", "E-TIMEOUT": "paused", "E-APPROVAL-TIMEOUT": "paused", "E-STOPPED": "cancelled",
}  # fmt: skip


def conduct(run: RunFolder, fleet: Fleet, engine: str, kept: Path | None = None) -> None:
    """Run all rounds and publish; with `kept`, the run is one of many that are compared, and only its figures count.

    Whatever happens, `state.json` holds the outcome when this returns or raises.

    Args:
        run: The prepared run.
        fleet: Its sites.
        engine: What carries the messages, for the summary.
        kept: See `GlobalEvaluator`.

    Raises:
        CotuneError: The run failed, by name; a defect is named without its text.
    """
    with run.held(LOOK_S), _outcome_of(run):
        _rounds(run, fleet, engine, kept, ON_FIRST_USE)


def conduct_deployed(run: RunFolder, fleet: DeployedFleet, approval: Approval, trust: Trust) -> None:
    """Get the sites' approval, then run all rounds and publish.

    Args:
        run: The prepared run.
        fleet: Its sites.
        approval: What they are shown, and what they said.
        trust: The coordinator's signature, and the sites' keys.

    Raises:
        JobError: E-RUN-HELD or E-RUN-NOT-DUE: it is run elsewhere, or was; its state stays.
        CotuneError: As `conduct`. Where the SuperLink is lost, the run's state stays: it goes on when that is back.
    """
    with run.held(LOOK_S):
        if run.state()["status"] != "queued":  # Flower started it late, after it was given anew
            raise JobError("E-RUN-NOT-DUE", f"{run.run_id} is not waiting to be run", hint="cotune status RUN")
        with _outcome_of(run):
            run.require_wanted()
            run.set_state("awaiting_approval", 0)
            fleet.admit(approval.obtain(fleet))
            _rounds(run, fleet, "deployed", None, trust)


def _rounds(run: RunFolder, fleet: Fleet, engine: str, kept: Path | None, trust: Trust) -> None:
    run.set_state("running", 0)
    job = run.local_job()
    base = locate(job)
    layout, config = layout_of(job, base)
    evaluator = GlobalEvaluator(job, kept)
    outcome = Coordinator(run, layout, config, evaluator, trust).run(fleet)
    if kept:
        note(run, outcome, Adapted(base, layout, config), engine)
    else:
        publish(run, outcome, evaluator, Adapted(base, layout, config), Signatories(run, fleet, trust), engine)
    shutil.rmtree(run.sites, ignore_errors=True)  # simulated sites end with their run, and so do their keys


@contextlib.contextmanager
def _outcome_of(run: RunFolder) -> Generator[None]:
    """Whatever ends the block is in the run's state afterwards, but for a SuperLink that was lost."""
    try:
        yield
    except KeyboardInterrupt:
        run.set_state("cancelled", int(run.state()["round"]))
        raise
    except CotuneError as error:
        if error.code != LOST:
            run.set_state(ENDS.get(error.code, "failed"), int(run.state()["round"]), error)
        raise
    except Exception as error:
        failure = RunFailed("E-INTERNAL", f"{type(error).__name__}: a defect of cotune ended the run")
        run.set_state("failed", int(run.state()["round"]), failure)
        raise
