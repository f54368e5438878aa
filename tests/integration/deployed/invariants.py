"""What has to hold of a run whatever happened to it, judged from what it left on the disks: I1 to I9.

Nothing here asks a process: the run folder, the sites' ledgers and updates, and the coordinator's files are enough.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from tests.integration.deployed.study import leaks
from tests.integration.killed_study import replayed

from cotune.client.policy import parse_policy
from cotune.client.updates import Updates
from cotune.shared.chain import Entry, SignedHead, head_is_genuine, read_chain, require_agreement, reserved
from cotune.shared.errors import StorageError
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.runs import RunFolder
from cotune.shared.update import MAX_CHARGES
from cotune.shared.verification import verify_run

ENDS = ("succeeded", "paused")  # any other end is a run that was lost


@dataclass(frozen=True)
class History:
    """A run and everything that tells of it, once it has ended.

    Attributes:
        run: Its folder.
        homes: Site -> its home.
        kept: Site -> a folder with all updates it gave, laid out as its home.
        keys: Site -> the key it is enrolled with.
        before: Site -> hashes of its ledger's lines before the run.
        outside: Everything that what sites sent can be in.
        expected: The adapter of an undisturbed run; None where noise is fresh.
        may_be_lost: Site and round of what a fault may have hit in training: it may be charged again, once.
        recovered: Fault -> seconds until a round was finished after it, and how many were allowed.
    """

    run: RunFolder
    homes: Mapping[str, Path]
    kept: Mapping[str, Path]
    keys: Mapping[str, str]
    before: Mapping[str, Sequence[str]]
    outside: Sequence[Path]
    expected: bytes | None
    may_be_lost: Set[tuple[str, int]]
    recovered: Mapping[str, tuple[float, float]]

    @property
    def succeeded(self) -> bool:
        """Whether there is a result to judge."""
        return self.run.state()["status"] == "succeeded"

    @property
    def adapter(self) -> Path:
        """Its result."""
        return self.run.adapter / "adapter_model.safetensors"

    def entries(self, site: str) -> list[Entry]:
        """A site's ledger as it is now."""
        return read_chain((self.homes[site] / "ledger.jsonl").read_bytes())

    def of_run(self, site: str, action: str) -> list[Entry]:
        """A site's entries of one kind for this run."""
        return [e for e in self.entries(site) if e.action == action and e.fields["run_id"] == self.run.run_id]

    def heads(self) -> dict[str, SignedHead]:
        """The newest heads that the coordinator holds."""
        path = self.run.privacy / "heads.json"
        known: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        return {site: SignedHead.model_validate(head) for site, head in known.items()}

    def accepted(self) -> list[tuple[str, int]]:
        """Site and round of every update that was joined."""
        return [(row["site"], row["round"]) for row in self.run.metrics() if row.get("site")]

    def charges(self) -> Counter[tuple[str, int]]:
        """How often each site charged itself for each round."""
        return Counter((s, e.fields["round"]) for s in self.homes for e in self.of_run(s, "budget.reserve"))


def charged_before_trained(history: History) -> Iterator[str]:
    """I1: nothing was trained that was not charged before, and the coordinator's account has at least as much."""
    for site in history.homes:
        reserved_at: dict[int, int] = {}
        for entry in history.of_run(site, "budget.reserve"):
            reserved_at.setdefault(entry.fields["round"], entry.seq)
        for entry in history.of_run(site, "budget.commit"):
            if reserved_at.get(entry.fields["round"], entry.seq) >= entry.seq:
                yield f"{site}: round {entry.fields['round']} was trained before it was charged"
    for site, number in history.accepted():
        if not history.charges()[site, number]:
            yield f"{site}: round {number} was used and never charged"
    account = json.loads((history.run.privacy / "accountant.json").read_bytes())["sites"]
    counted = Counter((s, entry["round"]) for s, kept in account.items() for entry in kept if "refused" not in entry)
    for (site, number), charges in history.charges().items():
        if history.succeeded and counted[site, number] < charges:
            yield f"{site}: round {number} was charged {charges} times, the coordinator counts {counted[site, number]}"


def within_budget(history: History) -> Iterator[str]:
    """I2: no data set has spent more than its budget, and no round was charged more often than it may be."""
    for site, home in history.homes.items():
        path = home / "policy.toml"
        [dataset] = parse_policy(path.read_text(encoding="utf-8"), path).dataset
        spent = epsilon([event for _, event in reserved(history.entries(site))], dataset.budget.delta_total)
        if spent > dataset.budget.epsilon_total:
            yield f"{site}: spent {spent:.3f} of {dataset.budget.epsilon_total}"
    for (site, number), charges in history.charges().items():
        if charges > (MAX_CHARGES if (site, number) in history.may_be_lost else 1):
            yield f"{site}: round {number} was charged again, {charges} times in all"


def ledgers_grow(history: History) -> Iterator[str]:
    """I3: each ledger is one chain, signed to its end, that only grew."""
    for site, home in history.homes.items():
        entries = history.entries(site)
        head = SignedHead.model_validate_json((home / "head.json").read_bytes())
        if not head_is_genuine(head) or head.seq != len(entries):
            yield f"{site}: its head is not of its last line"
        known = list(history.before.get(site, ()))
        if [entry.sha256 for entry in entries][: len(known)] != known:
            yield f"{site}: its ledger lost what it had before the run"
        for held in (head, *(h for s, h in history.heads().items() if s == site)):
            try:
                require_agreement(held, entries)
            except StorageError as error:
                yield f"{site}: {error.message}"


def one_update_a_round(history: History) -> Iterator[str]:
    """I4: a site gives one update a round, whatever was asked how often."""
    for site in history.homes:
        given: dict[int, set[str]] = {}
        for entry in history.of_run(site, "budget.commit"):
            given.setdefault(entry.fields["round"], set()).add(entry.fields["update_sha256"])
        yield from (f"{site}: round {n} gave {len(found)} updates" for n, found in given.items() if len(found) > 1)
    yield from (f"{at}: joined {count} times" for at, count in Counter(history.accepted()).items() if count > 1)


def adapter_adds_up(history: History) -> Iterator[str]:
    """I5: the adapter is the start and the sites' own updates added up in order, to the bit; and as undisturbed."""
    if not history.succeeded:
        return
    found, by_hand = (
        load_file(history.adapter),
        replayed(history.run, {site: history.kept[site] for site in history.homes}),
    )
    if found.keys() != by_hand.keys() or any(found[n].tobytes() != by_hand[n].tobytes() for n in found):
        yield "the adapter is not what the sites' updates add up to"
    if history.expected is not None and history.adapter.read_bytes() != history.expected:
        yield "the adapter is another than that of an undisturbed run"


def accepted_is_signed(history: History) -> Iterator[str]:
    """I6: every update that was joined is committed in a ledger whose signed head the coordinator holds."""
    heads = history.heads()
    for site, number in history.accepted():
        commits = [e for e in history.of_run(site, "budget.commit") if e.fields["round"] == number]
        kept = Updates(history.kept[site] / "updates").read(history.run.run_id, number)
        head = heads.get(site)
        if head is None or head.public_key != history.keys[site] or not head_is_genuine(head):
            yield f"{site}: the coordinator holds no head signed by its key"
        elif not commits or head.seq < commits[0].seq:
            yield f"{site}: round {number} was joined, and no signed ledger has it"
        elif kept is None or kept.header.update_sha256 != commits[0].fields["update_sha256"]:
            yield f"{site}: round {number} is not the update that its ledger names"


def totals_agree(history: History) -> Iterator[str]:
    """I7: the run verifies, and its account of each site is that of the site's own ledger."""
    if not history.succeeded:
        return
    yield from (f"verify: {c.name}: {c.detail}" for c in verify_run(history.run) if not c.passed)
    account = json.loads((history.run.privacy / "accountant.json").read_bytes())["sites"]
    for site in history.homes:
        said = Counter(e["round"] for e in account.get(site, ()) if "refused" not in e)
        own = Counter(e.fields["round"] for e in history.of_run(site, "budget.reserve"))
        if said != own:
            yield f"{site}: the run's account has {dict(said)}, its own ledger {dict(own)}"


def nothing_leaks(history: History) -> Iterator[str]:
    """I8: no word of a record is anywhere outside the sites."""
    yield from (f"a word of a record is in {file}" for file in leaks(history.outside))


def ends_in_time(history: History) -> Iterator[str]:
    """I9: the run ends, with a result or paused by a named reason, and goes on in time after each fault."""
    state = history.run.state()
    if state["status"] not in ENDS:
        yield f"the run is {state['status']}: {state.get('error')}"
    if state["status"] == "paused" and not (state.get("error") or {}).get("code"):
        yield "the run is paused and does not say why"
    for fault, (seconds, allowed) in history.recovered.items():
        if seconds > allowed:
            yield f"{fault}: no round was finished for {seconds:.0f} s, at most {allowed:.0f} were allowed"


INVARIANTS: dict[str, Callable[[History], Iterator[str]]] = {
    "I1": charged_before_trained,
    "I2": within_budget,
    "I3": ledgers_grow,
    "I4": one_update_a_round,
    "I5": adapter_adds_up,
    "I6": accepted_is_signed,
    "I7": totals_agree,
    "I8": nothing_leaks,
    "I9": ends_in_time,
}


def broken(history: History) -> list[str]:
    """What does not hold of a run, each with its number; empty if all is well."""
    return [f"{name}: {fault}" for name, holds in INVARIANTS.items() for fault in holds(history)]
