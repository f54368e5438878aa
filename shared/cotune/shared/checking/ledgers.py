"""What the sites' own ledgers say against what the coordinator says: events, epsilon, metrics."""

from __future__ import annotations

from collections.abc import Callable

from cotune.shared.chain import head_is_genuine
from cotune.shared.checking.checks import require
from cotune.shared.checking.examined import Examined
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.claim import DIGITS
from cotune.shared.privacy.crosscheck import epsilon_by_prv
from cotune.shared.privacy.event import Event, event_from_dict
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.runs import METRIC_COLUMNS

PRV_ERROR = 0.02
OF_A_SITE = {"round", "site", "epsilon", "update_norm", "train_loss", "bytes_up", "bytes_down", "seconds"}


def chains(examined: Examined) -> str:
    """Each site's ledger is one chain of hashes up to a head that the site signed and the claim names."""
    lines = 0
    for site in examined.took_part:
        head = examined.head(site)
        require(head.site == site and head_is_genuine(head), f"{site}: its ledger head is not signed by its key")
        facts = examined.ledger(site)
        require(facts.at_head == head.sha256, f"{site}: its ledger is not the one whose head it signed")
        began = (facts.first.get("site"), facts.first.get("public_key"))
        require(began == (site, head.public_key), f"{site}: its ledger began with another key than signed its head")
        lines += facts.lines
    return f"{len(examined.took_part)} hash chains of {lines:,} lines whole, each up to the head its site signed"


def events(examined: Examined) -> str:
    """What sites wrote down is what was planned, and the coordinator's account has all of it."""
    job = examined.job
    planned = mechanism_of(job).event(job.train.local_steps)
    sites = {site: examined.released(site) for site in examined.named}
    for site, entries in examined.accounts.items():
        require(site in sites, f"{site}: it was asked, but is missing from the claim")
        asked = [(entry["round"], event_from_dict(entry["event"])) for entry in entries]
        for number, event in sites[site]:
            require(event == planned, f"{site}: round {number} was charged as something else than planned")
            require((number, event) in asked, f"{site}: round {number} is in its ledger, but nobody asked for it")
            asked.remove((number, event))
    used = {(row["site"], row["round"]) for row in examined.metrics if row.get("site")}
    charged = {(site, number) for site, released in sites.items() for number, _ in released}
    require(used <= charged, "a round is in metrics.jsonl that no site charged itself for")
    return f"{sum(map(len, sites.values()))} site rounds of {job.train.local_steps} steps charged, {len(used)} used"


def first_accountant(examined: Examined) -> str:
    """Epsilon, from the sites' ledgers alone."""
    guarantee = examined.claim["guarantee"]
    if guarantee is None:
        return "nothing is promised, nothing to recompute"
    found, said = costliest(examined, epsilon), guarantee["epsilon"]
    require(found <= said + DIGITS, f"{found:.4f} from the sites' ledgers, the claim says {said:.4f}")
    unused = "" if said - found <= DIGITS else f"; the claim says {said:.4f}, with rounds no site took"
    return f"{found:.4f} recomputed from the sites' ledgers by dp-accounting PLD{unused}"


def second_accountant(examined: Examined) -> str:
    """The same by another program."""
    guarantee = examined.claim["guarantee"]
    if guarantee is None:
        return "nothing is promised, nothing to recompute"
    found, said = costliest(examined, epsilon_by_prv), guarantee["epsilon"]
    require(found <= said + PRV_ERROR, f"Opacus PRV gives {found:.4f}, the claim says {said:.4f}")
    return f"{found:.4f} from the sites' ledgers by Opacus PRV, not above the claim by more than {PRV_ERROR}"


def costliest(examined: Examined, price: Callable[[list[Event], float], float], delta: float | None = None) -> float:
    """The run's epsilon from its sites' ledgers alone, at the job's delta if none is given."""
    job = examined.job
    delta = float(job.privacy.delta) if delta is None else delta
    released = {site: [event for _, event in examined.released(site)] for site in examined.named}
    order = sorted(released, key=lambda site: (-epsilon(released[site], delta), site))
    return price([event for site in order[: job.data.sites_per_unit] for event in released[site]], delta)


def metrics(examined: Examined) -> str:
    """Nothing was measured at a site that its events do not account for."""
    noised = examined.job.privacy.metrics == "noised"
    for row in examined.metrics:
        filled = {str(key) for key, value in row.items() if value is not None}
        where = f"metrics.jsonl, round {row.get('round')}"
        unknown = sorted(filled - set(METRIC_COLUMNS))
        require(not unknown, f"{where}: {', '.join(unknown[:3])}, which no release accounts for")
        ofsite = sorted(filled - OF_A_SITE) if row.get("site") else []
        require(not ofsite, f"{where}: {', '.join(ofsite)} of a site's records, which no release accounts for")
        open_loss = "train_loss" in filled and not noised
        require(not open_loss, f"{where}: train_loss, although the job releases no metric (privacy.metrics = none)")
    return f"{len(examined.metrics)} rows, nothing in them that the events do not account for"
