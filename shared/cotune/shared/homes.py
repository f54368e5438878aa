"""A home: a folder that holds secrets. It is made whole or not at all, and is nobody else's to enter."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from cotune.shared.errors import CotuneError, StorageError
from cotune.shared.files import storage_errors, sync_folder


def make_home(path: Path, furnish: Callable[[Path], None], taken: CotuneError) -> None:
    """Make a home beside its place and move it there when it is complete.

    Args:
        path: Where; nothing may be there yet.
        furnish: Fills the folder it is given, mode 0700.
        taken: What is raised if there is something at this path; that stays as it is.

    Raises:
        StorageError: The folder cannot be written.
    """
    refuse_taken(path, taken)
    with storage_errors(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        furnish(draft)
        refuse_taken(path, taken)
        with storage_errors(path):
            try:
                draft.rename(path)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    raise taken from None
                raise
            sync_folder(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_taken(path: Path, taken: CotuneError) -> None:
    """Refuse a place for a new home where there is anything."""
    if path.exists() or path.is_symlink():
        raise taken


def require_private(path: Path, code: str, what: str, make: str) -> None:
    """Refuse a home that is missing, another user's or open to others.

    Args:
        path: The folder.
        code: Of the error.
        what: What it is to be, in words.
        make: The command that makes one.

    Raises:
        StorageError: With that code.
    """
    try:
        info = path.lstat()
    except OSError as error:
        raise StorageError(code, f"{path}: expected {what} ({error.strerror})", hint=make) from None
    if not stat.S_ISDIR(info.st_mode):
        raise StorageError(code, f"{path}: expected a folder", hint=make)
    if info.st_uid != os.geteuid():
        raise StorageError(code, f"{path}: belongs to another user", hint="run cotune as its owner")
    if info.st_mode & 0o077:
        mode = stat.S_IMODE(info.st_mode)
        raise StorageError(code, f"{path}: its mode is {mode:o}, others may enter", hint=f"chmod 700 {path}")
