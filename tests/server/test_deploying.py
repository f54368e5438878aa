"""A deployed run over a real coordinator's home: what is signed, what its state says when it ends before a round."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import RecordDict
from flwr.serverapp import Grid
from tests.server.grids import Nodes, enrolled_as, standing_at, within_a_run

from cotune.server.deploying import run_deployed
from cotune.server.fedhome import FED_FILE, FedHome
from cotune.shared.bundle import bundle_sha256
from cotune.shared.errors import ConnectionFailed, CotuneError, JobError
from cotune.shared.jobfile import validate
from cotune.shared.planning import resolve
from cotune.shared.proposal import Proposal
from cotune.shared.runs import RunFolder, create_run
from cotune.shared.signing import verify
from cotune.shared.wire import query_from_records

NODES = {"site-1": 101, "site-2": 102}


@pytest.fixture(autouse=True)
def _run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.server.deployed.POLL_S", 0.01)
    monkeypatch.setattr("cotune.server.approval.PAUSE_S", 0.0)
    monkeypatch.setattr("cotune.server.approval.PASS_S", 0.5)
    within_a_run()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> FedHome:
    settings = {"federation": {"name": "trial", "address": "localhost:8443"}}
    made = FedHome.create(tmp_path_factory.mktemp("coordinator") / "fed", validate(settings, FED_FILE, origin="test"))
    for site, node_id in NODES.items():
        public = ec.generate_private_key(ec.SECP384R1()).public_key()
        node_key = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        known = enrolled_as(site, node_id).model_copy(update={"node_key": node_key})
        (made.path / "sites" / f"{site}.json").write_text(known.model_dump_json())
    return made


@pytest.fixture
def start(home: FedHome, make_job):
    def make(**federation: object) -> RunFolder:
        job = make_job(
            data={"train": None, "sites": dict.fromkeys(NODES, "site:"), "dataset": "notes", "records_per_site": 30},
            federation={"min_sites": 2, **federation},
        )
        run = create_run(home.runs, resolve(job), b"")
        run.set_engine("deployed")
        return run

    return make


def go(run: RunFolder, nodes: Nodes) -> CotuneError:
    with pytest.raises(CotuneError) as caught:
        run_deployed(run, cast(Grid, nodes))
    assert not run.is_held()
    return caught.value


def refuses(records: RecordDict) -> RecordDict:
    return standing_at(records, "refused", rule="allow.models", text="not on the list")


def test_each_site_is_shown_the_signed_job_with_the_bundles_hash(home: FedHome, start) -> None:
    seen: list[Proposal] = []

    def look(records: RecordDict) -> RecordDict:
        proposal = query_from_records(records)
        assert isinstance(proposal, Proposal)
        seen.append(proposal)
        return refuses(records)

    run = start()
    go(run, Nodes(dict.fromkeys(NODES.values(), look)))
    assert sorted(proposal.site for proposal in seen) == sorted(NODES)
    for proposal in seen:
        assert (proposal.run_id, proposal.bundle_sha256) == (run.run_id, bundle_sha256())
        assert proposal.job == run.job()
        assert proposal.signature is not None
        assert verify(home.key.public, "cotune-job", run.job().sha256().encode(), proposal.signature)


def test_a_run_that_is_refused_has_failed_with_exit_code_6(start) -> None:
    run = start()
    error = go(run, Nodes({101: standing_at, 102: refuses}))
    assert (error.code, error.exit_code) == ("E-NOT-APPROVED", 6)
    state = run.state()
    assert (state["status"], state["error"]["exit_code"]) == ("failed", 6)


def test_a_run_that_is_not_approved_in_time_is_paused(start) -> None:
    run = start(approval_timeout_s=0.2)
    waits = lambda records: standing_at(records, "waiting")  # noqa: E731
    error = go(run, Nodes({101: waits, 102: standing_at}))
    assert (error.code, run.state()["status"]) == ("E-APPROVAL-TIMEOUT", "paused")


def test_a_run_that_was_asked_to_stop_stops_before_it_begins(start) -> None:
    run = start()
    run.ask_to_stop()
    nodes = Nodes({101: standing_at, 102: standing_at})
    assert go(run, nodes).code == "E-STOPPED"
    assert (run.state()["status"], nodes.reached) == ("cancelled", [])


def test_where_the_superlink_is_lost_the_run_waits_to_be_given_again(start) -> None:
    def there() -> list[int]:
        raise httpx.ReadError("gone")

    run = start()
    error = go(run, Nodes({}, there))
    assert isinstance(error, ConnectionFailed)
    assert (error.code, run.state()["status"], run.state()["error"]) == ("E-SUPERLINK-LOST", "awaiting_approval", None)


@pytest.mark.parametrize("status", ["running", "succeeded", "failed", "paused", "cancelled"])
def test_a_process_that_comes_late_touches_nothing(start, status) -> None:
    run = start()
    run.set_state(status, 1)
    before = run.state()
    error = go(run, Nodes({101: standing_at, 102: standing_at}))
    assert (error.code, run.state()) == ("E-RUN-NOT-DUE", before)


def test_two_processes_do_not_run_one_run(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.server.conduct.LOOK_S", 0.1)
    run = start()
    before = run.state()
    with run.held(), pytest.raises(JobError) as caught:
        run_deployed(run, cast(Grid, Nodes({})))
    assert (caught.value.code, run.state()) == ("E-RUN-HELD", before)


def test_a_home_elsewhere_is_not_the_runs(make_job, tmp_path: Path) -> None:
    run = create_run(tmp_path / "fed" / "runs", resolve(make_job()), b"")
    assert go(run, Nodes({})).code == "E-FED-HOME"
