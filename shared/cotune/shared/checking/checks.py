"""Checks by name, made in order. What is checked may be hostile: none ends in a traceback, none steers a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from cotune.shared.errors import CotuneError, one_line

MAX_DETAIL = 600
Subject = TypeVar("Subject")
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON."""
        return asdict(self)


class Failed(Exception):
    """A check that did not hold, in words."""


def require(condition: bool, message: str) -> None:
    """Go on if a condition holds.

    Raises:
        Failed: It does not.
    """
    if not condition:
        raise Failed(message)


def run_checks(table: Mapping[str, Callable[[Subject], str]], subject: Subject) -> list[Check]:
    """Make every check in order; one that cannot be made is a failed one.

    Edge cases: a control character in what is said, whoever put it there, is not handed on.
    """
    return [_made(name, check, subject) for name, check in table.items()]


def printable(text: str) -> str:
    """Words that may be a stranger's, on one line that steers no terminal."""
    return one_line(text, MAX_DETAIL) + (" ..." if len(text) > MAX_DETAIL else "")


def _made(name: str, check: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(name, True, printable(check(subject)))
    except Failed as error:
        return Check(name, False, printable(str(error)))
    except CotuneError as error:
        mend = f": {error.hint}" if error.code == "E-CLAIM-VERSION" else ""
        return Check(name, False, printable(error.message + mend))
    except UNREADABLE as error:
        return Check(name, False, f"cannot be checked ({type(error).__name__})")
