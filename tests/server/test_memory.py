"""What a round takes in memory, from the first answer to the joined adapter, over updates of 1 MiB."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.stats  # noqa: F401 - admission loads it in the first round, and it is large
from tests.server.answers import plan_of, update_of
from tests.server.rounds import job_of

from cotune.server.collecting import Collector
from cotune.server.fleet import Request
from cotune.server.joining import Joiner
from cotune.server.sending import sending
from cotune.server.spool import Spool
from cotune.server.witness import Witness
from cotune.shared.adapter import Layout
from cotune.shared.aggregation import A, B, factor_of
from cotune.shared.codec import CodecName
from cotune.shared.job import Job
from cotune.shared.methods import initial_values
from cotune.shared.plan import LedgerRequest
from cotune.shared.runs import RunFolder
from cotune.shared.update import Answer
from cotune.shared.wire import answer_from_records, answer_to_records

RANK, WIDTH, MODULES = 4, 512, 64


class Sites:
    """Any number of sites: each answer is made when it is its turn, and comes as Flower's records."""

    def __init__(self, names: Sequence[str], size: int) -> None:
        self.names, self.size = names, size

    def sites(self) -> Sequence[str]:
        return self.names

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        for plan, _ in requests:
            seed = [plan.round, *plan.site.encode()]
            delta = np.random.default_rng(seed).standard_normal(self.size, dtype=np.float32)
            records = answer_to_records(update_of(plan, delta))
            yield answer_from_records(records, plan.site)

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        return iter(())


def layout_of(job: Job) -> Layout:
    """The adapter; with only B trained, of twice as many modules, so that updates are equally long."""
    factors = job.rule.trains
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(2 * MODULES // len(factors)):
        shapes |= {f"m{number:03}{A}weight": (RANK, WIDTH), f"m{number:03}{B}weight": (WIDTH, RANK)}
    return Layout(shapes, tuple(name for name in shapes if factor_of(name) in factors))


def peak_of_round(folder: Path, rule: str, codec: CodecName, count: int) -> int:
    """The most a round holds at once, in bytes, on top of the adapter it starts from."""
    job = job_of(
        lora={"r": RANK},
        privacy={"level": "none"},
        federation={"sites": count},
        aggregation={"rule": rule},
        transport={"codec_up": codec},
    )
    layout, names = layout_of(job), [f"site-{number:02}" for number in range(count)]
    state = initial_values(layout, 0)
    sent = sending(job, layout, state, RANK, 1)
    assert sent.up.size == 2**18
    requests = {site: Request(plan_of(job, site, base_sha256=sent.sha256), sent.payload) for site in names}
    tracemalloc.start()
    try:
        with Spool(folder / ".spool", {RANK: sent.up}, {RANK: sent.arrays}, {}) as spool:
            sizes = dict.fromkeys(names, sent.up.size)
            collector = Collector(RunFolder(folder), requests, sizes, Witness(folder / "heads.json"), spool)
            found = collector.collect(Sites(names, sent.up.size), count)
            assert sorted(found.received) == names
            Joiner(job, layout).join(state, {}, spool, 1)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("rule", "codec"), [("ffa", "fp32"), ("product_svd", "int8")])
def test_a_round_of_32_sites_needs_no_more_memory_than_one_of_4(tmp_path: Path, rule: str, codec: CodecName) -> None:
    few, many = (peak_of_round(tmp_path, rule, codec, count) for count in (4, 32))
    assert many <= 1.3 * few
