"""One small honest run, with the keys of everybody in it, and what a cheater can make good after a change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.client.home import SiteHome
from cotune.server.conduct import conduct
from cotune.server.fleet import Request
from cotune.shared.chain import SignedHead, read_chain, sign_head
from cotune.shared.files import write_json
from cotune.shared.keyfile import SigningKey
from cotune.shared.plan import ClaimRequest
from cotune.shared.privacy.claim import claim_bytes, claim_id, statement_text
from cotune.shared.runs import RunFolder
from cotune.shared.signers import COORDINATOR, NAMESPACE, signature_path, signers_path, signers_text
from cotune.shared.update import Answer, SiteFailure
from cotune.simulations.federation import InlineFleet
from cotune.simulations.scenario import begin, prepare_run

SITES = ("site-1", "site-2", "site-3")
REFUSED = "job.refused"


class KeepingFleet(InlineFleet):
    """Sites of which one has refused a job before, and whose homes are kept when the run throws them away."""

    def __init__(self, run: RunFolder, kept: Path) -> None:
        super().__init__(run)
        self._run, self._kept = run, kept

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Train each site in turn; a second job comes to site-2 in between, and a rule of its refuses that."""
        if requests[0].plan.round == 2:
            job = self._run.job()
            other = job.replace(run={"seed": job.run.seed + 1})
            SiteHome.open(self._run.sites / "site-2").jobs.refuse(other, "allow.models", "base model is not allowed")
        yield from super().ask(requests)

    def countersign(self, requests: Sequence[ClaimRequest]) -> Iterator[tuple[str, str | SiteFailure]]:
        """Each site's signature of the claim."""
        shutil.copytree(self._run.sites, self._kept, dirs_exist_ok=True)
        yield from super().countersign(requests)


@dataclass(frozen=True)
class World:
    """An honest run and its secrets.

    Attributes:
        run: The run; it is copied, never changed.
        coordinator: The coordinator's key.
        keys: The sites' keys.
        signers: What an officer knows of them from elsewhere.
    """

    run: RunFolder
    coordinator: SigningKey
    keys: dict[str, SigningKey]
    signers: dict[str, frozenset[str]]

    def copy(self, folder: Path) -> RunFolder:
        """A copy of the run, under its own name."""
        return RunFolder(Path(shutil.copytree(self.run.path, folder / self.run.run_id)))


def make_world(job_file: Path) -> World:
    """Run a job inline, honestly."""
    run = prepare_run(str(job_file), (), job_file.parent / "runs", lambda _line: None)
    kept = job_file.parent / "kept"
    begin(run)
    conduct(run, KeepingFleet(run, kept), "inline")
    coordinator = SigningKey.load(kept / "coordinator.key")
    keys = {site: SigningKey.load(kept / site / "site.key") for site in SITES}
    signers = {COORDINATOR: frozenset({coordinator.public})}
    return World(run, coordinator, keys, signers | {site: frozenset({key.public}) for site, key in keys.items()})


def changed(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)


def claim_changed(run: RunFolder, change: Callable[[Any], object]) -> None:
    """Change the claim, and what beside it repeats it, but for the cards: id, summary, statement."""

    def follow(claim: dict[str, Any]) -> None:
        change(claim)
        claim["claim_id"] = claim_id(claim)

    path = run.privacy / "claim.json"
    claim = json.loads(path.read_bytes())
    follow(claim)
    path.write_bytes(claim_bytes(claim))
    costs = {site["id"]: site for site in claim["sites"]}

    def summary(value: dict[str, Any]) -> None:
        value["sites"] = [site for site in value["sites"] if site["site"] in costs]
        for site in value["sites"]:
            site |= {key: costs[site["site"]][key] for key in ("epsilon", "delta", "steps")}

    changed(run.path / "summary.json", summary)
    (run.privacy / "statement.txt").write_text(statement_text(claim), encoding="utf-8")


def sign_as_coordinator(run: RunFolder, key: SigningKey) -> None:
    """What who holds the coordinator's key can do."""
    signature_path(run, COORDINATOR).write_text(key.sign(NAMESPACE, (run.privacy / "claim.json").read_bytes()))


def sign_as_sites(run: RunFolder, keys: dict[str, SigningKey]) -> None:
    """What who holds the sites' keys can do."""
    for site, key in keys.items():
        signature_path(run, site).write_text(key.sign(NAMESPACE, (run.privacy / "claim.json").read_bytes()))


def list_signers(run: RunFolder, keys: dict[str, SigningKey]) -> None:
    """Write other keys into the run's own list."""
    signers_path(run).write_text(signers_text({name: key.public for name, key in keys.items()}))


def rewritten_ledger(run: RunFolder, site: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Change the lines of a ledger, and chain them anew: anybody can, but nobody else can sign the new head."""
    from cotune.shared.chain import next_line

    path = run.ledger(site)
    lines = change([json.loads(line) for line in path.read_bytes().splitlines()])
    content, last = b"", None
    for line in lines:
        fields = {key: value for key, value in line.items() if key not in ("seq", "prev", "time", "action")}
        new = next_line(last, line["time"], line["action"], fields)
        content, [last] = content + new, read_chain(new, last)
    path.write_bytes(content)


def head_of(run: RunFolder, site: str, key: SigningKey, seq: int | None = None) -> SignedHead:
    """A head that this key signs, of a line of the ledger as it is now."""
    entries = read_chain(run.ledger(site).read_bytes())
    return sign_head(key, site, entries[(seq or len(entries)) - 1])
