"""Record files: what is accepted, and that no fault ever quotes a row."""

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest

from cotune.shared.errors import DataError
from cotune.shared.records import MAX_LINE_BYTES, Record, read_records, scan

CANARY = "kumquat-7731"
GOOD = b'{"prompt": "a", "completion": " b"}'


def write(folder: Path, content: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    return path


def refusal(path: Path, **settings) -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(path, **settings)
    assert CANARY not in json.dumps(caught.value.to_dict())
    assert caught.value.__cause__ is None
    return caught.value


@pytest.mark.parametrize(
    ("row", "shape", "contents"),
    [
        ({"prompt": "p", "completion": " c", "text": "t"}, "completion", ("p", " c")),
        ({"text": "t", "label": "x"}, "label", ("t", "x")),
        ({"text": "t"}, "text", ("t",)),
        ({"text": "t", "label": None}, "text", ("t",)),
        (
            {
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "prompt": "p",
                "completion": "c",
            },
            "messages",
            ("q", "a"),
        ),
    ],
)
def test_the_shape_of_a_row_is_found(tmp_path, row, shape, contents):
    [record] = read_records(write(tmp_path, json.dumps(row).encode()))
    assert (record.shape, record.contents()) == (shape, contents)


def test_a_given_shape_is_read_from_rows_that_have_more(tmp_path):
    row = {"prompt": "p", "completion": " c", "text": "t", "label": "x"}
    [record] = read_records(write(tmp_path, json.dumps(row).encode()), shape="label")
    assert record.contents() == ("t", "x")


def test_columns_of_one_value_are_kept_and_others_are_not(tmp_path):
    row = {"text": "t", "ward": "3", "age": 7, "dose": 0.5, "new": True, "gone": None, "tags": ["x"]}
    [record] = read_records(write(tmp_path, json.dumps(row).encode()))
    assert record.columns == {"text": "t", "ward": "3", "age": 7, "dose": 0.5, "new": True, "gone": None}


def test_a_record_shows_no_content_and_survives_a_process_border(tmp_path):
    [record] = read_records(write(tmp_path, json.dumps({"text": CANARY}).encode()))
    assert CANARY not in repr(record)
    assert CANARY not in repr([*scan(write(tmp_path, json.dumps({"text": CANARY}).encode()))])
    assert pickle.loads(pickle.dumps(record)) == record  # noqa: S301
    assert isinstance(hash(record), int)


def test_a_mark_at_the_start_carriage_returns_blank_lines_and_no_last_newline_are_accepted(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD)
    assert [row.number for row in scan(path)] == [1, 4]


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    text = "a\u2028b\u0085c"
    [record] = read_records(write(tmp_path, json.dumps({"text": text}, ensure_ascii=False).encode()))
    assert record.text == text


def test_an_escaped_pair_of_surrogates_is_one_character(tmp_path):
    [record] = read_records(write(tmp_path, b'{"text": "\\ud83d\\ude00"}'))
    assert record.text == "\U0001f600"


def completion(completion: str, **more) -> bytes:
    return json.dumps({"prompt": CANARY, "completion": completion, **more}).encode()


def messages(*roles_and_contents) -> bytes:
    listed = [{"role": role, "content": content} for role, content in roles_and_contents]
    return json.dumps({"messages": listed, "note": CANARY}).encode()


BAD_ROWS = {
    "broken": (b'{"prompt": "kumquat-7731", ', "not JSON"),
    "two objects": (GOOD + GOOD, "not JSON"),
    "a mark inside": (b"\xef\xbb\xbf" + GOOD, "not JSON"),
    "array": (b'["kumquat-7731"]', "not a JSON object"),
    "string": (b'"kumquat-7731"', "not a JSON object"),
    "number": (b"7731", "not a JSON object"),
    "twice": (b'{"text": "kumquat-7731", "text": "b"}', "same field twice"),
    "twice inside": (b'{"text": "kumquat-7731", "x": {"y": 1, "y": 2}}', "same field twice"),
    "NaN": (b'{"text": "kumquat-7731", "x": NaN}', "NaN"),
    "Infinity": (b'{"text": "kumquat-7731", "x": -Infinity}', "NaN"),
    "float too large": (b'{"text": "kumquat-7731", "x": 1e999}', "too large"),
    "5,000 digits": (b'{"text": "kumquat-7731", "x": ' + b"7" * 5000 + b"}", "too large"),
    "bomb": (b'{"text": ' + b"[" * 200_000, "nested too deeply"),
    "half a pair": (b'{"text": "kumquat-7731 \\ud800"}', "surrogate"),
    "half a pair in a name": (b'{"text": "kumquat-7731", "\\uDC00": 1}', "surrogate"),
    "long": (b'{"text": "kumquat-7731' + b"a" * MAX_LINE_BYTES + b'"}', "longer than 1,000,000 bytes"),
    "wrong type": (b'{"prompt": "kumquat-7731", "completion": 3}', "whose `completion` is not a text"),
    "missing half": (b'{"prompt": "kumquat-7731"}', "without `completion`"),
    "null half": (b'{"prompt": null, "completion": "kumquat-7731"}', "without `prompt`"),
    "empty": (completion(" \n"), "empty `completion`"),
    "no shape": (b'{"body": "kumquat-7731"}', "without messages, prompt and completion, or text"),
    "label of a wrong type": (b'{"text": "kumquat-7731", "label": 1}', "whose `label` is not a text"),
    "messages not a list": (b'{"messages": "kumquat-7731"}', "`messages` is not a list"),
    "message not an object": (b'{"messages": ["kumquat-7731"]}', "not all objects"),
    "unknown role": (messages(("kumquat-7731", "x"), ("assistant", "y")), "with a role other than"),
    "role not hashable": (messages((["kumquat-7731"], "x")), "with a role other than"),
    "no answer": (messages(("user", "kumquat-7731")), "no assistant message"),
    "no messages": (messages(), "no assistant message"),
    "empty message": (messages(("assistant", "")), "empty `content`"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_number_and_never_quoted(tmp_path, row, reason):
    error = refusal(write(tmp_path, GOOD + b"\n\n" + row + b"\n" + GOOD + b"\n"))
    assert error.code == "E-DATA-ROW"
    assert reason in error.message
    assert "rows.jsonl: 1 of 3 rows" in error.message
    assert "(row 3)" in error.message
    assert error.hint == "cotune data check rows.jsonl --fix out/"
    assert error.exit_code == 4


def test_a_row_that_is_not_utf_8_has_its_own_code(tmp_path):
    error = refusal(write(tmp_path, GOOD + b"\n" + b'{"text": "kumquat-7731 \xff"}\n'))
    assert (error.code, "(row 2)" in error.message) == ("E-DATA-ENCODING", True)


def test_a_file_in_utf_16_is_refused_for_its_encoding(tmp_path):
    assert refusal(write(tmp_path, GOOD.decode().encode("utf-16"))).code == "E-DATA-ENCODING"


def test_rows_of_another_shape_than_the_first_are_refused(tmp_path):
    error = refusal(write(tmp_path, GOOD + b'\n{"text": "kumquat-7731"}\n{"text": "t", "label": "x"}\n'))
    assert "2 of another shape than the first good row (rows 2, 3)" in error.message


def test_a_row_without_the_shape_asked_for_is_refused(tmp_path):
    assert "1 without `text` (row 1)" in refusal(write(tmp_path, GOOD), shape="label").message
    assert "1 without `messages` (row 1)" in refusal(write(tmp_path, GOOD), shape="messages").message


def test_only_the_first_rows_of_many_are_listed_and_reasons_are_kept_apart(tmp_path):
    error = refusal(write(tmp_path, b"{\n" * 7 + b"[]\n" + GOOD))
    assert "8 of 9 rows cannot be used: 7 not JSON (rows 1, 2, 3, 4, 5, …)" in error.message
    assert "1 not a JSON object (row 8)" in error.message


def test_a_file_of_bad_rows_only_is_refused(tmp_path):
    assert "2 of 2 rows" in refusal(write(tmp_path, b"kumquat-7731\nkumquat-7731\n")).message


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_empty(tmp_path, content):
    assert refusal(write(tmp_path, content)).code == "E-DATA-EMPTY"


def test_what_is_no_readable_file_is_refused_at_once(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path / "none.jsonl", tmp_path, fifo, Path("a\0b")):
        assert refusal(path).code == "E-DATA-FILE"


def test_a_file_one_may_not_read_is_refused(tmp_path):
    path = write(tmp_path, GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert refusal(path).code == "E-DATA-FILE"


def test_a_line_of_the_greatest_length_is_read_with_either_line_end(tmp_path):
    row = b'{"text": "' + b"a" * (MAX_LINE_BYTES - 12) + b'"}'
    assert len(row) == MAX_LINE_BYTES
    path = write(tmp_path, row + b"\r\n" + row + b"\n" + row)
    assert len(read_records(path)) == 3


def test_a_huge_line_is_never_held_in_memory(tmp_path):
    path = write(tmp_path, GOOD + b"\n" + b"x" * 30_000_000 + b"\n" + GOOD + b"\n")
    tracemalloc.start()
    error = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "1 of 3 rows" in error.message
    assert peak < 5_000_000


def test_equal_records_have_equal_fingerprints_and_columns_count_only_when_asked(tmp_path):
    one, other, third = read_records(
        write(tmp_path, b'{"text":"t","id":1}\n{"id":2,"text":"t"}\n{"text":"u","id":1}\n')
    )
    assert one.fingerprint(columns=False) == other.fingerprint(columns=False)
    assert one.fingerprint(columns=True) != other.fingerprint(columns=True)
    assert one.fingerprint(columns=False) != third.fingerprint(columns=False)


def test_the_order_of_columns_does_not_change_a_fingerprint():
    one = Record("text", "", "", "t", "", (), {"text": "t", "a": 1})
    other = Record("text", "", "", "t", "", (), {"a": 1, "text": "t"})
    assert one.fingerprint(columns=True) == other.fingerprint(columns=True)
