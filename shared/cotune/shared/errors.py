"""Every error a user can meet: what was expected, what came, where, and the command that mends it.

    CotuneError            exit code
    ├── JobError           4   the job file, a flag, an argument
    ├── DataError          4   records (row numbers only, never a text)
    ├── ModelError         4   a base model, tokenizer or adapter
    ├── PrivacyError       4   a budget nothing can be trained under, a parameter that voids the guarantee
    ├── RefusedError       6   a site's own policy or budget said no
    ├── ConnectionFailed   2   a process or address could not be reached, or authenticated
    ├── TimedOut           3   nothing came in time
    ├── RunFailed          1   the run ended without a result that may be published
    └── StorageError       1   disk full, read-only, damaged file

Exit code 5 is a defect of cotune itself, 130 an interruption by the user, 0 success.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


class CotuneError(Exception):
    """An error with a stable code, a place and a way out.

    Args:
        code: Stable name such as ``E-DATA-ROW``; documented, never reused.
        message: What was expected and what came. Never a training text, a record id or a private count.
        param: The setting or argument at fault, if there is one.
        hint: The command or edit that mends it.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.hint = hint

    def to_dict(self) -> dict[str, str | None]:
        """The error as the ``error`` part of a JSON envelope."""
        return {"code": self.code, "message": self.message, "param": self.param, "hint": self.hint}


class JobError(CotuneError):
    """The job file, a flag or an argument is not valid."""

    exit_code = 4


class DataError(CotuneError):
    """Records cannot be read or used. Carries row numbers, never texts."""

    exit_code = 4


class ModelError(CotuneError):
    """A base model, tokenizer or adapter cannot be found, trusted or used."""

    exit_code = 4


class PrivacyError(CotuneError):
    """The privacy parameters are impossible or void the guarantee."""

    exit_code = 4


class RefusedError(CotuneError):
    """A site's own rule or budget refused the work; the rule is named."""

    exit_code = 6


class ConnectionFailed(CotuneError):
    """A process or address could not be reached or did not authenticate."""

    exit_code = 2


class TimedOut(CotuneError):
    """Nothing came within the agreed time."""

    exit_code = 3


class RunFailed(CotuneError):
    """The run ended without a result that may be published."""

    exit_code = 1


class StorageError(CotuneError):
    """A file could not be written or does not verify."""

    exit_code = 1


def ended(code: str, message: str, exit_code: int, hint: str | None = None) -> CotuneError:
    """An error that was met in another process, with the exit code it had there."""
    error = CotuneError(code, message, hint=hint)
    error.exit_code = exit_code
    return error


def place_of(error: BaseException) -> str:
    """Where in our code an error that nobody foresaw came up; never its text, which may quote a record."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "cotune" in frame.filename]
    if ours:
        return f"{ours[-1].filename.rpartition('cotune/')[2]}:{ours[-1].lineno} in {ours[-1].name}"
    return f"{frames[-1].name}:{frames[-1].lineno}" if frames else "unknown place"


INTERNAL_EXIT_CODE = 5
INTERRUPTED_EXIT_CODE = 130


def one_line(text: str, most: int) -> str:
    """So many letters of words that may be a stranger's, on one line that steers no terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:most])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean `x`?`` for the nearest known word, or the empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""
