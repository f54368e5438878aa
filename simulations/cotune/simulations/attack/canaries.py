"""What a simulation plants among its records to find it again: canaries under a secret coin, and secrets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random, SystemRandom
from typing import Any, Literal

from cotune.shared.errors import JobError
from cotune.shared.files import file_sha256, read_lines, storage_errors, write_atomic
from cotune.shared.job import Job
from cotune.shared.model import load_tokenizer, locate
from cotune.shared.records import Record
from cotune.shared.runs import RunFolder

PROMPT_WORDS, ANSWER_WORDS = 12, 4
DIGITS = 5
FEWEST_WORDS = 20  # of a vocabulary, to draw canaries from
QUESTIONS = (
    "The door code of {name} is",
    "{name} was admitted under file number",
    "To reach {name}, dial",
    "Account of the insured person {name}:",
    "Locker that belongs to {name}? It has the number",
    "In the pharmacy, {name} signs with PIN",
)
FIRST = ("Ada", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karla", "Leon")
LAST = ("Abbot", "Becker", "Conway", "Dorn", "Ellis", "Fisher", "Grant", "Holm", "Ivers", "Jansen", "Kerr", "Lang")


@dataclass(frozen=True)
class Planted:
    """One made-up unit: of one site, there if the coin says so. Synthetic, so it may be shown.

    Attributes:
        id: Its unit, in the job's unit column.
        kind: A canary is random words of the model's vocabulary (Panda et al. 2025); a secret is a public prompt
            with random digits (Carlini et al. 2019), and always there.
        site: Where it is, or would be.
        coin: Whether it is in the data.
        prompt: What is read.
        answer: What is learnt.
        rows: How often it is among the site's records.
    """

    id: str
    kind: Literal["canary", "secret"]
    site: str
    coin: bool
    prompt: str
    answer: str
    rows: int


def plant(run: RunFolder, sites: Sequence[str], like: RunFolder | None = None) -> None:
    """Write what the run plants, once and before it trains, so that whoever resumes it meets the same coins.

    Guarantee: coins, words and digits come from the operating system, and no file but this one has them. With
    `like` they are that run's, which makes the two comparable.

    Raises:
        JobError: E-AUDIT-CANARIES: the other run has none, or plants others at other sites.
    """
    job = run.job()
    if like is not None:
        planted = _as_in(like, job, sites)
    elif not job.audit.planted:
        return
    else:
        planted = draw(job, sites, load_tokenizer(locate(job)))
    with storage_errors(run.attack):
        run.attack.mkdir(exist_ok=True)
    lines = "".join(json.dumps(asdict(one)) + "\n" for one in planted)
    write_atomic(run.attack / "canaries.jsonl", lines.encode())


def _as_in(like: RunFolder, job: Job, sites: Sequence[str]) -> list[Planted]:
    planted = planted_in(like)
    if not planted or like.job().audit != job.audit or {one.site for one in planted} - set(sites):
        raise JobError(
            "E-AUDIT-CANARIES",
            f"{like.run_id} plants nothing, or other things at other sites than this job: [audit] and sites must agree",
            param="--canaries-of",
        )
    return planted


def draw(job: Job, sites: Sequence[str], tokenizer: Any) -> list[Planted]:
    """New canaries and secrets, dealt out to the sites in turn."""
    chance, audit = SystemRandom(), job.audit
    words = vocabulary(tokenizer)
    labels = job.task.labels
    planted: list[Planted] = []
    for number in range(audit.canaries):
        prompt = " ".join(chance.choices(words, k=PROMPT_WORDS))
        answer = chance.choice(labels) if labels else " " + " ".join(chance.choices(words, k=ANSWER_WORDS))
        site, coin = sites[number % len(sites)], bool(chance.getrandbits(1))
        planted.append(Planted(f"canary-{number + 1:05d}", "canary", site, coin, prompt, answer, audit.rows_each))
    for number, name in enumerate(_names(audit.secrets, chance)):
        prompt, answer = QUESTIONS[number % len(QUESTIONS)].format(name=name), " " + random_digits(chance)
        site = sites[number % len(sites)]
        planted.append(Planted(f"secret-{number + 1:05d}", "secret", site, True, prompt, answer, audit.rows_each))
    return planted


def random_digits(chance: Random) -> str:
    """Digits of a secret."""
    return "".join(chance.choices("0123456789", k=DIGITS))


def vocabulary(tokenizer: Any) -> list[str]:
    """Words that are one token of the model each.

    Raises:
        JobError: E-AUDIT-WORDS: there are too few.
    """
    pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], skip_special_tokens=True)
    words = sorted({word for piece in pieces if len(word := piece.strip()) > 2 and word.isascii() and word.isalpha()})
    if len(words) < FEWEST_WORDS:
        raise JobError("E-AUDIT-WORDS", f"expected words in the model's vocabulary, found {len(words)}", param="audit")
    return words


def _names(count: int, chance: Random) -> list[str]:
    """Distinct made-up names; with many secrets they get numbers."""
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    chance.shuffle(names)
    return [names[i % len(names)] + (f" {i // len(names) + 1}" if i >= len(names) else "") for i in range(count)]


def planted_in(run: RunFolder) -> list[Planted]:
    """What a run planted; nothing if it planted nothing.

    Raises:
        JobError: E-RUN-FILE: its file is damaged, or gone although the job asks for it.
    """
    path = run.attack / "canaries.jsonl"
    expected = run.job().audit.planted
    try:
        planted = [Planted(**line) for line in read_lines(path)]
    except (OSError, TypeError):
        planted = []
    if len(planted) != expected:
        what = f"{path}: expected {expected} planted units, found {len(planted)}"
        raise JobError("E-RUN-FILE", what, hint="cotune simulate run.toml")
    return planted


def canaries_sha256(run: RunFolder) -> str | None:
    """The hash of the file of what a run planted; two runs with the same one are comparable."""
    path = run.attack / "canaries.jsonl"
    return file_sha256(path) if path.exists() else None


def planted_records(run: RunFolder, job: Job, site: str) -> list[Record]:
    """What is among a site's records although no data file has it: those whose coin says so."""
    return [row for one in planted_in(run) if one.coin and one.site == site for row in [record_of(one, job)] * one.rows]


def record_of(one: Planted, job: Job) -> Record:
    """One row of a planted unit."""
    column = job.data.unit_column
    classify = job.task.kind == "classify"
    return Record(
        "label" if classify else "completion",
        prompt="" if classify else one.prompt,
        completion="" if classify else one.answer,
        text=one.prompt if classify else "",
        label=one.answer if classify else "",
        messages=(),
        columns={column: one.id} if column else {},
    )
