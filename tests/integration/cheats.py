"""Ways to cheat on a finished run. Each is what somebody would do to make a run look better than it is.

Afterwards the cheater makes good what follows, with what it holds: `anybody` the manifest, and the claim's id, summary,
statement and cards; `coordinator` also its signature; `forger` also signatures of every site, by keys of its own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file
from tests.integration.tampered_world import (
    REFUSED,
    SITES,
    World,
    changed,
    claim_changed,
    head_of,
    list_signers,
    rewritten_ledger,
    sign_as_sites,
)

from cotune.shared.files import append_line, file_sha256
from cotune.shared.jobfile import dump_toml
from cotune.shared.keyfile import SigningKey
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.claim import ClaimSubject, build_claim, charged, claim_bytes, events_of
from cotune.shared.runs import RunFolder
from cotune.shared.signers import COORDINATOR, NAMESPACE, signature_path

Who = Literal["anybody", "coordinator", "forger"]


@dataclass(frozen=True)
class Cheat:
    """One way to cheat.

    Attributes:
        what: In words.
        who: Who does it; see above.
        check: The check of `cotune verify` that has to name it.
        do: Does it to a copy of the run.
    """

    what: str
    who: Who
    check: str
    do: Callable[[RunFolder, World], object]


CHEATS: list[Cheat] = []
Do = Callable[[RunFolder, World], object]


def cheat(what: str, who: Who, check: str) -> Callable[[Do], Do]:
    """Put a way to cheat into the table."""

    def listed(do: Do) -> Do:
        CHEATS.append(Cheat(what, who, check, do))
        return do

    return listed


def claim(what: str, check: str, change: Callable[[Any], object], who: Who = "coordinator") -> None:
    """A change of the claim alone."""
    CHEATS.append(Cheat(what, who, check, lambda run, _world: claim_changed(run, change)))


# --- the claim


def _everywhere(said: Any) -> None:
    for part in (said["guarantee"], *said["sites"], *said["adversaries"]):
        part["epsilon"] = 0.5


def _at_a_large_delta(said: Any) -> None:
    """An honest pair of its own, but not at the delta that is claimed."""
    events = 2 * [{"kind": "dp-sgd", "sampling_probability": 1 / 3, "noise_multiplier": 3.0, "steps": 4}]
    for site in said["sites"]:
        site |= {"delta": 0.1, "epsilon": epsilon(events_of([{"event": event} for event in events]), 0.1)}


claim("epsilon edited", "claim", lambda c: c["guarantee"].update(epsilon=0.5), "anybody")
claim("epsilon edited in guarantee, sites and adversaries", "epsilon", _everywhere)
claim("delta edited", "claim", lambda c: c["guarantee"].update(delta=1e-12))
claim("epsilon at a larger delta than is claimed", "claim", _at_a_large_delta)
claim("a bolder sentence", "claim", lambda c: c.update(statement="The released adapter is (0.01, 1e-30)-DP."))
claim("a smaller epsilon against readers alone", "claim", lambda c: c["adversaries"][3].update(epsilon=0.01))
claim("an adversary left out", "form", lambda c: c["adversaries"].pop(2))
claim("trade-off curve flattened", "claim", lambda c: c["guarantee"].update(tradeoff=[[0.01, 0.01], [1.0, 1.0]]))
claim("unit: a row called a person", "claim", lambda c: c["unit"].update(definition="one person", level="unit"))
claim("adjacency: another word", "claim", lambda c: c["guarantee"].update(adjacency="zero-out-one"))
claim("a line of `unprotected` removed", "claim", lambda c: c["unprotected"].pop(0))
claim("`unprotected` emptied", "form", lambda c: c.update(unprotected=[]))
claim("fewer steps at a site", "claim", lambda c: c["sites"][0].update(steps=1))
claim("a site left out of the claim", "events", lambda c: c["sites"].pop(0))
claim("secure aggregation said to hide updates", "claim", lambda c: c["threat_model"].update(coordinator="sees sums"))
claim("back-dated", "sites' signatures", lambda c: c.update(created="2020-01-01T00:00:00+00:00"))
claim("other software", "sites' signatures", lambda c: c["software"].update(opacus="9.9"))
claim("another base model", "reloaded loss", lambda c: c["model"].update(base_sha256="0" * 64))
claim(
    "another loss at the end of the run",
    "reloaded loss",
    lambda c: c["evidence"]["reload_check"].update(loss_saved=0.1),
)
claim("the claim of another run", "job", lambda c: c.update(run_id="20260101-000000-aaaa-tiny"))
claim("a claim of version 2", "form", lambda c: c.update(schema="cotune/privacy-claim/2"))
claim("a setting nobody knows", "form", lambda c: c.update(certified="yes"))


@cheat("epsilon said twice, for two readers to read two", "coordinator", "form")
def _twice(run: RunFolder, _world: World) -> None:
    path = run.privacy / "claim.json"
    path.write_bytes(path.read_bytes().replace(b'"guarantee": {', b'"guarantee": {"epsilon": 0.1,', 1))


# --- events and job


@cheat("an event dropped from the account", "anybody", "events")
def _an_event_less(run: RunFolder, _world: World) -> None:
    changed(run.privacy / "accountant.json", lambda value: value["sites"]["site-1"].pop())


@cheat("more noise in the account, after the fact", "anybody", "events")
def _more_noise(run: RunFolder, _world: World) -> None:
    def change(value: Any) -> None:
        for entry in [entry for entries in value["sites"].values() for entry in entries]:
            entry["event"]["noise_multiplier"] = 9.0

    changed(run.privacy / "accountant.json", change)


def _louder_job(run: RunFolder, world: World) -> None:
    """Job, account and claim of a run with three times the noise, as if it had been so."""
    job = run.job().replace(privacy={"noise_multiplier": 9.0})
    (run.path / "resolved.toml").write_text(dump_toml(job))
    _more_noise(run, world)
    accounts = charged(json.loads((run.privacy / "accountant.json").read_text())["sites"])

    def change(said: dict[str, Any]) -> None:
        files = {each["name"]: each["sha256"] for each in said["subject"]}
        heads = {site["id"]: site["ledger_head"] for site in said["sites"]}
        base = (said["model"]["base"], said["model"]["base_sha256"])
        check = said["evidence"]["reload_check"]
        subject = ClaimSubject(said["run_id"], files, check, heads, base, said["coordinator"])
        said |= {**build_claim(job, accounts, subject), "created": said["created"]}

    claim_changed(run, change)


def _louder_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for line in lines:
        if line["action"] == "budget.reserve":
            line["event"]["noise_multiplier"] = 9.0
    return lines


CHEATS.append(Cheat("more noise in job, account and claim", "coordinator", "events", _louder_job))


@cheat("the same, and every ledger chained anew", "coordinator", "ledgers")
def _louder_ledgers(run: RunFolder, world: World) -> None:
    _louder_job(run, world)
    for site in SITES:
        rewritten_ledger(run, site, _louder_lines)


@cheat("the same, with new keys for coordinator and sites, all signed anew", "forger", "keys")
def _louder_world(run: RunFolder, world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        keys = {name: SigningKey.create(Path(folder) / name) for name in (COORDINATOR, *SITES)}
    _louder_job(run, world)
    sites = {site: keys[site] for site in SITES}
    for site, key in sites.items():
        rewritten_ledger(
            run, site, lambda lines, key=key: [lines[0] | {"public_key": key.public}, *_louder_lines(lines)[1:]]
        )

    def change(said: Any) -> None:
        said["coordinator"]["public_key"] = keys[COORDINATOR].public
        for site in said["sites"]:
            site["ledger_head"] = head_of(run, site["id"], sites[site["id"]]).model_dump()

    claim_changed(run, change)
    list_signers(run, {**sites, COORDINATOR: keys[COORDINATOR]})
    sign_as_sites(run, {**sites, COORDINATOR: keys[COORDINATOR]})


@cheat("another job", "anybody", "job")
def _another_job(run: RunFolder, _world: World) -> None:
    path = run.path / "resolved.toml"
    path.write_text(path.read_text().replace("rounds = 2", "rounds = 3"))


@cheat("a site removed from everywhere", "coordinator", "sites' signatures")
def _a_site_gone(run: RunFolder, _world: World) -> None:
    changed(run.privacy / "accountant.json", lambda value: value["sites"].pop("site-3"))
    rows = [row for row in run.metrics() if row.get("site") != "site-3"]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.ledger("site-3").unlink()
    signature_path(run, "site-3").unlink()
    claim_changed(run, lambda said: said["sites"].pop(2))


# --- ledgers


@cheat("a ledger's line edited", "coordinator", "ledgers")
def _edited(run: RunFolder, _world: World) -> None:
    path = run.ledger("site-2")
    path.write_bytes(path.read_bytes().replace(b'"steps": 4', b'"steps": 1', 1))


def _lines(run: RunFolder, site: str) -> list[bytes]:
    return run.ledger(site).read_bytes().splitlines(keepends=True)


@cheat("a ledger rolled back", "coordinator", "ledgers")
def _rolled_back(run: RunFolder, _world: World) -> None:
    run.ledger("site-2").write_bytes(b"".join(_lines(run, "site-2")[:-2]))


@cheat("a ledger rolled back to a head the site did sign once", "coordinator", "events")
def _rolled_back_with_head(run: RunFolder, world: World) -> None:
    kept = len(_lines(run, "site-1")) - 2
    head = head_of(run, "site-1", world.keys["site-1"], kept)  # the coordinator kept it from the first round
    run.ledger("site-1").write_bytes(b"".join(_lines(run, "site-1")[:kept]))
    claim_changed(run, lambda said: said["sites"][0].update(ledger_head=head.model_dump()))


@cheat("a refusal deleted", "coordinator", "ledgers")
def _a_refusal_less(run: RunFolder, _world: World) -> None:
    lines = [line for line in _lines(run, "site-2") if REFUSED.encode() not in line]
    assert len(lines) == len(_lines(run, "site-2")) - 1
    run.ledger("site-2").write_bytes(b"".join(lines))


@cheat("a refusal deleted, and the ledger chained anew", "coordinator", "ledgers")
def _a_refusal_less_chained(run: RunFolder, _world: World) -> None:
    rewritten_ledger(run, "site-2", lambda lines: [line for line in lines if line["action"] != REFUSED])


@cheat("two lines of a ledger exchanged", "coordinator", "ledgers")
def _reordered(run: RunFolder, _world: World) -> None:
    lines = _lines(run, "site-1")
    lines[-1], lines[-2] = lines[-2], lines[-1]
    run.ledger("site-1").write_bytes(b"".join(lines))


@cheat("a ledger missing", "coordinator", "ledgers")
def _a_ledger_less(run: RunFolder, _world: World) -> None:
    run.ledger("site-1").unlink()


@cheat("another site's ledger in its place", "coordinator", "ledgers")
def _a_ledger_of_another(run: RunFolder, _world: World) -> None:
    run.ledger("site-1").write_bytes(run.ledger("site-2").read_bytes())


@cheat("a head forged with the coordinator's key", "coordinator", "ledgers")
def _forged_head(run: RunFolder, world: World) -> None:
    head = head_of(run, "site-1", world.coordinator)
    claim_changed(run, lambda said: said["sites"][0].update(ledger_head=head.model_dump()))


@cheat("a head of an earlier line under the newest signature", "coordinator", "ledgers")
def _younger_head(run: RunFolder, _world: World) -> None:
    claim_changed(run, lambda said: said["sites"][0]["ledger_head"].update(seq=1))


# --- signatures


@cheat("a site's signature of an earlier claim of the run", "coordinator", "sites' signatures")
def _signature_reused(run: RunFolder, world: World) -> None:
    earlier = json.loads((run.privacy / "claim.json").read_bytes()) | {"created": "2026-01-01T00:00:00+00:00"}
    signature_path(run, "site-1").write_text(world.keys["site-1"].sign(NAMESPACE, claim_bytes(earlier)))


@cheat("the coordinator's signature of another run", "anybody", "coordinator's signature")
def _signature_of_another_run(run: RunFolder, world: World) -> None:
    other = json.loads((run.privacy / "claim.json").read_bytes()) | {"run_id": "20260101-000000-aaaa-tiny"}
    signature_path(run, COORDINATOR).write_text(world.coordinator.sign(NAMESPACE, claim_bytes(other)))


@cheat("a site's signature made for a job", "coordinator", "sites' signatures")
def _signature_for_a_job(run: RunFolder, world: World) -> None:
    content = (run.privacy / "claim.json").read_bytes()
    signature_path(run, "site-1").write_text(world.keys["site-1"].sign("cotune-job", content))


@cheat("a site's signature missing", "coordinator", "sites' signatures")
def _signature_less(run: RunFolder, _world: World) -> None:
    signature_path(run, "site-2").unlink()


@cheat("one site's signature for another's", "coordinator", "sites' signatures")
def _signature_of_another(run: RunFolder, _world: World) -> None:
    signature_path(run, "site-2").write_bytes(signature_path(run, "site-1").read_bytes())


@cheat("another coordinator's key, in claim, list and signature", "anybody", "keys")
def _another_coordinator(run: RunFolder, world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        key = SigningKey.create(Path(folder) / "key")
    claim_changed(run, lambda said: said["coordinator"].update(public_key=key.public))
    list_signers(run, {**world.keys, COORDINATOR: key})
    sign_as_sites(run, {COORDINATOR: key})


@cheat("another key in the run's own list of signers", "anybody", "keys")
def _another_list(run: RunFolder, world: World) -> None:
    list_signers(run, {**world.keys, COORDINATOR: world.keys["site-1"]})


# --- what is released, and what is said of it


@cheat("the adapter exchanged", "anybody", "released adapter")
def _other_weights(run: RunFolder, _world: World) -> None:
    path = run.adapter / "adapter_model.safetensors"
    save_file({name: array + np.float32(0.5) for name, array in load_file(path).items()}, path)


@cheat("the adapter exchanged, in the claim too", "coordinator", "reloaded loss")
def _other_weights_claimed(run: RunFolder, world: World) -> None:
    _other_weights(run, world)
    sha256 = file_sha256(run.adapter / "adapter_model.safetensors")

    def change(said: Any) -> None:
        said["model"]["adapter_sha256"] = sha256
        for each in said["subject"]:
            each["sha256"] = file_sha256(run.path / each["name"])

    claim_changed(run, change)


@cheat("a file released beside the adapter", "anybody", "released adapter")
def _a_file_more(run: RunFolder, _world: World) -> None:
    (run.adapter / "optimizer.safetensors").write_bytes(b"x")


@cheat("a smaller epsilon on the model card", "anybody", "card")
def _card_edited(run: RunFolder, _world: World) -> None:
    path = run.adapter / "README.md"
    text = path.read_text()
    said = f"{run.claim()['guarantee']['epsilon']}"
    assert said in text
    path.write_text(text.replace(said, "0.5"))


@cheat("a promise added to the model card", "anybody", "card")
def _card_extended(run: RunFolder, _world: World) -> None:
    path = run.adapter / "README.md"
    path.write_text(path.read_text() + "\nNothing about any person can be learnt from this model.\n")


@cheat("a bolder statement.txt", "anybody", "summary")
def _statement_edited(run: RunFolder, _world: World) -> None:
    (run.privacy / "statement.txt").write_text("Nobody's records can be learnt from this model.\n")


@cheat("a smaller epsilon in summary.json", "anybody", "summary")
def _summary_edited(run: RunFolder, _world: World) -> None:
    changed(run.path / "summary.json", lambda value: value["sites"][0].update(epsilon=0.1))


@cheat("training losses, although the job releases none", "anybody", "metrics")
def _losses(run: RunFolder, _world: World) -> None:
    append_line(run.path / "metrics.jsonl", {"round": 2, "site": "site-1", "train_loss": 1.25})


@cheat("an accuracy on a site's own records", "anybody", "metrics")
def _accuracy(run: RunFolder, _world: World) -> None:
    append_line(run.path / "metrics.jsonl", {"round": 2, "site": "site-1", "accuracy": 0.9})


@cheat("an update nobody charged", "anybody", "events")
def _a_round_more(run: RunFolder, _world: World) -> None:
    append_line(run.path / "metrics.jsonl", {"round": 3, "site": "site-1"})


@cheat("a file changed, and the manifest forgotten", "anybody", "files")
def _manifest_forgotten(run: RunFolder, _world: World) -> None:
    run.write_manifest()
    append_line(run.path / "events.jsonl", {"message": "nothing happened"})


@cheat("a ledger that is a link to a file elsewhere", "anybody", "files")
def _a_link(run: RunFolder, _world: World) -> None:
    elsewhere = run.path.parent / "elsewhere.jsonl"
    run.ledger("site-1").rename(elsewhere)
    run.ledger("site-1").symlink_to(elsewhere)


@cheat("a failed run called a success", "anybody", "attack")
def _failure_hidden(run: RunFolder, _world: World) -> None:
    attacked(run, lambda said: said["run"]["audit"][0].update(epsilon_lower=99.0, holds=False))


# --- attacks


def attacked(run: RunFolder, change: Callable[[Any], object]) -> None:
    """Results of an attack, as `cotune attack` writes them, changed."""
    said, guarantee = run.claim(), run.claim()["guarantee"]
    audit = {
        "adversary": "coordinator", "method": "Steinke et al. 2023", "guesses": 100, "right": 55,
        "epsilon_lower": 0.2, "delta": guarantee["delta"], "confidence": 0.95,
        "claimed_epsilon": guarantee["epsilon"], "holds": True,
    }  # fmt: skip
    results: dict[str, Any] = {
        "schema": "cotune/attack/1", "run_id": said["run_id"], "claim_id": said["claim_id"],
        "created": said["created"], "seconds": 1.0, "verdict": "holds", "limits": [], "control": None, "leakage": None,
        "run": {"canaries": None, "audit": [audit], "exposure": None, "membership": None, "secrets": None},
    }  # fmt: skip
    change(results)
    (run.path / "attack").mkdir()
    (run.path / "attack" / "results.json").write_text(json.dumps(results))


def attack(what: str, change: Callable[[Any], object]) -> None:
    """A change of an attack's results."""
    CHEATS.append(Cheat(what, "anybody", "attack", lambda run, _world: attacked(run, change)))


attack("a lower bound above the claim", lambda a: a["run"]["audit"][0].update(epsilon_lower=99.0))
attack("an attack on another claim", lambda a: a.update(claim_id="sha256:" + "0" * 64))
attack("an attack held against a larger epsilon", lambda a: a["run"]["audit"][0].update(claimed_epsilon=99.0))
attack("a verdict of `broken` kept", lambda a: a.update(verdict="broken"))
attack("more right guesses than guesses", lambda a: a["run"]["audit"][0].update(right=101))
