"""What the lower layers make of a record is kept, found again by other processes, and never mistaken."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.shared import features
from cotune.shared.examples import Example, tokenize
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.methods import attach
from cotune.shared.model import load_model, load_tokenizer, locate
from cotune.shared.network import Network
from cotune.shared.records import read_records


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small matrices: threads would only wait for each other."""
    torch.set_num_threads(1)


def network_of(job: Job) -> Network:
    return Network(attach(load_model(locate(job), job), job), job)


def examples_of(job: Job, first: int = 0) -> list[Example]:
    """Twenty examples of several lengths."""
    records = read_records(Path(str(job.data.train)))[first : first + 20]
    whole = tokenize(records, load_tokenizer(locate(job)), job)
    return [Example(e.ids[i % 5 :], e.start - i % 5) for i, e in enumerate(whole)]


def assert_same(got: list[Any] | None, wanted: list[Any]) -> None:
    assert got is not None
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_kept_outputs_are_those_of_each_record_alone_in_any_order(make_job: Any, tmp_path: Path, on_disk: bool) -> None:
    job = make_job()
    network, examples = network_of(job), examples_of(job)
    kept = Features(network, examples, tmp_path / "kept" if on_disk else None)
    for rows in ([3], [7, 3, 0], list(range(20)), [19, 19, 1], []):
        assert_same(kept.of(rows), [network.encode([examples[row]])[0] for row in rows])


def test_losses_from_kept_outputs_are_those_of_the_whole_model(make_job: Any) -> None:
    job = make_job()
    network, examples = network_of(job), examples_of(job)
    hidden = Features(network, examples).of(range(20))
    torch.testing.assert_close(network.losses(examples, hidden), network.losses(examples, None), rtol=1e-5, atol=1e-5)


def test_two_objects_share_what_is_on_disk(make_job: Any, tmp_path: Path) -> None:
    job = make_job()
    network, examples = network_of(job), examples_of(job)
    first, second = (Features(network, examples, tmp_path / "kept") for _ in range(2))
    assert first.of([0, 5]) is not None
    assert len(list((tmp_path / "kept").iterdir())) == 2
    for file in (tmp_path / "kept").iterdir():  # a mark that computing again would not leave
        np.full(file.stat().st_size // 4, 42.0, dtype=np.float32).tofile(file)
    for values in second.of([0, 5]) or [None]:
        assert (values == 42.0).all()
    assert_same(Features(network, examples, tmp_path / "kept").of([6]), network.encode([examples[6]]))


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_filled_outputs_are_those_of_each_record_alone_and_are_made_once(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    job = make_job()
    network, examples = network_of(job), examples_of(job)
    kept = Features(network, examples, tmp_path / "kept" if on_disk else None)
    kept.of([3])
    kept.fill()
    wanted = [network.encode([example])[0] for example in examples]
    monkeypatch.delattr(network, "_lower")  # nothing can be made any more
    kept.fill()
    assert_same(kept.of(range(20)), wanted)


def test_what_is_kept_lies_in_a_folder_for_its_owner_alone(make_job: Any, tmp_path: Path) -> None:
    job = make_job()
    Features(network_of(job), examples_of(job), tmp_path / "kept").of([0])
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700


def test_other_records_in_the_same_folder_never_get_the_old_ones_outputs(make_job: Any, tmp_path: Path) -> None:
    job = make_job()
    network = network_of(job)
    Features(network, examples_of(job), tmp_path / "kept").of(range(20))
    changed = examples_of(job, first=20)
    assert_same(Features(network, changed, tmp_path / "kept").of(range(20)), [network.encode([e])[0] for e in changed])


def test_nothing_is_kept_of_a_network_that_cannot_be_split(make_job: Any, tmp_path: Path) -> None:
    job = make_job(lora={"last_layers": "all"})
    kept = Features(network_of(job), examples_of(job), tmp_path / "kept")
    kept.fill()
    assert kept.of([0, 1]) is None
    assert not (tmp_path / "kept").exists()


def test_nothing_is_kept_of_no_examples(make_job: Any, tmp_path: Path) -> None:
    assert Features(network_of(make_job()), [], tmp_path / "kept").of([]) is None


def test_nothing_is_kept_beyond_the_limit(make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    network, examples = network_of(job), examples_of(job)
    size = sum(len(e.ids) for e in examples) * 32 * 4
    monkeypatch.setattr(features, "MAX_BYTES", size - 1)
    assert Features(network, examples, tmp_path / "kept").of([0]) is None
    monkeypatch.setattr(features, "MAX_BYTES", size)
    assert Features(network, examples, tmp_path / "kept").of([0]) is not None
