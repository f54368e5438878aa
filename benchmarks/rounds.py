"""Rounds of any number of sites without training: numbers on disk, answers read and signed one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cotune.server.fleet import Request
from cotune.shared.adapter import Layout
from cotune.shared.aggregation import RULES, A, B, RuleName, factor_of
from cotune.shared.chain import SignedHead, head_message
from cotune.shared.codec import CodecName, encode
from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job
from cotune.shared.plan import ClaimRequest, LedgerRequest, RoundPlan, cotune_version
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.signing import public_key_line, sign
from cotune.shared.update import AdapterUpdate, Answer, SiteFailure, UpdateHeader, payload_sha256
from cotune.shared.wire import answer_from_records, answer_to_records


@dataclass(frozen=True)
class Variant:
    """One way to join a round.

    Attributes:
        rule: The job's; None for Flower's FedAvg.
        robust: The job's robust rule.
        codec: In which updates travel.
        wire: Answers come as Flower's records.
    """

    rule: RuleName | None
    robust: str = "none"
    codec: CodecName = "fp32"
    wire: bool = False


@dataclass(frozen=True)
class Case:
    """A round.

    Attributes:
        variant: How it is joined.
        sites: How many answer.
        modules: Adapted modules, each of `width` x `width`.
        width: Of a module.
        numbers: In each update.
    """

    variant: Variant
    sites: int
    modules: int = 64
    width: int = 4096
    numbers: int = 2**23  # 32 MiB in fp32

    @property
    def factors(self) -> tuple[str, ...]:
        """What is trained."""
        return RULES[self.variant.rule or "fedavg_ab"].trains

    @property
    def rank(self) -> int:
        """At which an update holds `numbers`."""
        return self.numbers // (len(self.factors) * self.modules * self.width)

    @property
    def layout(self) -> Layout:
        """The adapter."""
        shapes: dict[str, tuple[int, ...]] = {}
        for n in range(self.modules):
            shapes |= {
                f"layers.{n:02}{A}weight": (self.rank, self.width),
                f"layers.{n:02}{B}weight": (self.width, self.rank),
            }
        return Layout(shapes, tuple(name for name in shapes if factor_of(name) in self.factors))


def job_of(case: Case) -> Job:
    """A job without noise: any numbers may then be an update."""
    settings = {
        "model": {"base": "not-read"},
        "lora": {"r": case.rank},
        "data": {"train": "not-read.jsonl", "records_per_site": 1000},
        "privacy": {"level": "none"},
        "federation": {"sites": case.sites, "min_sites": case.sites},
        "aggregation": {"rule": case.variant.rule, "robust": case.variant.robust},
        "transport": {"codec_up": case.variant.codec},
    }
    return parse_job(settings, origin="benchmark")


def plan_of(job: Job, run_id: str, site: str, base_sha256: str) -> RoundPlan:
    """What a site is asked."""
    return RoundPlan(
        run_id=run_id,
        cotune=cotune_version(),
        job=job,
        site=site,
        round=1,
        base_sha256=base_sha256,
        rank=job.lora.r,
        frozen_sha256="0" * 64,  # read by sites alone
        clipping_norm=job.privacy.clipping_norm,
    )


def write_numbers(case: Case, folder: Path) -> None:
    """Each site's update, unlike every other's, in the variant's codec."""
    place = stored(case, folder)
    place.mkdir(exist_ok=True)
    for number in range(case.sites):
        path = place / f"site-{number:03}"
        if not path.exists():
            drawn = np.random.default_rng(number).standard_normal(case.numbers, dtype=np.float32)
            encode(drawn * np.float32(1e-3), case.variant.codec, number).tofile(path)


def stored(case: Case, folder: Path) -> Path:
    """Where they are."""
    return folder / f"{case.variant.codec}-{case.sites}-{case.numbers}"


class Stored:
    """Sites whose numbers lie on disk: each answer is read and signed when it is its turn.

    Args:
        folder: A file a site.
        wire: Answers come as Flower's records.
    """

    def __init__(self, folder: Path, wire: bool) -> None:
        self._folder, self._wire = folder, wire
        self._keys = {site: Ed25519PrivateKey.generate() for site in self.sites()}

    def sites(self) -> Sequence[str]:
        """Names, in order."""
        return sorted(path.name for path in self._folder.iterdir())

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """One answer at a time."""
        for plan, _ in requests:
            if self._wire:
                records = answer_to_records(self._answer(plan))
                yield answer_from_records(records, plan.site)
            else:
                yield self._answer(plan)

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """None: a round asks for none."""
        return iter(())

    def countersign(self, requests: Sequence[ClaimRequest]) -> Iterator[tuple[str, str | SiteFailure]]:
        """None: nothing is published."""
        return iter(())

    def _answer(self, plan: RoundPlan) -> AdapterUpdate:
        key, payload = self._keys[plan.site], np.fromfile(self._folder / plan.site, dtype=np.uint8)
        sha256 = payload_sha256(payload)  # any will do for the ledger's last line too
        head = SignedHead(
            site=plan.site,
            seq=plan.round,
            sha256=sha256,
            public_key=public_key_line(key.public_key()),
            signature=sign(key, "cotune-head", head_message(plan.site, plan.round, sha256)),
        )
        header = UpdateHeader(
            site=plan.site,
            run_id=plan.run_id,
            round=plan.round,
            job_sha256=plan.job.sha256(),
            base_sha256=plan.base_sha256,
            update_sha256=sha256,
            event=mechanism_of(plan.job).event(plan.job.train.local_steps).to_dict(),
            head=head,
        )
        signature = sign(key, "cotune-update", header.message())
        return AdapterUpdate(header.model_copy(update={"signature": signature}), payload)
