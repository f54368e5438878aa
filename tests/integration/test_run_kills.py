"""Runs that are killed at any moment end with the adapter of an undisturbed run, to the bit, and charge no round twice.

Only a round that was lost in the middle of training is charged again.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from tests.integration.killed_study import SITES, Study, write_home_study, write_study
from tests.integration.run_killed import Figures, flower_plan, inline_plan, series, undisturbed

from cotune.server.checkpoint import FACTS, STATE
from cotune.server.coordinator import Coordinator
from cotune.server.evaluation import GlobalEvaluator
from cotune.server.fleet import Fleet, Request
from cotune.server.grid import GridFleet
from cotune.shared.cli import run as command
from cotune.shared.methods import layout_of
from cotune.shared.model import locate
from cotune.shared.plan import LedgerRequest
from cotune.shared.runs import RunFolder
from cotune.shared.update import Answer
from cotune.shared.wire import ledger_to_records, query_from_records
from cotune.simulations.federation import InlineFleet
from cotune.simulations.scenario import begin, prepare_run, work_folder

ROUNDS = 3
Bits = dict[str, bytes]


class PowerCut(BaseException):
    """Nobody is left who could write anything down."""


class CutFleet:
    """A `Fleet` that goes dark when it is asked for a round, after its first site has answered."""

    def __init__(self, run: RunFolder, at_round: int) -> None:
        self._fleet, self._at_round = InlineFleet(run), at_round

    def sites(self) -> Sequence[str]:
        return self._fleet.sites()

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        for answer in self._fleet.ask(requests):
            if requests[0].plan.round == self._at_round:
                raise PowerCut
            yield answer

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        return self._fleet.ledgers(requests)


def trained(run: RunFolder, fleet: Fleet) -> Bits:
    """All rounds that are left, without their publication; the adapter's bytes by tensor."""
    begin(run)
    job = run.job()
    layout, config = layout_of(job, locate(job))
    outcome = Coordinator(run, layout, config, GlobalEvaluator(job)).run(fleet)
    return {name: array.tobytes() for name, array in outcome.arrays.items()}


def tell(*arguments: object) -> tuple[int, str]:
    """Run a command line in this process: its exit code and what it says of a fault."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = command([str(argument) for argument in arguments])
    return code, err.getvalue()


def begun(study: Study, *overrides: str) -> RunFolder:
    return prepare_run(str(study.job), overrides, study.job.parent / "runs", lambda _line: None)


@pytest.fixture(scope="module")
def cut(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Bits, RunFolder]:
    """A run that was cut in its last round, the adapter it would have had, and a run of another job."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTUNE_CACHE", str(folder / "cache"))
        train = {"batch_size": 10, "local_steps": 1, "learning_rate": 0.5}
        study = write_study(folder, tiny_causal, ROUNDS, eval={}, train=train)
        whole, run, other = begun(study), begun(study), begun(study, "run.seed=4")
        expected = trained(whole, InlineFleet(whole))
        for each, last in ((run, ROUNDS), (other, 2)):
            with pytest.raises(PowerCut):
                trained(each, CutFleet(each, last))
    return run, expected, other


@pytest.fixture
def copied(cut: tuple[RunFolder, Bits, RunFolder], tmp_path: Path) -> RunFolder:
    """A copy of the cut run under its own name, which its sites know."""
    run = RunFolder(Path(shutil.copytree(cut[0].path, tmp_path / cut[0].run_id)))
    run.set_engine("inline")
    return run


def newest(run: RunFolder) -> Path:
    return max(run.checkpoints.iterdir())


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "one bit": (STATE, one_bit),
    "cut in half": (FACTS, half),
    "a file removed": (STATE, Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_aloud_and_changes_no_bit(
    cut: tuple[RunFolder, Bits, RunFolder], copied: RunFolder, damage: str
) -> None:
    name, spoil = DAMAGES[damage]
    assert newest(copied).name == f"round-{ROUNDS - 1:05d}"
    spoil(newest(copied) / name)
    assert trained(copied, InlineFleet(copied)) == cut[1]
    (said,) = [event["message"] for event in copied.events() if event["type"] == "checkpoint"]
    assert f"round-{ROUNDS - 1:05d} is damaged" in said and "falling back" in said
    accounts = json.loads((copied.privacy / "accountant.json").read_text())["sites"]
    assert {site: [entry["round"] for entry in entries] for site, entries in accounts.items()} == {
        site: list(range(1, ROUNDS + 1)) for site in InlineFleet(copied).sites()
    }


def test_a_checkpoint_of_another_job_is_refused_by_name(
    cut: tuple[RunFolder, Bits, RunFolder], copied: RunFolder
) -> None:
    theirs = newest(copied)
    shutil.rmtree(theirs)
    shutil.copytree(newest(cut[2]), theirs)
    code, said = tell("resume", copied.path, "--quiet")
    assert code == 4
    assert "E-CHECKPOINT-JOB" in said and theirs.name in said
    assert copied.state()["error"]["code"] == "E-CHECKPOINT-JOB"
    shutil.rmtree(theirs)  # as the error's hint says
    assert trained(copied, InlineFleet(copied)) == cut[1]


def test_a_run_that_needed_consent_and_got_none_cannot_be_resumed(copied: RunFolder) -> None:
    (copied.path / "env" / "engine.json").unlink()  # it is written once consent was asked for
    code, said = tell("resume", copied.path, "--quiet")
    assert (code, "E-NON-PRIVATE" in said) == (4, True)
    assert copied.state()["status"] == "cancelled"


def test_a_whole_run_is_not_resumed_but_tidied(copied: RunFolder) -> None:
    begin(copied)
    copied.set_state("succeeded", ROUNDS)
    copied.write_manifest()
    code, said = tell("resume", copied.path, "--quiet")
    assert (code, "E-RUN-OVER" in said) == (4, True)
    assert not copied.sites.exists() and not work_folder(copied.run_id).exists()


class DyingCouriers:
    """What `GridFleet` needs of Flower's grid: its first couriers die with the message they carry."""

    def __init__(self, deaths: int) -> None:
        self._deaths, self._sent = deaths, dict[str, Message]()

    def get_node_ids(self) -> list[int]:
        return [1, 2]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        made = {uuid.uuid4().hex: message for message in messages}
        for identifier, message in made.items():
            message.metadata.__dict__["_message_id"] = identifier  # as Flower's own grids do
        self._sent |= made
        return list(made)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message in [self._sent.pop(identifier) for identifier in message_ids]:
            self._deaths -= 1
            site = query_from_records(message.content).site
            yield Message(Error(code=3) if self._deaths >= 0 else ledger_to_records(site.encode()), reply_to=message)


@pytest.mark.parametrize(("deaths", "come"), [(0, 3), (4, 3), (8, 3), (1000, 0)])
def test_a_ledger_that_was_lost_with_its_courier_is_asked_for_again_while_that_helps(
    monkeypatch: pytest.MonkeyPatch, deaths: int, come: int
) -> None:
    for name in ("node_id", "run_id", "task_id"):  # Flower sets them in the processes it starts
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    fleet = GridFleet(cast(Grid, DyingCouriers(deaths)), SITES, 60.0, 2)
    found = dict(fleet.ledgers([LedgerRequest(run_id="run-1", site=site) for site in SITES]))
    assert found == {site: site.encode() for site in SITES[:come]}


@pytest.mark.slow
def test_a_run_killed_after_it_said_that_it_succeeded_is_published_whole(
    cut: tuple[RunFolder, Bits, RunFolder], copied: RunFolder
) -> None:
    copied.set_state("succeeded", ROUNDS)
    code, said = tell("resume", copied.path, "--quiet")
    assert code == 0, said
    assert (copied.path / "MANIFEST.json").exists() and not copied.sites.exists()
    assert tell("verify", copied.path)[0] == 0


def check(figures: Figures, kills: int) -> None:
    print(json.dumps(figures.to_dict(), indent=2))  # noqa: T201 - the figures
    assert figures.faults == []
    assert figures.kills.total() == kills
    assert figures.equal == figures.completed > 0
    assert figures.charges["never"] == 0 < figures.charges["once"]


@pytest.fixture(scope="module")
def seeded(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Any]:
    """A job with seeded noise, what it gives undisturbed, and how long that takes."""
    study = write_study(tmp_path_factory.mktemp("seeded"), tiny_causal, 5)
    return study, undisturbed(study)


@pytest.mark.slow
def test_a_run_killed_ten_times_on_one_process_gives_the_same_adapter(seeded: tuple[Study, Any]) -> None:
    check(series(seeded[0], 10, inline_plan, random.Random(1), seeded[1]), 10)  # noqa: S311 - no secret


@pytest.mark.slow
def test_a_run_whose_processes_on_flowers_engine_are_killed_gives_the_same_adapter(seeded: tuple[Study, Any]) -> None:
    study, whole = seeded
    check(series(replace(study, engine="flower"), 4, flower_plan, random.Random(2), whole), 4)  # noqa: S311


@pytest.mark.slow
def test_a_killed_run_with_real_noise_is_the_sum_of_what_its_sites_gave(
    seeded: tuple[Study, Any], tiny_causal: Path, tmp_path: Path
) -> None:
    study = write_home_study(tmp_path, tiny_causal)
    check(series(study, 3, inline_plan, random.Random(3), (None, seeded[1][1])), 3)  # noqa: S311
