"""The process that trains for a courier: when it dies over a plan there is no answer, and a new one the next time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from tests.server.answers import plan_of

from cotune.shared.update import SiteFailure
from cotune.simulations.worker import Worker


def killed_once(since: set[psutil.Process]) -> Callable[[], None]:
    """Kills the first child process that is not among these."""

    def kill() -> None:
        while not (new := set(psutil.Process().children()) - since):
            time.sleep(0.01)
        for child in new:
            child.kill()

    return kill


@pytest.mark.slow
def test_a_worker_that_dies_gives_no_answer_and_its_successor_does(make_job: Any) -> None:
    """An answer that tells of a crash would be taken for one that any site could give: it would not be asked again."""
    worker, nothing = Worker(), np.zeros(4, dtype=np.uint8)
    plan = plan_of(make_job(privacy={"noise_multiplier": 1.0, "delta": 1e-3}))
    killer = threading.Thread(target=killed_once(set(psutil.Process().children())))
    killer.start()
    with pytest.raises(ChildProcessError, match="the process that trained it died"):
        worker.answer(plan, nothing)
    killer.join()
    answer = worker.answer(plan, nothing)  # of a run that nobody began
    assert isinstance(answer, SiteFailure)
    assert answer.site == plan.site
    assert worker._process is not None
    worker._process.communicate()
