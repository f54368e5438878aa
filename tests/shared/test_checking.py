"""Checks on what strangers wrote: ledgers of any length in little memory, words that steer no terminal."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from cotune.shared.chain import MAX_LINE, Entry, ledger_lines, next_line, read_chain, walk_chain
from cotune.shared.checking.checks import MAX_DETAIL, Failed, printable, require, run_checks
from cotune.shared.errors import JobError, StorageError


def write_chain(path: Path, lines: int) -> list[Entry]:
    content, last = [next_line(None, "now", "site.init", {"site": "a"})], None
    [last] = read_chain(content[0])
    entries = [last]
    for number in range(1, lines):
        content.append(
            next_line(last, "now", "job.refused", {"job_sha256": f"{number:064x}", "rule": "r", "text": "t"})
        )
        [last] = read_chain(content[-1], last)
        entries.append(last)
    path.write_bytes(b"".join(content))
    return entries


def test_a_long_ledger_is_checked_line_by_line_in_little_memory(tmp_path: Path) -> None:
    entries = write_chain(tmp_path / "ledger.jsonl", 10_000)
    tracemalloc.start()
    count, last = 0, None
    for entry in walk_chain(ledger_lines(tmp_path / "ledger.jsonl")):
        count, last = count + 1, entry
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (count, last) == (10_000, entries[-1])
    assert most < 200_000 < (tmp_path / "ledger.jsonl").stat().st_size / 10


@pytest.mark.parametrize(
    "tail", [b'{"seq": 3', b"x" * (MAX_LINE + 10) + b"\n", b"\xff\n", b"\n", b"[" * 100_000 + b"\n"]
)
def test_a_line_that_is_none_is_named_by_its_number(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    write_chain(path, 2)
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(StorageError, match="ledger line 3: "):
        list(walk_chain(ledger_lines(path)))


def test_a_check_fails_by_name_whatever_it_meets() -> None:
    def fails(_subject: object) -> str:
        require(False, "two\nlines \x1b[31m")
        return ""

    def breaks(subject: dict[str, int]) -> str:
        return str(subject["missing"])

    def refuses(_subject: object) -> str:
        raise JobError("E-CLAIM-VERSION", "too new", hint="pip install -U cotune")

    table = {"holds": lambda _subject: "well\x07", "fails": fails, "breaks": breaks, "refuses": refuses}
    found = {check.name: (check.passed, check.detail) for check in run_checks(table, {})}
    assert found == {
        "holds": (True, "well "),
        "fails": (False, "two lines  [31m"),
        "breaks": (False, "cannot be checked (KeyError)"),
        "refuses": (False, "too new: pip install -U cotune"),
    }


def test_a_defect_of_ours_is_not_taken_for_a_failed_check() -> None:
    def broken(_subject: object) -> str:
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        run_checks({"broken": broken}, None)
    with pytest.raises(Failed):
        require(False, "no")


def test_words_are_one_line_without_control_characters_and_have_an_end() -> None:
    assert printable("a\u202eb\x00c\u2028d") == "a b c d"
    assert printable("é \u4e2d") == "é \u4e2d"
    assert len(printable("x" * 10_000)) <= MAX_DETAIL + 4
