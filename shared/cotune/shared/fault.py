"""What is wrong with an installation, said with the edit that mends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from cotune.shared.errors import CotuneError

PROGRAM = "cotune"
FLOWER = "flwr"


@dataclass(frozen=True)
class Fault:
    """One thing that is open, or about to break.

    Attributes:
        code: Stable name.
        what: What was found.
        mend: What to do about it.
    """

    code: str
    what: str
    mend: str


def fault_of(check: Callable[[], object]) -> list[Fault]:
    """The fault a check ends with; none if it ends well."""
    try:
        check()
    except CotuneError as error:
        return [Fault(error.code, error.message, error.hint or "restore it from a backup")]
    return []


def flower_faults() -> list[Fault]:
    """Whether the Flower that is installed is one whose protocol and switches this version was made for."""
    from packaging.requirements import Requirement

    wanted = next(need for each in requires(PROGRAM) or () if (need := Requirement(each)).name == FLOWER)
    try:
        found = version(FLOWER)
    except PackageNotFoundError:
        found = "none"
    if found != "none" and found in wanted.specifier:
        return []
    what = f"{FLOWER} {wanted.specifier} is supported, {found} is installed"
    return [Fault("E-FLWR-VERSION", what, f'pip install "{FLOWER}{wanted.specifier}"')]
