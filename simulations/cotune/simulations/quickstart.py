"""Sample data for `cotune init`: made-up service messages, each with the department that answers it."""

from __future__ import annotations

import json
from itertools import product
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
)
ENDINGS = ("Thank you.", "Please call me back.", "Regards.", "I look forward to your answer.", "Best wishes.")
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


def write_samples(folder: Path) -> list[Path]:
    """Write train.jsonl and eval.jsonl: 672 and 168 rows {"text", "label"}, disjoint. Returns their paths."""
    rows = [
        {"text": f"{opening} {topic}. {ending}", "label": label}
        for (label, topics), opening, ending in product(TOPICS.items(), OPENINGS, ENDINGS)
        for topic in topics
    ]
    parts = {
        "train.jsonl": [row for number, row in enumerate(rows) if number % EVAL_EVERY],
        "eval.jsonl": rows[::EVAL_EVERY],
    }
    for name, part in parts.items():
        write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in part).encode())
    return [folder / name for name in parts]
