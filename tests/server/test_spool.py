"""A round's updates on disk: as they came, one of each site, in the order of names, and gone afterwards."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.server.rounds import SITES, deltas_of, fill, job_of, layout_of, spool_of, state_of

from cotune.server.spool import Spool
from cotune.shared.adapter import Layout
from cotune.shared.aggregation import returned
from cotune.shared.errors import StorageError

JOB = job_of()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".spool"


@pytest.mark.parametrize("order", [SITES, SITES[::-1]], ids=["in order", "in reverse"])
def test_updates_come_back_to_the_bit_by_tensor_whatever_the_order_of_arrival(
    folder: Path, order: tuple[str, ...]
) -> None:
    state, deltas = state_of(layout_of(JOB)), deltas_of(JOB)
    with spool_of(folder, JOB, state) as spool:
        fill(spool, JOB, {site: deltas[site] for site in order})
        assert spool.sites == SITES
        for site in SITES:
            wanted = layout_of(JOB).unflatten(deltas[site])
            for name, array in wanted.items():
                assert spool.delta(site, name).tobytes() == array.tobytes()
                assert spool.delta(site, name).shape == array.shape
                assert spool.before(site, name).tobytes() == state[name].tobytes()


def test_what_a_round_did_not_train_has_not_changed(folder: Path) -> None:
    job = job_of(aggregation={"rule": "alternating_rounds"})
    state = state_of(layout_of(job))
    with spool_of(folder, job, state, number=1) as spool:
        fill(spool, job, deltas_of(job, 1))
        assert not spool.delta("site-1", "m0.lora_A.weight").any()
        assert spool.delta("site-1", "m0.lora_A.weight").shape == (3, 7)
        assert spool.delta("site-1", "m0.lora_B.weight").any()


def test_a_site_of_a_smaller_rank_has_tensors_of_that_rank(folder: Path) -> None:
    job = job_of(lora={"ranks": {"site-2": 1}}, aggregation={"rule": "fedavg_ab"})
    state, deltas = state_of(layout_of(job)), deltas_of(job)
    with spool_of(folder, job, state) as spool:
        fill(spool, job, deltas)
        assert spool.delta("site-2", "m1.lora_B.weight").shape == spool.before("site-2", "m1.lora_B.weight").shape
        np.testing.assert_array_equal(spool.before("site-2", "m1.lora_B.weight"), state["m1.lora_B.weight"][:, :1])
        small = returned(job.rule, layout_of(job).at_rank(1), 1, job.run.rounds)
        for name, array in small.unflatten(deltas["site-2"]).items():
            np.testing.assert_array_equal(spool.delta("site-2", name), array)


def test_a_second_update_of_a_site_is_an_error_and_the_first_one_stands(folder: Path) -> None:
    deltas = deltas_of(JOB)
    with spool_of(folder, JOB, state_of(layout_of(JOB))) as spool:
        spool.add("site-1", 3, deltas["site-1"])
        with pytest.raises(ValueError, match="site-1 was already counted"):
            spool.add("site-1", 3, deltas["site-2"])
        assert spool.sites == ("site-1",)
        wanted = layout_of(JOB).unflatten(deltas["site-1"])
        assert all(spool.delta("site-1", name).tobytes() == array.tobytes() for name, array in wanted.items())


def test_an_update_that_is_given_is_left_as_it_was(folder: Path) -> None:
    deltas = deltas_of(JOB)
    before = deltas["site-1"].copy()
    with spool_of(folder, JOB, state_of(layout_of(JOB))) as spool:
        spool.add("site-1", 3, deltas["site-1"])
        read = spool.delta("site-1", "score.weight")
        read += 1
        assert deltas["site-1"].tobytes() == before.tobytes()
        assert not np.array_equal(spool.delta("site-1", "score.weight"), read)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, [1 / 3, 1 / 3, 1 / 3]),
        ({"site-2": 4.0}, [1 / 6, 4 / 6, 1 / 6]),
        ({"site-1": 2.0, "site-2": 2.0, "site-3": 2.0, "site-5": 100.0}, [1 / 3, 1 / 3, 1 / 3]),
    ],
    ids=["unsaid", "one said", "of others too"],
)
def test_weights_are_the_jobs_one_where_unsaid_and_add_up_to_one(
    folder: Path, weights: dict[str, float], expected: list[float]
) -> None:
    job = job_of(aggregation={"weights": weights})
    with spool_of(folder, job, state_of(layout_of(job))) as spool:
        fill(spool, job, deltas_of(job, sites=SITES[2::-1]))
        np.testing.assert_allclose(spool.weights, expected)


def test_nothing_stays_after_the_round_also_when_it_failed(folder: Path) -> None:
    state = state_of(layout_of(JOB))
    with spool_of(folder, JOB, state) as spool:
        fill(spool, JOB, deltas_of(JOB))
        assert {path.name for path in folder.iterdir()} == set(SITES)
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
    with pytest.raises(RuntimeError), spool_of(folder, JOB, state) as spool:
        fill(spool, JOB, deltas_of(JOB))
        raise RuntimeError
    assert not folder.exists()


def test_what_a_crash_left_behind_is_no_update_of_the_round(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "site-1").write_bytes(b"half an upd")
    with spool_of(folder, JOB, state_of(layout_of(JOB))) as spool:
        assert spool.sites == ()
        assert list(folder.iterdir()) == []
        fill(spool, JOB, deltas_of(JOB))
        assert len(spool.sites) == 5


def test_a_full_disk_is_said_and_the_update_is_not_counted(mount_disk: Callable[[int], Path]) -> None:
    folder = mount_disk(32) / "spool"
    layout = Layout({"w": (100_000,)}, ("w",))
    flat = np.ones(100_000, dtype=np.float32)
    with Spool(folder, {1: layout}, {1: {"w": flat}}, {}) as spool:
        with pytest.raises(StorageError):
            spool.add("site-1", 1, flat)
        assert spool.sites == ()


def test_memory_does_not_grow_with_the_number_of_sites(folder: Path) -> None:
    layout = Layout({"a": (200, 500), "b": (500,)}, ("a", "b"))
    flat = np.ones(layout.size, dtype=np.float32)
    with Spool(folder, {1: layout}, {1: layout.unflatten(flat)}, {}) as spool:
        tracemalloc.start()
        for number in range(50):
            spool.add(f"site-{number}", 1, flat)
            spool.delta(f"site-{number}", "b")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3 * flat.nbytes
