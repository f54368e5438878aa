"""The one message a courier is at work on, kept so that no crash loses it: Flower hands each message out once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cotune.shared.errors import StorageError
from cotune.shared.files import storage_errors, sync_folder, write_atomic

_LENGTH = 8


@dataclass(frozen=True)
class Mailbox:
    """Two files at most: what came, without its content, and what is to be sent.

    Attributes:
        folder: The courier's, for one federation.
    """

    folder: Path

    @property
    def incoming(self) -> bytes | None:
        """What came and was not answered yet."""
        return _read(self.folder / "incoming.bin")

    @property
    def outgoing(self) -> list[bytes] | None:
        """The answer that is to be sent: what is said of it, then its parts."""
        content = _read(self.folder / "outgoing.bin")
        return None if content is None else _frames(content)

    def take_in(self, incoming: bytes) -> None:
        """Keep what came.

        Raises:
            StorageError: The disk is full or gone.
        """
        write_atomic(self.folder / "incoming.bin", incoming)

    def put_out(self, frames: Sequence[bytes]) -> None:
        """Keep the answer, whole or not at all: a second one made later would not be the same, and be refused.

        Raises:
            StorageError: The disk is full or gone.
        """
        lengths = [len(frame).to_bytes(_LENGTH, "big") for frame in frames]
        content = b"".join(part for pair in zip(lengths, frames, strict=True) for part in pair)
        write_atomic(self.folder / "outgoing.bin", content)

    def clear(self) -> None:
        """Forget both: it was sent, or nobody wants it any more."""
        with storage_errors(self.folder):
            for name in ("outgoing.bin", "incoming.bin"):  # an answer never outlives its question, which may expire
                (self.folder / name).unlink(missing_ok=True)
            sync_folder(self.folder)


def _read(path: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        try:
            return path.read_bytes()
        except PermissionError as error:
            raise StorageError("E-STORAGE", f"{path}: cannot be read ({error.strerror})") from None
    return None


def _frames(content: bytes) -> list[bytes]:
    frames: list[bytes] = []
    place = 0
    while place < len(content):
        end = place + _LENGTH + int.from_bytes(content[place : place + _LENGTH], "big")
        frames.append(content[place + _LENGTH : end])
        place = end
    return frames
