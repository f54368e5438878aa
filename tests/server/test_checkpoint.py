"""Checkpoints: whole or absent, the two newest kept, a damaged one passed over aloud."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.server.rounds import job_of

from cotune.server.checkpoint import FACTS, STATE, Progress, load_checkpoint, save_checkpoint
from cotune.shared.errors import JobError, StorageError
from cotune.shared.files import read_lines
from cotune.shared.folding import folded
from cotune.shared.job import Job
from cotune.shared.jobfile import dump_toml
from cotune.shared.runs import RunFolder

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0}
JOB = job_of()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return made(tmp_path / "run")


def made(folder: Path, job: Job = JOB) -> RunFolder:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "resolved.toml").write_text(dump_toml(job))
    return RunFolder(folder)


def keep(run: RunFolder, progress: Progress) -> None:
    save_checkpoint(run, progress, folded(progress.arrays), CONFIG)


@pytest.fixture
def small_disk(mount_disk: Callable[[int], Path]) -> Path:
    return mount_disk(128)


def progress(number: int, size: int = 8) -> Progress:
    """A state with all there can be in it: offset, control variates, memory, absent sites and notices."""
    random = np.random.default_rng(number)
    a, b = random.standard_normal((2, size)).astype(np.float32), random.standard_normal((size, 2)).astype(np.float32)
    arrays = {"a.lora_A.weight": a, "a.lora_B.weight": b, "a.lora_B.weight|control": -b}
    arrays |= {"a.offset_A.weight": a[:1] * 2, "a.offset_B.weight": b[:, :1] * 3}
    return Progress(
        round=number,
        arrays=arrays,
        clipping_norm=number / 7,
        memory={"a.lora_B.weight|m": b * 5, "average|a.lora_B.weight": b * 7},
        traffic={"site-1": (10 * number, 20 * number), "site-2": (1, 2)},
        absent=("site-2", "site-3"),
        notices={"site-2": f"round {number}: its hash does not match"},
    )


def same(one: Progress | None, other: Progress) -> bool:
    """Everything to the bit."""
    if one is None:
        return False
    facts = [(p.round, p.clipping_norm, p.traffic, p.absent, p.notices) for p in (one, other)]
    bits = [
        {name: (a.shape, a.dtype.str, a.tobytes()) for name, a in part.items()}
        for p in (one, other)
        for part in (p.arrays, p.memory)
    ]
    return facts[0] == facts[1] and bits[:2] == bits[2:]


def kept(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_a_run_without_checkpoints_has_no_progress(run: RunFolder) -> None:
    assert load_checkpoint(run) is None


def test_a_checkpoint_comes_back_to_the_bit(run: RunFolder) -> None:
    keep(run, progress(1))
    assert same(load_checkpoint(run), progress(1))


def test_a_checkpoint_is_a_plain_adapter_folder(run: RunFolder) -> None:
    keep(run, progress(1))
    folder = run.checkpoints / "round-00001"
    plain = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == plain | {STATE, FACTS}
    assert json.loads((folder / "adapter_config.json").read_text()) == {**CONFIG, "r": 3, "lora_alpha": 6.0}
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {name: array.shape for name, array in adapter.items()} == {
        "a.lora_A.weight": (3, 8),
        "a.lora_B.weight": (8, 3),
    }
    state, product = progress(1).arrays, adapter["a.lora_B.weight"] @ adapter["a.lora_A.weight"]
    wanted = state["a.lora_B.weight"] @ state["a.lora_A.weight"]
    wanted += state["a.offset_B.weight"] @ state["a.offset_A.weight"]
    np.testing.assert_allclose(product, wanted, rtol=1e-5, atol=1e-5)


def test_the_two_newest_are_kept_and_every_one_is_on_record(run: RunFolder) -> None:
    for number in (8, 9, 10, 11):
        keep(run, progress(number))
    assert kept(run) == ["round-00010", "round-00011"]
    assert same(load_checkpoint(run), progress(11))
    assert [row["round"] for row in read_lines(run.path / "checkpoints.jsonl")] == [8, 9, 10, 11]


def damage(folder: Path, how: str) -> None:
    weights = folder / STATE
    content = bytearray(weights.read_bytes())
    if how == "one bit":
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
    elif how == "cut short":
        weights.write_bytes(bytes(content[: len(content) // 2]))
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "state gone":
        weights.unlink()
    elif how == "progress gone":
        (folder / FACTS).unlink()
    elif how.startswith("another round's"):
        name = STATE if how.endswith("state") else FACTS
        (folder / name).write_bytes((folder.with_name("round-00001") / name).read_bytes())
    elif how == "progress of another shape":
        (folder / FACTS).write_text("[]")
    else:
        (folder / FACTS).write_text('{"round": ')


DAMAGES = (
    "one bit",
    "cut short",
    "empty",
    "state gone",
    "progress gone",
    "progress of another shape",
    "progress cut short",
    "another round's state",
    "another round's progress",
)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(run: RunFolder, how: str) -> None:
    keep(run, progress(1))
    keep(run, progress(2))
    damage(run.checkpoints / "round-00002", how)
    assert same(load_checkpoint(run), progress(1))
    warning = run.events()[-1]
    assert (warning["level"], warning["type"]) == ("warn", "checkpoint")
    assert "round-00002 is damaged" in warning["message"]


@pytest.mark.parametrize("name", [STATE, FACTS])
def test_a_byte_flipped_anywhere_is_noticed(run: RunFolder, name: str) -> None:
    keep(run, progress(1, size=2))
    file = run.checkpoints / "round-00001" / name
    whole = file.read_bytes()
    for place, byte in enumerate(whole):
        file.write_bytes(whole[:place] + bytes([byte ^ 1 << place % 8]) + whole[place + 1 :])
        found = load_checkpoint(run)
        if found is not None:  # white space between words, which says the same
            assert name == FACTS
            assert json.loads(file.read_bytes()) == json.loads(whole)
            assert same(found, progress(1, size=2))
    file.write_bytes(whole)
    assert same(load_checkpoint(run), progress(1, size=2))


def test_a_fact_that_was_changed_with_care_is_noticed_by_its_hash(run: RunFolder) -> None:
    keep(run, progress(1))
    file = run.checkpoints / "round-00001" / FACTS
    written = json.loads(file.read_text())
    for fact, value in {"round": 7, "clipping_norm": 9.0, "notices": {}, "absent": [], "traffic": {}}.items():
        file.write_text(json.dumps({**written, "facts": {**written["facts"], fact: value}}))
        assert load_checkpoint(run) is None, fact


@pytest.mark.parametrize("newest", [1, 2], ids=["the only one", "the newest"])
def test_a_checkpoint_of_another_job_is_refused_by_name_and_left_where_it_is(tmp_path: Path, newest: int) -> None:
    run = made(tmp_path / "run")
    for number in range(1, newest + 1):
        keep(run, progress(number))
    other = job_of(run={"seed": 99})
    (run.path / "resolved.toml").write_text(dump_toml(other))
    with pytest.raises(JobError) as caught:
        load_checkpoint(run)
    assert (caught.value.code, caught.value.exit_code) == ("E-CHECKPOINT-JOB", 4)
    for said in (f"round-{newest:05d}", JOB.sha256()[:12], other.sha256()[:12]):
        assert said in caught.value.message
    assert "resolved.toml" in str(caught.value.hint)
    (run.path / "resolved.toml").write_text(dump_toml(JOB))
    assert same(load_checkpoint(run), progress(newest))


def test_two_damaged_checkpoints_leave_nothing_to_go_on_from(run: RunFolder) -> None:
    for number in (1, 2):
        keep(run, progress(number))
        damage(run.checkpoints / f"round-{number:05d}", "one bit")
    assert load_checkpoint(run) is None
    assert len(run.events()) == 2


def test_a_round_whose_checkpoint_was_damaged_can_be_taken_and_saved_again(run: RunFolder) -> None:
    keep(run, progress(1))
    keep(run, progress(2))
    damage(run.checkpoints / "round-00002", "one bit")
    again = replace(progress(7), round=2)
    keep(run, again)
    assert same(load_checkpoint(run), again)


def test_what_a_crash_left_half_written_is_no_checkpoint(run: RunFolder) -> None:
    keep(run, progress(1))
    half = run.checkpoints / ".round-00002.tmp"
    half.mkdir()
    (half / "adapter_config.json").write_text("{}")
    assert same(load_checkpoint(run), progress(1))
    keep(run, progress(2))
    assert kept(run) == ["round-00001", "round-00002"]


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 512):
                pass
        except OSError:
            return


def test_a_full_disk_leaves_earlier_checkpoints_whole_and_no_half_one(small_disk: Path) -> None:
    run = made(small_disk / "run")
    keep(run, progress(1))
    fill(small_disk)
    with pytest.raises(StorageError) as caught:
        keep(run, progress(2))
    assert (caught.value.code, caught.value.exit_code) == ("E-STORAGE", 1)
    assert "No space left" in caught.value.message
    assert kept(run) == ["round-00001"]
    assert same(load_checkpoint(run), progress(1))
    (small_disk / "filler").unlink()
    keep(run, progress(2))
    assert same(load_checkpoint(run), progress(2))
