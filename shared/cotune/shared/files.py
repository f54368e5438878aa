"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from cotune.shared.errors import StorageError


@contextlib.contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turn a failed write (disk full, read-only, no permission) into a named error."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            "E-STORAGE",
            f"{path}: could not be written ({error.strerror or error})",
            hint="free space or choose another folder with --out, then run the command again",
        ) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole: temporary file, fsync, rename, fsync of the folder.

    Raises:
        StorageError: The disk is full, read-only or gone; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, indented, in the order given."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line in a single write, so that lines of several processes never mix.

    A line that an earlier crash tore is ended first, so that it spoils none but itself.
    """
    line = (json.dumps(value, allow_nan=False) + "\n").encode()
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            wanted = b"\n" + line if torn else line
            if os.write(descriptor, wanted) < len(wanted):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines of a file; lines torn by a crash are left out."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
