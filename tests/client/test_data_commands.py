"""`cotune data` as a user runs it: exit codes, counts, row numbers and never a text."""

import json
from pathlib import Path

import pytest

from cotune.shared.cli import run

CANARY = "kumquat-7731"


def rows(path: Path, *values: dict | bytes) -> Path:
    lines = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def pair(number: int, completion: str | None = None, **more) -> dict:
    return {"prompt": f"{CANARY} {number}", "completion": completion or f" {CANARY} {number % 2}", **more}


@pytest.fixture
def told(capsys):
    """Run a command and return its exit code and outputs; no output may hold the canary."""

    def tell(*arguments: object) -> tuple[int, str, str]:
        code = run(["data", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert CANARY not in out + err
        return code, out, err

    return tell


def findings(out: str) -> dict[str, dict]:
    envelope = json.loads(out)
    listed = [f for file in envelope["data"]["files"] for f in file["findings"]] + envelope["data"]["together"]
    return {finding["code"]: finding for finding in listed}


def test_a_sound_file_passes_with_its_counts(told, tmp_path):
    code, out, err = told("check", rows(tmp_path / "a.jsonl", *map(pair, range(43))))
    assert (code, err) == (0, "")
    assert "43 records, shape completion" in out
    assert "2 distinct completions; the commonest has 22 rows, the rarest 21" in out
    assert "data.records_per_site = 40" in out


def test_bad_rows_are_counted_by_reason_and_exit_with_4(told, tmp_path):
    path = rows(tmp_path / "a.jsonl", pair(1), CANARY.encode(), pair(2, " "), b'{"text": "\xff"}')
    code, out, err = told("check", path)
    assert code == 4
    assert "1 row not JSON (rows 2)" in out
    assert "1 row with an empty `completion` (rows 3)" in out
    assert err.startswith("E-DATA-ENCODING  a.jsonl: 3 of 4 rows cannot be used")
    assert "mend it: cotune data check a.jsonl --fix out/" in err


def test_bad_rows_are_one_envelope_of_status_error_with_the_findings(told, tmp_path):
    code, out, err = told("check", rows(tmp_path / "a.jsonl", pair(1), CANARY.encode()), "--json")
    envelope = json.loads(out)
    assert (code, err) == (4, "")
    assert (envelope["status"], envelope["error"]["code"]) == ("error", "E-DATA-ROW")
    assert envelope["data"]["files"][0]["bad_rows"] == 1
    assert findings(out)["E-DATA-ROW"]["rows"] == [2]


def test_at_most_twenty_rows_are_listed(told, tmp_path):
    _, out, _ = told("check", rows(tmp_path / "a.jsonl", pair(1), *[b"{"] * 30), "--json")
    assert findings(out)["E-DATA-ROW"]["rows"] == list(range(2, 22))
    assert findings(out)["E-DATA-ROW"]["message"] == "30 rows not JSON"


def test_repeated_rows_are_those_equal_in_every_column(told, tmp_path):
    path = rows(tmp_path / "a.jsonl", pair(1, id=1), pair(2), pair(1, id=1), pair(1, id=2), pair(2))
    _, out, _ = told("check", path, "--json")
    assert findings(out)["W-DATA-DUPLICATE"]["rows"] == [3, 5]


def test_a_completion_without_a_space_is_advised(told, tmp_path):
    path = rows(tmp_path / "a.jsonl", pair(1), pair(2, CANARY), {"prompt": "a\n", "completion": "b"})
    _, out, _ = told("check", path, "--json")
    assert findings(out)["W-DATA-SPACE"]["rows"] == [2]


def test_one_label_only_is_nothing_to_learn(told, tmp_path):
    path = rows(tmp_path / "a.jsonl", {"text": "a", "label": CANARY}, {"text": "b", "label": CANARY})
    _, out, _ = told("check", path)
    assert "all labels are the same" in out


def test_lengths_and_the_longest_rows_are_told(told, tmp_path):
    path = rows(tmp_path / "a.jsonl", *({"text": "x" * length} for length in range(1, 101)))
    _, out, _ = told("check", path, "--json")
    found = findings(out)["I-DATA-LENGTH"]
    assert "half have at most 51, 90 % 91, 99 % 100, all 100" in found["message"]
    assert found["rows"] == [100, 99, 98, 97, 96]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jo.doe+x@mail.example.org now", "e-mail"),
        ("call +49 (030) 1234-5678", "telephone"),
        ("call 555-123-4567.", "telephone"),
        ("id 078-05-1120", "social security"),
    ],
)
def test_personal_data_are_counted_by_kind(told, tmp_path, text, kind):
    path = rows(tmp_path / "a.jsonl", {"text": "a"}, {"text": text})
    _, out, err = told("check", path, "--json")
    found = findings(out)["W-DATA-PERSONAL"]
    assert kind in found["message"]
    assert found["rows"] == [2]
    assert text not in out + err


def test_clinical_figures_are_not_taken_for_personal_data(told, tmp_path):
    path = rows(tmp_path / "a.jsonl", {"text": "RR 120/80, code I25.10, 2024-05-01, 3.5-5.1 mmol, @home"})
    _, out, _ = told("check", path, "--json")
    assert "W-DATA-PERSONAL" not in findings(out)


def test_rows_in_two_files_are_a_leak_whatever_their_other_columns(told, tmp_path):
    train = rows(tmp_path / "train.jsonl", *(pair(number, id=number) for number in range(5)))
    test = rows(tmp_path / "test.jsonl", pair(7), pair(3), pair(8))
    _, out, _ = told("check", train, test, "--json")
    found = findings(out)["W-DATA-OVERLAP"]
    assert "1 row of test.jsonl also in train.jsonl" in found["message"]
    assert found["rows"] == [2]


def test_files_of_different_shapes_are_told(told, tmp_path):
    one, other = rows(tmp_path / "a.jsonl", pair(1)), rows(tmp_path / "b.jsonl", {"text": "a"})
    _, out, _ = told("check", one, other)
    assert "different shapes: completion, text" in out


def test_fix_writes_copies_without_bad_and_repeated_rows(told, tmp_path):
    source = rows(tmp_path / "a.jsonl", pair(1), CANARY.encode(), pair(1), pair(2, tags=["kept"]))
    source.chmod(0o600)
    before = source.read_bytes()
    code, out, err = told("check", source, "--fix", tmp_path / "out")
    copy = tmp_path / "out" / "a.jsonl"
    assert (code, err) == (0, "")
    assert [json.loads(line) for line in copy.read_text().splitlines()] == [pair(1), pair(2, tags=["kept"])]
    assert f"wrote {copy}: 2 records, 2 removed" in out
    assert source.read_bytes() == before
    assert copy.stat().st_mode & 0o777 == 0o600
    assert told("check", copy)[0] == 0


def test_fix_never_writes_over_a_source(told, tmp_path):
    source = rows(tmp_path / "a.jsonl", pair(1), b"{")
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "hard").mkdir()
    (tmp_path / "hard" / "a.jsonl").hardlink_to(source)
    for out in (tmp_path, tmp_path / "link", tmp_path / "x" / "..", tmp_path / "hard", source):
        code, _, err = told("check", source, "--fix", out)
        assert (code, err.split()[0]) == (4, "E-DATA-FIX")
    assert source.read_bytes() == before


def test_fix_refuses_two_files_of_one_name(told, tmp_path):
    (tmp_path / "b").mkdir()
    files = (rows(tmp_path / "a.jsonl", pair(1)), rows(tmp_path / "b" / "a.jsonl", pair(2)))
    code, _, err = told("check", *files, "--fix", tmp_path / "out")
    assert (code, err.split()[0]) == (4, "E-DATA-FIX")
    assert not (tmp_path / "out").exists()


def test_a_file_without_one_sound_row_cannot_be_fixed(told, tmp_path):
    code, _, err = told("check", rows(tmp_path / "a.jsonl", CANARY.encode()), "--fix", tmp_path / "out")
    assert (code, err.split()[0]) == (4, "E-DATA-ROW")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "E-DATA-FILE"),
        (b"", "E-DATA-EMPTY"),
        (b'{"text": "' + CANARY.encode() * 200_000 + b'"}', "E-DATA-ROW"),
        (CANARY.encode("utf-16"), "E-DATA-ENCODING"),
        (CANARY.encode() + b"\n", "E-DATA-ROW"),
    ],
    ids=["missing", "empty", "huge line", "not UTF-8", "no valid record"],
)
def test_files_of_no_use_exit_with_4_and_a_code(told, tmp_path, content, code):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    exit_code, _, err = told("check", path)
    assert (exit_code, err.split()[0]) == (4, code)
    assert json.loads(told("check", path, "--json")[1])["error"]["code"] == code


def test_fetch_without_a_name_lists_the_sets(told):
    code, out, _ = told("fetch")
    assert code == 0
    assert "icd10" in out
    assert "public domain" in out
    assert json.loads(told("fetch", "--json")[1])["data"]["datasets"][0]["name"] == "icd10"


def test_fetching_an_unknown_set_names_the_nearest(told):
    code, _, err = told("fetch", "icd11")
    assert code == 4
    assert "Did you mean `icd10`" in err
