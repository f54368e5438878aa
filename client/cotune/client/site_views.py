"""What `cotune site` prints. Every text says so where a site is simulated."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from cotune.client.budget import account
from cotune.client.checks import Finding
from cotune.client.home import SiteHome
from cotune.client.joining import REQUEST
from cotune.client.policy import DatasetPolicy
from cotune.shared.chain import Entry
from cotune.shared.invitation import JoinRequest
from cotune.shared.signing import key_fingerprint

BAR = 30


def view_of(home: SiteHome) -> dict[str, Any]:
    """What every answer begins with."""
    return {"site": home.name, "simulated": home.is_simulated, "home": str(home.path)}


def view_text(home: SiteHome) -> str:
    """The same for people."""
    return f"{home.name}{'  SIMULATED: not for real records' if home.is_simulated else ''}  {home.path}"


def init_text(home: SiteHome, findings: Sequence[Finding]) -> str:
    """A new home, what the checks of its data found, and what to do next."""
    dataset = home.policy.dataset[0]
    found = [f"  {finding.level}  {finding.code}  {finding.message}" for finding in findings]
    return "\n".join([
        view_text(home),
        f"  public key  {home.ledger.head.public_key}",
        f"  data set    `{dataset.id}`, unit {dataset.unit}: epsilon {dataset.budget.epsilon_total:g} in all,"
        f" {dataset.budget.epsilon_per_run:g} a run, at delta {dataset.budget.delta_total:g}",
        *found,
        "",
        "next",
        f"  1. allow a base model: `models` under [allow] in {home.path / 'policy.toml'}",
        "  2. cotune site policy check JOB     what this site would say to a job, and its model's sha256",
        "  3. cotune site jobs                 the jobs that came; cotune site approve HASH lets one run",
        f"  4. send {home.path / REQUEST} to a coordinator, and give its answer to cotune site join INVITE",
        f"  back up {home.path / 'ledger.jsonl'} and head.json after each run: an old copy stops the site",
    ])  # fmt: skip


def request_view(home: SiteHome, request: JoinRequest) -> tuple[dict[str, Any], str]:
    """The request a site sends to a coordinator, and where it is."""
    path = home.path / REQUEST
    text = "\n".join([
        view_text(home),
        f"wrote {path}",
        f"  public key  {key_fingerprint(request.public_key)}",
        "  send it to the coordinator, who runs: cotune fed approve request.json",
    ])  # fmt: skip
    return {**view_of(home), "request": str(path), "content": request.model_dump(mode="json", by_alias=True)}, text


def policy_view(home: SiteHome) -> tuple[dict[str, Any], str]:
    """The policy in force, as data and as its file."""
    policy = home.policy
    content = (home.path / "policy.toml").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    data = {**view_of(home), "policy_sha256": sha256, "policy": policy.model_dump(mode="json", by_alias=True)}
    return data, f"# {view_text(home)}\n# policy.toml, sha256 {sha256}\n{content.decode('utf-8-sig').rstrip()}"


def budget_of(home: SiteHome, dataset: DatasetPolicy) -> dict[str, Any]:
    """What a data set has spent, by run, and how many more runs like its last one fit; None is without bound."""
    now = account(home.ledger.entries, dataset)
    last = list(now.runs.values())[-1:]
    return {
        "dataset": dataset.id,
        "unit": dataset.unit,
        "delta": dataset.budget.delta_total,
        "epsilon_spent": finite(now.spent),
        "epsilon_left": now.left,
        "epsilon_per_run": dataset.budget.epsilon_per_run,
        "epsilon_total": dataset.budget.epsilon_total,
        "runs": {run: finite(now.price(events)) for run, events in now.runs.items()},
        "more_runs_like_the_last": now.more_runs(last[0]) if last else None,
    }


def finite(epsilon: float) -> float | None:
    """An epsilon as JSON can say it: None is without bound."""
    return epsilon if math.isfinite(epsilon) else None


def _figure(epsilon: float | None) -> str:
    return "without bound" if epsilon is None else f"{epsilon:.3f}"


def budget_text(home: SiteHome, rows: Sequence[dict[str, Any]]) -> str:
    """The budgets for people."""
    lines = [view_text(home)]
    for row in rows:
        share = 1.0 if row["epsilon_spent"] is None else min(1.0, row["epsilon_spent"] / row["epsilon_total"])
        bar = "=" * math.ceil(BAR * share)  # a little spent is seen
        lines += [
            f"{row['dataset']}  per {row['unit']}, at delta {row['delta']:g}",
            f"  spent {_figure(row['epsilon_spent'])} of {row['epsilon_total']:g}  [{bar:{BAR}}]"
            f"  left {row['epsilon_left']:.3f}, {row['epsilon_per_run']:g} a run",
            *(f"  run {run}  epsilon {_figure(cost)}" for run, cost in row["runs"].items()),
        ]
        more = row["more_runs_like_the_last"]
        if more is not None:
            lines.append(f"  {_count(more)} like the last one would fit")
    return "\n".join([*lines, "epsilons of runs do not add up: together they cost less than their sum"])


def _count(more: int) -> str:
    if more == 0:
        return "no more run"
    return f"{more} more run{'s' if more > 1 else ''}" if more < 9 else "9 or more runs"


def proof_of(home: SiteHome) -> dict[str, Any]:
    """That the ledger is whole: opening it has checked every line and the signed head."""
    head = home.ledger.head
    return {"entries": head.seq, "chain": "valid", "head": head.model_dump(mode="json")}


def log_text(home: SiteHome, entries: Sequence[Entry], *, full: bool) -> str:
    """The ledger for people; fields as JSON, so that no text in them can play tricks with a terminal."""
    lines = [view_text(home)]
    lines += [f"{entry.seq:>6}  {entry.time}  {entry.action:<16}{json.dumps(entry.fields)}" for entry in entries]
    own = home.jobs.own_lines() if full else []
    lines += (
        ["own checks of records (never leave this home)", *(f"  {json.dumps(each)}" for each in own)] if own else []
    )
    head = home.ledger.head
    return "\n".join([
        *lines,
        f"{head.seq} entries: each names the one before it, and the last is signed by this site's key",
        f"head {head.seq} {head.sha256}",
    ])  # fmt: skip


OUTDATED = "the data set's file has changed since this was approved: look at it, then approve again"


def jobs_text(home: SiteHome, rows: Sequence[dict[str, Any]]) -> str:
    """The jobs for people."""
    lines = [view_text(home)]
    for row in rows:
        by = f" by {', '.join(row['rules'])}" if row["state"] == "refused" else ""
        lines += [
            f"{row['job_sha256'][:12]}  {row['state']}{by}  {row['name'] or ''}",
            *([f"  {OUTDATED}"] if row["outdated"] else []),
            f"  {row['cost']}",
            f"  code    bundle {row['bundle_sha256'][:12]}, the one of this site's own version; none other is let in",
            *(f"  leaves  {each}" for each in row["leaves"]),
        ]
    return "\n".join(lines if rows else [*lines, "no job came yet"])
