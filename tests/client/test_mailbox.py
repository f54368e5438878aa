"""The one message a courier is at work on: kept whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.client.mailbox import Mailbox
from cotune.shared.errors import StorageError


def test_an_empty_mailbox_has_nothing(tmp_path: Path) -> None:
    box = Mailbox(tmp_path)
    assert box.incoming is None
    assert box.outgoing is None
    box.clear()


@given(frames=st.lists(st.binary(max_size=50), max_size=6), came=st.binary(max_size=50))
def test_what_was_kept_reads_back(tmp_path_factory: pytest.TempPathFactory, frames: list[bytes], came: bytes) -> None:
    folder = tmp_path_factory.mktemp("box")
    Mailbox(folder).take_in(came)
    Mailbox(folder).put_out(frames)
    box = Mailbox(folder)
    assert box.incoming == came
    assert box.outgoing == frames
    box.clear()
    assert (box.incoming, box.outgoing, list(folder.iterdir())) == (None, None, [])


def test_an_answer_that_finds_no_room_is_an_error_and_the_question_stays(
    tmp_path: Path, mount_disk: Callable[[int], Path]
) -> None:
    disk = mount_disk(64)
    box = Mailbox(disk)
    box.take_in(b"question")
    with pytest.raises(StorageError):
        box.put_out([bytes(200_000)])
    assert box.incoming == b"question"
    assert box.outgoing is None
    box.put_out([bytes(1000)])
    assert box.outgoing == [bytes(1000)]
