"""A site's exported ledger, and what another machine can check of it without trusting a figure in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from cotune.shared.chain import (
    Entry,
    PublicKey,
    SignedHead,
    read_chain,
    require_agreement,
    require_own,
    reserved,
)
from cotune.shared.errors import CotuneError, JobError, RunFailed
from cotune.shared.invitation import Sign, Signature
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.crosscheck import epsilon_by_prv
from cotune.shared.privacy.event import Event
from cotune.shared.sections import Section, SiteName, Unit
from cotune.shared.signing import key_fingerprint, verify
from cotune.shared.verification import EPSILON_TOLERANCE, PRV_ERROR, Check

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
    checks: dict[str, Callable[[ExportedLedger], str]] = {
        "signature": _signature,
        "chain": _chain,
        "head": _head,
        "key": _key,
        "charges": _charges,
        "epsilon": _epsilon,
        "second accountant": _second,
        "budgets": _budgets,
    }
    return [_make(name, check, exported) for name, check in checks.items()]


def _make(name: str, check: Callable[[ExportedLedger], str], exported: ExportedLedger) -> Check:
    try:
        return Check(name, True, check(exported))
    except CotuneError as error:
        return Check(name, False, error.message)
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        return Check(name, False, f"cannot be checked ({type(error).__name__})")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RunFailed("E-VERIFY", message)


def _signature(exported: ExportedLedger) -> str:
    genuine = verify(exported.public_key, "cotune-ledger", exported.message(), exported.signature)
    _require(genuine, "a part of the file was changed after the site signed it")
    return f"the whole file is signed by {key_fingerprint(exported.public_key)}"


def _chain(exported: ExportedLedger) -> str:
    entries = _entries(exported)
    _require(bool(entries), "the ledger has no line")
    return f"{len(entries)} lines, each names the one before it"


def _head(exported: ExportedLedger) -> str:
    entries = _entries(exported)
    require_own(exported.head, exported.site, exported.public_key)
    require_agreement(exported.head, entries)
    _require(exported.head.seq == len(entries), f"line {exported.head.seq + 1} and later are not under the signed head")
    return f"line {exported.head.seq} is the one {exported.site} signed"


def _key(exported: ExportedLedger) -> str:
    first = _entries(exported)[0].fields
    said = (first["site"], first["public_key"], first["simulated"])
    _require(said == (exported.site, exported.public_key, exported.simulated), "the ledger began with another key")
    return f"the key the ledger began with, {key_fingerprint(exported.public_key)}"


def _charges(exported: ExportedLedger) -> str:
    named = {each.dataset for each in exported.spending}
    _require(len(named) == len(exported.spending), "a data set is named twice")
    unnamed: dict[str, int] = {}
    entries = reserved(_entries(exported))
    for entry, _ in entries:
        if entry.fields["dataset"] not in named:
            unnamed[entry.fields["dataset"]] = unnamed.get(entry.fields["dataset"], 0) + 1
    gone = "; ".join(f"{name!a}, which the policy no longer names: {count}" for name, count in unnamed.items())
    return f"{len(entries)} rounds charged to {len(named)} data sets" + (f"; {gone}" if gone else "")


def _epsilon(exported: ExportedLedger) -> str:
    for what, said, events, delta in _stated(exported):
        found = epsilon(events, delta)
        same = math.isclose(found, said, rel_tol=EPSILON_TOLERANCE, abs_tol=EPSILON_TOLERANCE)
        _require(same, f"{what}: {found:.4f} by dp-accounting PLD, the file says {said:.4f}")
    return _figures(exported, "recomputed by dp-accounting PLD")


def _second(exported: ExportedLedger) -> str:
    for what, said, events, delta in _stated(exported):
        found = epsilon_by_prv(events, delta)
        _require(found <= said + PRV_ERROR, f"{what}: {found:.4f} by Opacus PRV, the file says {said:.4f}")
    return f"Opacus PRV gives no more than stated, but for {PRV_ERROR}"


def _stated(exported: ExportedLedger) -> Iterator[tuple[str, float, list[Event], float]]:
    """Every epsilon the file states: of what, the figure, the events it is to be of, and its delta."""
    for stated in exported.spending:
        runs: dict[str, list[Event]] = {}
        for entry, event in reserved(_entries(exported), dataset=stated.dataset):
            runs.setdefault(entry.fields["run_id"], []).append(event)
        _require(runs.keys() == stated.runs.keys(), f"{stated.dataset}: the ledger has other runs than the file states")
        yield stated.dataset, _cost(stated.epsilon_spent), [e for events in runs.values() for e in events], stated.delta
        for run, events in runs.items():
            yield f"{stated.dataset} run {run}", _cost(stated.runs[run]), events, stated.delta


def _cost(stated: float | None) -> float:
    return math.inf if stated is None else stated


def _figures(exported: ExportedLedger, how: str) -> str:
    return "; ".join(f"{each.dataset} {_cost(each.epsilon_spent):.4f}" for each in exported.spending) + f" {how}"


def _budgets(exported: ExportedLedger) -> str:
    over = [
        each.dataset
        for each in exported.spending
        if not exported.simulated and _cost(each.epsilon_spent) > each.epsilon_total
    ]
    _require(not over, f"spent beyond its budget: {', '.join(over)}")
    return "nothing was spent beyond a budget"


def _entries(exported: ExportedLedger) -> list[Entry]:
    return read_chain(exported.ledger.encode())


def said_of(exported: ExportedLedger) -> dict[str, Any]:
    """What is said of the file in an answer: whose it is, and how much it spent by its own words."""
    return {
        "site": exported.site,
        "simulated": exported.simulated,
        "key": key_fingerprint(exported.public_key),
        "head": exported.head.model_dump(mode="json"),
        "spending": [each.model_dump(mode="json") for each in exported.spending],
    }
