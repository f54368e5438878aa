"""One run from its folder to its published result, over any fleet; the run's status says how it ended."""

from __future__ import annotations

import shutil
from pathlib import Path

from cotune.server.coordinator import Coordinator
from cotune.server.evaluation import GlobalEvaluator
from cotune.server.fleet import Fleet
from cotune.server.publish import note, publish
from cotune.shared.errors import CotuneError, RunFailed
from cotune.shared.methods import layout_of
from cotune.shared.model import locate
from cotune.shared.runs import RunFolder


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
    with run.held():
        _conduct(run, fleet, engine, kept)


def _conduct(run: RunFolder, fleet: Fleet, engine: str, kept: Path | None) -> None:
    try:
        run.set_state("running", 0)
        job = run.job()
        base = locate(job)
        layout, config = layout_of(job, base)
        evaluator = GlobalEvaluator(job, kept)
        outcome = Coordinator(run, layout, config, evaluator).run(fleet)
        if kept:
            note(run, outcome, layout, base, engine)
        else:
            publish(run, outcome, evaluator, layout, config, base, engine)
        shutil.rmtree(run.sites, ignore_errors=True)  # simulated sites end with their run, and so do their keys
    except KeyboardInterrupt:
        run.set_state("cancelled", int(run.state()["round"]))
        raise
    except CotuneError as error:
        status = "paused" if error.code == "E-MIN-SITES" else "failed"
        run.set_state(status, int(run.state()["round"]), error)
        raise
    except Exception as error:
        failure = RunFailed("E-INTERNAL", f"{type(error).__name__}: a defect of cotune ended the run")
        run.set_state("failed", int(run.state()["round"]), failure)
        raise
