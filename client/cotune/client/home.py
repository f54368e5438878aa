"""A site's home: the folder that holds its key, policy, ledger and jobs, and is nobody else's to read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cotune.client.coordinators import Coordinators
from cotune.client.datafiles import DataFiles
from cotune.client.decisions import Decisions
from cotune.client.ledger import Ledger
from cotune.client.peers import Peers
from cotune.client.policy import POLICY_FILE, DatasetPolicy, Policy, granting, parse_policy, policy_text
from cotune.client.updates import Updates
from cotune.shared.chain import RESTORE
from cotune.shared.errors import JobError, RefusedError, StorageError
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.homes import make_home, require_private
from cotune.shared.job import Job
from cotune.shared.jobfile import read_text
from cotune.shared.keyfile import SigningKey

FOLDERS = ("jobs", "updates", "footprint")


def default_home() -> Path:
    """$COTUNE_SITE, or `cotune/site` in the user's data folder."""
    if named := os.environ.get("COTUNE_SITE"):
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "cotune" / "site"


@dataclass(frozen=True, repr=False)
class SiteHome:
    """An open home. It holds secrets, so it has no repr.

    Attributes:
        path: The folder, mode 0700.
        name: The site's public name; fixed when the home was made, as is `is_simulated`.
        ledger: What the site ever released and decided.
        is_simulated: Whether this is a site of a simulation, which real records must never meet.
    """

    path: Path
    name: str
    ledger: Ledger
    is_simulated: bool

    @classmethod
    def create(cls, path: Path, policy: Policy, granted: Job | None = None) -> SiteHome:
        """Make a home with a new key, whole or not at all, and register its data sets.

        Args:
            path: Where; nothing may be there yet.
            policy: What the site allows.
            granted: A job that is approved from the start.

        Raises:
            JobError: There is something at this path already; it stays as it is (E-SITE-EXISTS).
            DataError: A data set's file cannot be read.
            StorageError: The folder cannot be written.
        """
        path = path.absolute()

        def furnish(draft: Path) -> None:
            _furnish(draft, policy)
            home = cls.open(draft)
            if granted:
                home.jobs.approve(granted, by="policy")

        make_home(path, furnish, taken(path))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> SiteHome:
        """Open a home; a changed policy is logged before anything else is done.

        Guarantee: the ledger is the whole ledger of this home's key (see `Ledger.open`); a home without one
        is refused, never begun anew, because an empty ledger is a full budget.

        Edge cases: a folder that others may enter, a key of another home and a policy of another site or
        kind are each refused.

        Raises:
            StorageError: The folder, key or ledger is missing, damaged, older than it was, or open to others.
            JobError: The policy has a fault.
        """
        path = path.absolute()
        require_private(path, "E-SITE-HOME", "a site's home", "cotune site init")
        key = SigningKey.load(path / "site.key")
        if not (path / "ledger.jsonl").exists():
            raise StorageError("E-LEDGER-BEHIND", f"{path}: the ledger is gone", hint=RESTORE)
        public, name = _public_line(path)
        if public != key.public:
            raise StorageError("E-SITE-HOME", f"{path}: site.pub is not the public half of site.key")
        ledger = Ledger.open(path / "ledger.jsonl", name, key)
        first = ledger.entries[0].fields if ledger.entries else {}
        if (first.get("site"), first.get("public_key")) != (name, public):
            raise StorageError("E-SITE-HOME", f"{path}: the ledger is not of this site and key", hint=RESTORE)
        home = cls(path, name, ledger, bool(first["simulated"]))
        _ = home.policy
        return home

    @classmethod
    def simulated(cls, folder: Path, name: str, job: Job, model_sha256: str) -> SiteHome:
        """A home for a site of a simulation: it grants exactly this job, and waives what only real sites need
        (secret noise, a private level, a file of its own). One that is there already is opened.

        Raises:
            RefusedError: There is a real site's home (E-SITE-HOME).
        """
        if not folder.exists():
            try:
                return cls.create(folder, granting(name, job, model_sha256), job)
            except JobError as error:
                if error.code != "E-SITE-EXISTS":  # another process was faster
                    raise
        home = cls.open(folder)
        if not home.is_simulated:
            raise RefusedError("E-SITE-HOME", f"{folder}: is a real site's home, not a simulated one's")
        return home

    @property
    def policy(self) -> Policy:
        """The policy as it is on disk now; one that was edited is logged, and its new data sets, before use.

        Raises:
            JobError: It has a fault, or is of another site, or turns a real site into a simulated one.
        """
        path = self.path / "policy.toml"
        text = read_text(path, POLICY_FILE)
        policy = parse_policy(text, path)
        fixed = {
            "site.name": (policy.site.name, self.name),
            "site.simulated": (policy.site.simulated, self.is_simulated),
        }
        for setting, (said, is_) in fixed.items():
            if said != is_:
                raise JobError("E-POLICY-VALUE", f"`{setting}` stays {is_!r}, it was fixed by `cotune site init`")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        logged = [e.fields["policy_sha256"] for e in self.ledger.entries if "policy_sha256" in e.fields]
        if sha256 != logged[-1]:
            self.ledger.append("policy.change", policy_sha256=sha256)
        for dataset in policy.dataset:
            if not self.is_simulated and dataset.id not in self.files.digests():
                self.files.note(dataset)
        return policy

    @property
    def jobs(self) -> Decisions:
        """The jobs that came, and what was said to them."""
        return Decisions(self.path / "jobs", self.ledger)

    @property
    def coordinators(self) -> Coordinators:
        """The coordinators it has joined."""
        return Coordinators(self.path / "coordinators")

    @property
    def peers(self) -> Peers:
        """Ledger heads of other sites."""
        return Peers(self.path / "heads.json")

    def refresh(self) -> None:
        """Take in what other processes wrote to the ledger."""
        self.ledger.check(self.ledger.head)

    def data_path(self, dataset: DatasetPolicy) -> Path:
        """A data set's file."""
        return self.files.path(dataset)

    def footprint_path(self, run_id: str) -> Path:
        """Where it is kept what a run used of energy here."""
        return self.path / "footprint" / f"{run_id}.json"

    @property
    def updates(self) -> Updates:
        """The updates it gave."""
        return Updates(self.path / "updates")

    @property
    def files(self) -> DataFiles:
        """Which file each data set has, and had."""
        return DataFiles(self.path, self.ledger)


def _furnish(folder: Path, policy: Policy) -> None:
    """Everything a home needs, with the first entry of its ledger."""
    key = SigningKey.create(folder / "site.key")
    text = policy_text(policy)
    write_atomic(folder / "site.pub", f"{key.public} {policy.site.name}\n".encode())
    write_atomic(folder / "policy.toml", text.encode())
    DataFiles.make_salt(folder)
    with storage_errors(folder):
        for name in FOLDERS:
            (folder / name).mkdir(mode=0o700)
    ledger = Ledger.open(folder / "ledger.jsonl", policy.site.name, key)
    ledger.append(
        "site.init",
        site=policy.site.name,
        public_key=key.public,
        policy_sha256=hashlib.sha256(text.encode()).hexdigest(),
        simulated=policy.site.simulated,
    )


def taken(path: Path) -> JobError:
    """Where a new home was to be made, there is something."""
    return JobError(
        "E-SITE-EXISTS",
        f"{path}: there is something already; a site's home is never overwritten",
        param="--home",
        hint="cotune site policy, or give another --home",
    )


def _public_line(path: Path) -> tuple[str, str]:
    try:
        kind, key, name = (path / "site.pub").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        raise StorageError("E-SITE-HOME", f"{path}: site.pub is missing or damaged", hint="cotune site init") from None
    return f"{kind} {key}", name
