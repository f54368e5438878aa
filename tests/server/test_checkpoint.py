"""Checkpoints: whole or absent, the two newest kept, a damaged one passed over aloud."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cotune.server.checkpoint import Progress, load_checkpoint, save_checkpoint
from cotune.shared.errors import StorageError
from cotune.shared.files import read_lines
from cotune.shared.runs import RunFolder

CONFIG = {"peft_type": "LORA", "r": 2}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return made(tmp_path / "run")


def made(folder: Path) -> RunFolder:
    (folder / "checkpoints").mkdir(parents=True)
    return RunFolder(folder)


@pytest.fixture
def small_disk(mount_disk: Callable[[int], Path]) -> Path:
    return mount_disk(128)


def progress(number: int, size: int = 8) -> Progress:
    values = np.random.default_rng(number).standard_normal((2, size)).astype(np.float32)
    arrays = {"a.lora_A.weight": values, "a.lora_B.weight": values.T.copy()}
    return Progress(number, arrays, number / 7, {"site-1": (10 * number, 20 * number), "site-2": (1, 2)})


def same(one: Progress | None, other: Progress) -> bool:
    return (
        one is not None
        and (one.round, one.traffic) == (other.round, other.traffic)
        and one.arrays.keys() == other.arrays.keys()
        and all(one.arrays[name].tobytes() == other.arrays[name].tobytes() for name in one.arrays)
    )


def kept(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_a_run_without_checkpoints_has_no_progress(run: RunFolder) -> None:
    assert load_checkpoint(run) is None


def test_a_checkpoint_comes_back_to_the_bit(run: RunFolder) -> None:
    save_checkpoint(run, progress(1), CONFIG)
    assert same(load_checkpoint(run), progress(1))


def test_a_checkpoint_is_a_plain_adapter_folder(run: RunFolder) -> None:
    save_checkpoint(run, progress(1), CONFIG)
    folder = run.checkpoints / "round-00001"
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "progress.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "adapter_config.json").read_text()) == CONFIG


def test_the_two_newest_are_kept_and_every_one_is_on_record(run: RunFolder) -> None:
    for number in (8, 9, 10, 11):
        save_checkpoint(run, progress(number), CONFIG)
    assert kept(run) == ["round-00010", "round-00011"]
    assert same(load_checkpoint(run), progress(11))
    assert [row["round"] for row in read_lines(run.path / "checkpoints.jsonl")] == [8, 9, 10, 11]


def damage(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    if how == "one bit":
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
    elif how == "cut short":
        weights.write_bytes(bytes(content[: len(content) // 2]))
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "weights gone":
        weights.unlink()
    elif how == "progress gone":
        (folder / "progress.json").unlink()
    elif how == "progress of another shape":
        (folder / "progress.json").write_text("[]")
    else:
        (folder / "progress.json").write_text('{"round": ')


DAMAGES = (
    "one bit",
    "cut short",
    "empty",
    "weights gone",
    "progress gone",
    "progress of another shape",
    "progress cut short",
)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(run: RunFolder, how: str) -> None:
    save_checkpoint(run, progress(1), CONFIG)
    save_checkpoint(run, progress(2), CONFIG)
    damage(run.checkpoints / "round-00002", how)
    assert same(load_checkpoint(run), progress(1))
    warning = run.events()[-1]
    assert (warning["level"], warning["type"]) == ("warn", "checkpoint")
    assert "round-00002 is damaged" in warning["message"]


def test_two_damaged_checkpoints_leave_nothing_to_go_on_from(run: RunFolder) -> None:
    for number in (1, 2):
        save_checkpoint(run, progress(number), CONFIG)
        damage(run.checkpoints / f"round-{number:05d}", "one bit")
    assert load_checkpoint(run) is None
    assert len(run.events()) == 2


def test_a_round_whose_checkpoint_was_damaged_can_be_taken_and_saved_again(run: RunFolder) -> None:
    save_checkpoint(run, progress(1), CONFIG)
    save_checkpoint(run, progress(2), CONFIG)
    damage(run.checkpoints / "round-00002", "one bit")
    again = Progress(2, progress(7).arrays, 1.0, {})
    save_checkpoint(run, again, CONFIG)
    assert same(load_checkpoint(run), again)


def test_what_a_crash_left_half_written_is_no_checkpoint(run: RunFolder) -> None:
    save_checkpoint(run, progress(1), CONFIG)
    half = run.checkpoints / ".round-00002.tmp"
    half.mkdir()
    (half / "adapter_config.json").write_text("{}")
    assert same(load_checkpoint(run), progress(1))
    save_checkpoint(run, progress(2), CONFIG)
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
    save_checkpoint(run, progress(1), CONFIG)
    fill(small_disk)
    with pytest.raises(StorageError) as caught:
        save_checkpoint(run, progress(2), CONFIG)
    assert (caught.value.code, caught.value.exit_code) == ("E-STORAGE", 1)
    assert "No space left" in caught.value.message
    assert kept(run) == ["round-00001"]
    assert same(load_checkpoint(run), progress(1))
    (small_disk / "filler").unlink()
    save_checkpoint(run, progress(2), CONFIG)
    assert same(load_checkpoint(run), progress(2))
