"""A site's exported ledger, and what another machine can check of it without trusting a figure in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from cotune.shared.chain import PublicKey, SignedHead, require_own, reserved, walk_chain
from cotune.shared.checking.checks import Check, require, run_checks
from cotune.shared.checking.ledgers import PRV_ERROR
from cotune.shared.errors import JobError
from cotune.shared.invitation import Sign, Signature
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.claim import DIGITS
from cotune.shared.privacy.crosscheck import epsilon_by_prv
from cotune.shared.privacy.event import Event
from cotune.shared.sections import Section, SiteName, Unit
from cotune.shared.signing import key_fingerprint, verify

MAX_BYTES = 256_000_000
Positive = Annotated[float, Field(gt=0)]
Cost = Annotated[float, Field(ge=0)] | None  # None: without bound


class Spending(Section):
    """What a site says one of its budgets has paid for.

    Attributes:
        dataset: The data set's id.
        unit: Whom the budget protects.
        delta: At which it is priced.
        epsilon_total: What may ever be spent.
        epsilon_per_run: What a run may spend.
        epsilon_spent: What was spent.
        runs: The same by run.
    """

    dataset: str = Field(max_length=40)
    unit: Unit
    delta: float = Field(gt=0, lt=1)
    epsilon_total: Positive
    epsilon_per_run: Positive
    epsilon_spent: Cost
    runs: dict[str, Cost]


class ExportedLedger(Section):
    """One self-contained file.

    Attributes:
        site: Whose ledger.
        public_key: The site's key.
        simulated: Whether it is a simulated site.
        cotune: The version that wrote it.
        head: The signed head of the last line.
        spending: What the site says of its budgets.
        ledger: The exact lines.
        signature: By `public_key`, namespace `cotune-ledger`.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    kind: Literal["cotune-ledger"] = "cotune-ledger"
    site: SiteName
    public_key: PublicKey
    simulated: bool
    cotune: str = Field(max_length=40)
    head: SignedHead
    spending: tuple[Spending, ...]
    ledger: str
    signature: Signature = ""

    def message(self) -> bytes:
        """What is signed: everything but the signature, as canonical JSON."""
        return self.model_copy(update={"signature": ""}).model_dump_json(by_alias=True).encode()

    def signed(self, sign: Sign) -> ExportedLedger:
        """The same file, signed."""
        return self.model_copy(update={"signature": sign("cotune-ledger", self.message())})

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def read_exported(path: Path) -> ExportedLedger:
    """Read an exported ledger, without having checked any of it.

    Raises:
        JobError: E-EXPORT: it cannot be read, or is none.
    """
    hint = "at the site: cotune site log export FILE"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise JobError("E-EXPORT", f"{path}: over {MAX_BYTES:,} bytes, no exported ledger", hint=hint)
        return ExportedLedger.model_validate_json(path.read_bytes())
    except OSError as error:
        raise JobError("E-EXPORT", f"{path}: cannot be read ({error.strerror})", hint=hint) from None
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"])[:60]
        raise JobError("E-EXPORT", f"{path}: no exported ledger (`{where}`: {fault['msg']})", hint=hint) from None


def verify_exported(exported: ExportedLedger) -> list[Check]:
    """Every check in order; a check that cannot be made is a failed one.

    Guarantee: if all pass, the lines are the ones whose head this key signed, and each epsilon the file states is
    that of the events in these lines, recomputed here by PLD and, independently, by Opacus' PRV.

    Edge cases: whether the key is the site's, only who knows its fingerprint can tell; a ledger that was cut off
    before it was signed anew by its own site is caught only by whoever holds a later head.
    """
    return run_checks(CHECKS, _Opened(exported))


class _Lines:
    """What one pass over the lines has found, each held against the one before; memory grows with charges alone."""

    def __init__(self, exported: ExportedLedger) -> None:
        self.count, self.first, self.at_head = 0, dict[str, Any](), ""
        self.charges: list[tuple[str, str, Event]] = []  # data set, run, what was released
        for entry in walk_chain(_lines_of(exported.ledger)):
            self.count = entry.seq
            self.first = self.first or entry.fields
            if entry.seq == exported.head.seq:
                self.at_head = entry.sha256
            if entry.action == "budget.reserve":
                self.charges += [(e.fields["dataset"], e.fields["run_id"], event) for e, event in reserved([entry])]


def _lines_of(ledger: str) -> Iterator[bytes]:
    start = 0
    while start < len(ledger):
        end = ledger.find("\n", start)
        require(end >= 0, "the ledger's last line has no end")
        yield ledger[start:end].encode()
        start = end + 1


class _Opened:
    """An exported ledger under examination; its lines are read once."""

    def __init__(self, exported: ExportedLedger) -> None:
        self.file = exported

    @cached_property
    def lines(self) -> _Lines:
        return _Lines(self.file)


def _signature(opened: _Opened) -> str:
    file = opened.file
    genuine = verify(file.public_key, "cotune-ledger", file.message(), file.signature)
    require(genuine, "a part of the file was changed after the site signed it")
    return f"the whole file is signed by {key_fingerprint(file.public_key)}"


def _chain(opened: _Opened) -> str:
    require(opened.lines.count > 0, "the ledger has no line")
    return f"{opened.lines.count:,} lines, each names the one before it"


def _head(opened: _Opened) -> str:
    head, lines = opened.file.head, opened.lines
    require_own(head, opened.file.site, opened.file.public_key)
    require(head.seq <= lines.count, f"the ledger ends at line {lines.count}, before line {head.seq}, which was signed")
    require(lines.at_head == head.sha256, f"ledger line {head.seq} is not the one {head.site} signed")
    require(head.seq == lines.count, f"line {head.seq + 1} and later are not under the signed head")
    return f"line {head.seq} is the one {head.site} signed"


def _key(opened: _Opened) -> str:
    first, file = opened.lines.first, opened.file
    said = (first["site"], first["public_key"], first["simulated"])
    require(said == (file.site, file.public_key, file.simulated), "the ledger began with another key")
    return f"the key the ledger began with, {key_fingerprint(file.public_key)}"


def _charges(opened: _Opened) -> str:
    spending = opened.file.spending
    named = {each.dataset for each in spending}
    require(len(named) == len(spending), "a data set is named twice")
    charges = opened.lines.charges
    unnamed = Counter(dataset for dataset, _, _ in charges if dataset not in named)
    gone = "; ".join(f"{name!a}, which the policy no longer names: {count}" for name, count in unnamed.items())
    return f"{len(charges)} rounds charged to {len(named)} data sets" + (f"; {gone}" if gone else "")


def _epsilon(opened: _Opened) -> str:
    for what, said, events, delta in _stated(opened):
        found = epsilon(events, delta)
        same = math.isclose(found, said, rel_tol=DIGITS, abs_tol=DIGITS)
        require(same, f"{what}: {found:.4f} by dp-accounting PLD, the file says {said:.4f}")
    figures = "; ".join(f"{each.dataset} {_cost(each.epsilon_spent):.4f}" for each in opened.file.spending)
    return f"{figures} recomputed by dp-accounting PLD"


def _second(opened: _Opened) -> str:
    for what, said, events, delta in _stated(opened):
        found = epsilon_by_prv(events, delta)
        require(found <= said + PRV_ERROR, f"{what}: {found:.4f} by Opacus PRV, the file says {said:.4f}")
    return f"Opacus PRV gives no more than stated, but for {PRV_ERROR}"


def _stated(opened: _Opened) -> Iterator[tuple[str, float, list[Event], float]]:
    """Every epsilon the file states: of what, the figure, the events it is to be of, and its delta."""
    for stated in opened.file.spending:
        runs: dict[str, list[Event]] = {}
        for dataset, run, event in opened.lines.charges:
            if dataset == stated.dataset:
                runs.setdefault(run, []).append(event)
        require(runs.keys() == stated.runs.keys(), f"{stated.dataset}: the ledger has other runs than the file states")
        yield stated.dataset, _cost(stated.epsilon_spent), [e for events in runs.values() for e in events], stated.delta
        for run, events in runs.items():
            yield f"{stated.dataset} run {run}", _cost(stated.runs[run]), events, stated.delta


def _cost(stated: float | None) -> float:
    return math.inf if stated is None else stated


def _budgets(opened: _Opened) -> str:
    file = opened.file
    over = [each.dataset for each in file.spending if _cost(each.epsilon_spent) > each.epsilon_total]
    require(file.simulated or not over, f"spent beyond its budget: {', '.join(over)}")
    return "nothing was spent beyond a budget"


CHECKS: dict[str, Callable[[_Opened], str]] = {
    "signature": _signature,
    "chain": _chain,
    "head": _head,
    "key": _key,
    "charges": _charges,
    "epsilon": _epsilon,
    "second accountant": _second,
    "budgets": _budgets,
}


def said_of(exported: ExportedLedger) -> dict[str, Any]:
    """What is said of the file in an answer: whose it is, and how much it spent by its own words."""
    return {
        "site": exported.site,
        "simulated": exported.simulated,
        "key": key_fingerprint(exported.public_key),
        "head": exported.head.model_dump(mode="json"),
        "spending": [each.model_dump(mode="json") for each in exported.spending],
    }
