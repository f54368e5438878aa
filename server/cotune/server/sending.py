"""What goes out in a round: the global adapter at a rank, encoded once for all sites of that rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cotune.shared.adapter import Layout, Vector, flat_sha256, nested
from cotune.shared.aggregation import OFFSET_A, returned, sent
from cotune.shared.codec import Payload, decode, encode
from cotune.shared.job import Job
from cotune.shared.schedule import public_seed


@dataclass(frozen=True)
class Sending:
    """The global adapter as sites of one rank are sent it.

    Attributes:
        payload: Encoded, as it travels.
        arrays: Decoded, by name: what these sites start from.
        sha256: Of the decoded flat array.
        offset_rank: Of the frozen addition that is in it.
        up: What their updates hold.
    """

    payload: Payload
    arrays: Mapping[str, Vector]
    sha256: str
    offset_rank: int
    up: Layout


def sending(job: Job, layout: Layout, state: Mapping[str, Vector], rank: int, round_number: int) -> Sending:
    """What sites of a rank are sent in a round.

    A smaller rank gets the first rows of A and columns of B: the strongest ones, where the rule sorts them.

    Args:
        job: Its rule and codec.
        layout: Of the adapter at full rank.
        state: The whole adapter, with an offset and control variates if there are any.
        rank: Of these sites.
        round_number: From 1.
    """
    offset_rank = offset_rank_of(state)
    down = sent(job.rule, layout.at_rank(rank), offset_rank, job.train.scaffold)
    flat = down.flatten(nested(state, rank))
    payload = encode(flat, job.transport.codec_down, public_seed(job, "down", rank, round_number))
    decoded = decode(payload, job.transport.codec_down, down.size)
    arrays = {**nested(state, rank), **down.unflatten(decoded)}
    up = returned(job.rule, layout.at_rank(rank), round_number, job.run.rounds)
    return Sending(payload, arrays, flat_sha256(decoded), offset_rank, up)


def offset_rank_of(state: Mapping[str, Vector]) -> int:
    """Rank of the frozen addition to the base weights; 0 without one."""
    return next((array.shape[0] for name, array in state.items() if OFFSET_A in name), 0)
