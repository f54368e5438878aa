"""Files that are written whole or not at all, whatever happens to the disk or the process."""

import json
import multiprocessing
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.shared.errors import StorageError
from cotune.shared.files import append_line, file_sha256, read_lines, write_atomic, write_json

PROCESSES, LINES = 4, 200


@pytest.fixture
def small_disk(mount_disk: Callable[[int], Path]) -> Path:
    return mount_disk(64)


def test_what_is_written_is_what_was_given_and_no_other_file_is_left(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one")
    write_atomic(tmp_path / "a", b"two")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"two"}


def test_a_full_disk_leaves_the_old_file_whole_and_no_half_file(small_disk: Path) -> None:
    write_atomic(small_disk / "a.json", b"old")
    with pytest.raises(StorageError) as caught:
        write_atomic(small_disk / "a.json", b"x" * 200_000)
    assert (caught.value.code, caught.value.exit_code) == ("E-STORAGE", 1)
    assert "No space left" in caught.value.message
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == {"a.json": b"old"}


def test_a_file_size_limit_leaves_the_old_file_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    code = f"""
        import resource, sys
        from pathlib import Path
        from cotune.shared.errors import StorageError
        from cotune.shared.files import write_atomic
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_atomic(Path({str(tmp_path / "a")!r}), b"x" * 2000)
        except StorageError as error:
            sys.exit(error.exit_code + 40)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == 41
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "none" / "a", b"x")
    with pytest.raises(StorageError):
        append_line(tmp_path / "none" / "a", {})


def test_json_never_holds_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_line_torn_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for number in range(3):
        append_line(path, {"n": number})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["n"] for row in read_lines(path)] == list(range(whole[:cut].count(b"\n")))


def test_a_line_appended_after_a_torn_one_is_read_and_the_torn_one_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, {"n": 0})
    with path.open("ab") as file:
        file.write(b'{"n": 1, "te')  # what a crash or a full disk leaves of a line
    append_line(path, {"n": 2})
    assert [row["n"] for row in read_lines(path)] == [0, 2]


def test_a_full_disk_while_appending_is_said_and_costs_no_earlier_or_later_line(small_disk: Path) -> None:
    path = small_disk / "events.jsonl"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    written = 0
    with pytest.raises(StorageError):
        for number in range(10_000):
            append_line(path, {"n": number, "text": "x" * 50})
            written += 1
    filler.unlink()
    append_line(path, {"n": -1})
    assert [row["n"] for row in read_lines(path)] == [*range(written), -1]


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none") == []


def append_many(path: str, writer: int) -> None:
    for number in range(LINES):
        append_line(Path(path), {"writer": writer, "n": number, "text": "é" * (number % 90)})


def test_lines_that_several_processes_append_at_once_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_many, args=(str(path), n)) for n in range(PROCESSES)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    rows = read_lines(path)
    assert len(rows) == PROCESSES * LINES
    for number in range(PROCESSES):
        assert [row["n"] for row in rows if row["writer"] == number] == list(range(LINES))


def test_a_files_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
