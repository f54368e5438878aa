"""The system calls a ledger makes, as one seam: a test's disk can lose power, tear a write or fail at each of them."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Disk(Protocol):
    """What a ledger asks of a disk. Every method may raise OSError; descriptors are those of `open`."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor; flags as for `os.open`, new files are for their owner alone. A folder opens for `sync`."""
        ...

    def close(self, file: int) -> None:
        """Let go of a descriptor and of its lock."""
        ...

    def lock(self, file: int) -> None:
        """Wait until no other process or descriptor holds this file."""
        ...

    def size(self, file: int) -> int:
        """Bytes in the file."""
        ...

    def read(self, file: int, start: int) -> bytes:
        """Everything from a place on."""
        ...

    def write(self, file: int, content: bytes, start: int) -> int:
        """Write at a place; gives how many bytes were taken, which may be too few."""
        ...

    def cut(self, file: int, size: int) -> None:
        """Shorten the file."""
        ...

    def sync(self, file: int) -> None:
        """Return once what was written to this file, or the names in this folder, survives a loss of power."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Put one file in another's place."""
        ...


@dataclass(frozen=True)
class LocalDisk:
    """The machine's own disk."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor, never through a link."""
        return os.open(path, flags | os.O_NOFOLLOW, 0o600)

    def close(self, file: int) -> None:
        """Close."""
        os.close(file)

    def lock(self, file: int) -> None:
        """Hold the file by flock, also against other threads of this process."""
        fcntl.flock(file, fcntl.LOCK_EX)

    def size(self, file: int) -> int:
        """By fstat."""
        return os.fstat(file).st_size

    def read(self, file: int, start: int) -> bytes:
        """Read to the end, in as many pieces as it takes."""
        pieces: list[bytes] = []
        while piece := os.pread(file, 1 << 24, start):
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)

    def write(self, file: int, content: bytes, start: int) -> int:
        """One pwrite."""
        return os.pwrite(file, content, start)

    def cut(self, file: int, size: int) -> None:
        """By ftruncate."""
        os.ftruncate(file, size)

    def sync(self, file: int) -> None:
        """By fsync."""
        os.fsync(file)

    def rename(self, source: Path, target: Path) -> None:
        """One rename."""
        source.rename(target)


LOCAL_DISK = LocalDisk()


def read_whole(disk: Disk, path: Path) -> bytes | None:
    """A file's content; None if there is no such file.

    Raises:
        OSError: It cannot be read.
    """
    try:
        file = disk.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return disk.read(file, 0)
    finally:
        disk.close(file)


def write_whole(disk: Disk, file: int, content: bytes, start: int) -> None:
    """Write all of it and make it durable, or raise.

    Raises:
        OSError: The disk took too little, or could not make it durable.
    """
    if disk.write(file, content, start) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    disk.sync(file)


def replace_whole(disk: Disk, path: Path, content: bytes) -> None:
    """Give a file new content, durably: a crash leaves the old one or the new one, never half of one.

    Raises:
        OSError: The disk is full, read-only or broken; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    file = disk.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        try:
            write_whole(disk, file, content, 0)
        finally:
            disk.close(file)
        disk.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(disk, path.parent)


def sync_folder(disk: Disk, folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: The disk could not.
    """
    file = disk.open(folder, os.O_RDONLY)
    try:
        disk.sync(file)
    finally:
        disk.close(file)
