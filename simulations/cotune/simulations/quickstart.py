"""Sample data for `cotune init`: made-up messages of patients, each with the department that answers it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path

from cotune.shared.files import write_atomic

OPENINGS = (
    "Hello,",
    "Good morning,",
    "Please help:",
    "To whom it may concern,",
    "Hi there,",
    "Urgent:",
    "Question:",
    "Dear team,",
    "Good afternoon,",
    "Sorry to bother you again,",
    "As I said on the phone,",
    "For my mother:",
)
ENDINGS = (
    "Thank you.",
    "Please call me back.",
    "Regards.",
    "I look forward to your answer.",
    "Best wishes.",
    "It is the second time I ask.",
    "I am at home all day.",
    "An answer by mail is fine.",
    "Many thanks in advance.",
    "Kind regards.",
)
TOPICS = {
    "billing": (
        "I was charged twice for the same visit",
        "the invoice of last month shows the wrong amount",
        "my insurance says the bill was never sent",
        "I would like to pay in instalments",
        "the receipt for my payment is missing",
        "there is a fee on my statement I do not understand",
    ),
    "appointments": (
        "I need to move my visit to next week",
        "is there a free slot on Thursday afternoon",
        "I have to cancel my booking for tomorrow",
        "how early should I arrive for my check-up",
        "nobody confirmed the date of my examination",
        "can my daughter be seen on the same day as I am",
    ),
    "records": (
        "I would like a copy of my test results",
        "my old address is still in your files",
        "please send my letter of discharge to my doctor",
        "the report of my scan has a wrong birth date",
        "who may look into my file",
        "I want my documents deleted when I move away",
    ),
    "technical": (
        "the website does not accept my password",
        "the app closes when I open the calendar",
        "I get an error when I upload a photo",
        "the link in your message leads nowhere",
        "my account is locked after three attempts",
        "the video call had no sound",
    ),
}
EVAL_EVERY = 5
ROWS_OF_A_PATIENT = (1, 8, 2, 7, 3, 6, 4, 5)


def write_samples(folder: Path) -> list[Path]:
    """Write train.jsonl and eval.jsonl, disjoint, and return their paths.

    2,304 rows {"text", "label", "patient"} of 512 patients with 1 to 8 rows each, and 576 rows without patient.
    """
    rows = [
        {"text": f"{opening} {topic}. {ending}", "label": label}
        for (label, topics), opening, ending in product(TOPICS.items(), OPENINGS, ENDINGS)
        for topic in topics
    ]
    train = sorted((row for number, row in enumerate(rows) if number % EVAL_EVERY), key=_order)
    parts = {
        "train.jsonl": [{**row, "patient": patient} for row, patient in zip(train, _patients(), strict=False)],
        "eval.jsonl": rows[::EVAL_EVERY],
    }
    for name, part in parts.items():
        write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in part).encode())
    return [folder / name for name in parts]


def _order(row: dict[str, str]) -> str:
    """An order that is always the same and mixes the departments."""
    return hashlib.sha256(row["text"].encode()).hexdigest()


def _patients() -> Iterator[str]:
    """Whose each row is: patients one after the other, with 1 to 8 rows."""
    for number, rows in enumerate(cycle(ROWS_OF_A_PATIENT), 1):
        yield from [f"p{number:04d}"] * rows
