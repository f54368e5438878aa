"""The claim says what the events cost, and says so when there is nothing to claim."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest

from cotune.shared.job import Job
from cotune.shared.jobfile import parse_job
from cotune.shared.planning import resolve
from cotune.shared.privacy.accounting import epsilon, epsilon_replace_one
from cotune.shared.privacy.claim import GROUPS, ClaimSubject, build_claim, charged, claim_id, events_of, statement_text
from cotune.shared.privacy.crosscheck import epsilon_by_prv
from cotune.shared.privacy.event import TruncatedDpSgdEvent
from cotune.shared.privacy.group import epsilon_group
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.privacy.wording import NON_PRIVATE, unprotected

HEAD = {"seq": 7, "sha256": "b" * 64}
SUBJECT = ClaimSubject(
    "run-1",
    {"adapter_model.safetensors": "a" * 64},
    {"loss_saved": 1.5, "loss_reloaded": 1.5},
    {"site-1": HEAD},
    ("tiny", "c" * 64),
    {"public_key": "ssh-ed25519 " + "A" * 68, "simulated": True},
)
DATA = {"train": "nowhere.jsonl", "records_per_site": 30}
QUIET = {"epsilon": 1.2, "noise_multiplier": 6.0}  # quick to account


def entries(job: Job, rounds: int) -> list[dict[str, Any]]:
    """A site's ledger after so many rounds, as it is read back from disk."""
    event = mechanism_of(job).event(job.train.local_steps).to_dict()
    return json.loads(json.dumps([{"round": n, "event": event} for n in range(1, rounds + 1)]))


def make_job(**sections: dict[str, Any]) -> Job:
    """A job of 4 steps on 10 of 30 records; a claim needs neither its model nor its data."""
    made = {
        "run": {"rounds": 2},
        "model": {"base": "nowhere", "max_length": 32},
        "data": DATA,
        "train": {"batch_size": 10, "local_steps": 2},
        "privacy": QUIET,
    }
    return resolve(parse_job({"schema": 1, **made, **sections}, origin="test"))


@cache
def claim_of_two_sites() -> dict[str, Any]:
    """The claim of a whole run, built once; no test changes it."""
    job = make_job()
    return build_claim(job, {"site-1": entries(job, 2), "site-2": entries(job, 2)}, SUBJECT)


@pytest.fixture(scope="module")
def job() -> Job:
    return make_job()


def test_the_claim_of_a_whole_run_costs_what_the_job_promised(job: Job) -> None:
    claim = claim_of_two_sites()
    guarantee = claim["guarantee"]
    assert 0 < guarantee["epsilon"] <= guarantee["target_epsilon"] == 1.2
    assert guarantee["delta"] == job.privacy.delta
    assert guarantee["variant"] == "approximate DP"
    assert [site["id"] for site in claim["sites"]] == ["site-1", "site-2"]
    assert {site["steps"] for site in claim["sites"]} == {4}


def test_the_runs_epsilon_is_the_largest_sites(job: Job) -> None:
    accounts = {"site-1": entries(job, 1), "site-2": entries(job, 2), "site-3": entries(job, 1)}
    claim = build_claim(job, accounts, SUBJECT)
    by_site = {site["id"]: site["epsilon"] for site in claim["sites"]}
    assert by_site["site-1"] == by_site["site-3"] < by_site["site-2"]
    assert claim["guarantee"]["epsilon"] == by_site["site-2"]
    assert f"({math.ceil(by_site['site-2'] * 100) / 100:.2f}," in claim["statement"]


def test_epsilon_comes_from_the_events_and_not_from_what_the_job_says(job: Job) -> None:
    worse = [{"round": 1, "event": {**entries(job, 1)[0]["event"], "steps": 200}}]
    claim = build_claim(job, {"site-1": worse}, SUBJECT)
    events = events_of(worse)
    delta = float(job.privacy.delta)
    assert claim["guarantee"]["epsilon"] == epsilon(events, delta) > job.privacy.epsilon
    assert claim["guarantee"]["epsilon_replace_one"] == epsilon_replace_one(events, delta)
    assert claim["guarantee"]["epsilon_second_accountant"] == epsilon_by_prv(events, delta)
    assert claim["sites"][0]["steps"] == 200
    assert claim["guarantee"]["target_epsilon"] == job.privacy.epsilon


def test_the_other_figures_bound_the_claimed_one_from_above() -> None:
    guarantee = claim_of_two_sites()["guarantee"]
    for name in ("epsilon_replace_one", "epsilon_without_amplification", "epsilon_second_accountant"):
        assert guarantee[name] >= guarantee["epsilon"]
    assert all(rate <= power <= 1 for rate, power in guarantee["tradeoff"])


def test_a_statement_never_says_less_epsilon_or_delta_than_was_computed() -> None:
    claim = claim_of_two_sites()
    said_epsilon, said_delta = claim["statement"].split("(")[1].split(")")[0].split(", ")
    assert float(said_epsilon) >= claim["guarantee"]["epsilon"]
    assert float(said_delta) >= claim["guarantee"]["delta"]


def test_a_run_without_privacy_has_no_guarantee_and_says_so() -> None:
    job = make_job(privacy={"level": "none"})
    claim = build_claim(job, {"site-1": entries(job, 2)}, SUBJECT)
    assert claim["guarantee"] is None
    assert claim["statement"].startswith(NON_PRIVATE)
    assert "privacy.level = none" in claim["statement"]
    assert claim["sites"][0]["epsilon"] is None
    assert claim["sites"][0]["noise_multiplier"] is None
    assert NON_PRIVATE in statement_text(claim)


def test_a_run_with_seeded_noise_has_no_guarantee_and_says_so() -> None:
    job = make_job(privacy={**QUIET, "noise": "test"})
    claim = build_claim(job, {"site-1": entries(job, 2)}, SUBJECT)
    assert claim["guarantee"] is None
    assert claim["statement"].startswith(NON_PRIVATE)
    assert "privacy.noise = test" in claim["statement"]
    assert "NOT PRIVATE" in claim["mechanism"]["noise"]
    assert NON_PRIVATE in statement_text(claim)


def test_no_site_of_a_run_with_seeded_noise_shows_an_epsilon() -> None:
    job = make_job(privacy={**QUIET, "noise": "test"})
    claim = build_claim(job, {"site-1": entries(job, 2)}, SUBJECT)
    assert [site["epsilon"] for site in claim["sites"]] == [None]


def test_one_open_release_in_a_private_run_is_no_guarantee(job: Job) -> None:
    opened = [*entries(job, 1), {"round": 2, "event": {"kind": "non-private"}}]
    claim = build_claim(job, {"site-1": entries(job, 2), "site-2": opened}, SUBJECT)
    assert claim["guarantee"] is None


def test_a_run_nobody_took_part_in_claims_nothing_and_speaks_of_no_test_noise(job: Job) -> None:
    claim = build_claim(job, {}, SUBJECT)
    assert claim["guarantee"] is None
    assert claim["sites"] == []
    assert "privacy.noise = test" not in claim["statement"]


@pytest.mark.parametrize("privacy", [{}, {"level": "none"}, {"noise": "test"}], ids=["dp", "none", "test"])
def test_what_is_not_protected_is_always_listed(privacy: dict[str, str]) -> None:
    job = make_job(privacy={**QUIET, **privacy})
    claim = build_claim(job, {"site-1": entries(job, 2)}, SUBJECT)
    assert claim["unprotected"] == unprotected(job) != []
    text = statement_text(claim)
    assert all(item in text for item in claim["unprotected"])
    assert text.startswith(claim["statement"])


def test_the_claim_is_plain_json_without_nan_and_carries_its_subject(job: Job) -> None:
    claim = claim_of_two_sites()
    assert json.loads(json.dumps(claim, allow_nan=False)) == claim
    assert claim["subject"] == [{"name": "adapter_model.safetensors", "sha256": "a" * 64}]
    assert claim["model"] == {"base": "tiny", "base_sha256": "c" * 64, "adapter_sha256": None}
    assert claim["evidence"]["reload_check"] == {"loss_saved": 1.5, "loss_reloaded": 1.5}
    assert claim["job_sha256"] == job.sha256()
    assert claim["unit"]["definition"].endswith("32 tokens")
    assert claim["unit"]["adjacency"] == "add-or-remove-one"


def test_the_id_is_of_the_claims_own_content() -> None:
    claim = claim_of_two_sites()
    assert claim["claim_id"] == claim_id(claim)
    assert claim["claim_id"].startswith("sha256:")
    reordered = dict(reversed(list(claim.items())))
    assert claim_id(reordered) == claim["claim_id"]


def test_a_change_of_any_field_changes_the_id() -> None:
    claim = claim_of_two_sites()
    ids = {claim["claim_id"]}
    for name in claim.keys() - {"claim_id"}:
        ids.add(claim_id({**claim, name: "changed"}))
        ids.add(claim_id({key: value for key, value in claim.items() if key != name}))
    deeper = json.loads(json.dumps(claim))
    deeper["guarantee"]["epsilon"] -= 1e-9
    ids.add(claim_id(deeper))
    assert len(ids) == 2 * (len(claim) - 1) + 2


def test_the_mechanism_says_which_matrices_were_trained() -> None:
    said = []
    for rule in ("ffa", "fedavg_ab", "alternating_steps", "fed_sb"):
        job = make_job(aggregation={"rule": rule}, privacy=QUIET)
        said.append(build_claim(job, {"site-1": entries(job, 2)}, SUBJECT)["mechanism"]["name"])
    assert "A public and frozen" in said[0]
    assert said[1].endswith("A and B")
    assert said[2].endswith("A and B, in turn each step")
    assert said[3].endswith("the core between public, frozen A and B")


# Persons, heads, sites and a cap


def test_a_claim_about_rows_says_what_a_person_with_several_is_promised() -> None:
    claim = claim_of_two_sites()
    said = {row["records"]: row["epsilon"] for row in claim["guarantee"]["person"]}
    assert tuple(said) == GROUPS
    assert claim["guarantee"]["epsilon"] < said[2] < said[4] < said[8]
    job = make_job()
    events = events_of(entries(job, 2))
    assert said[4] == epsilon_group(events, float(job.privacy.delta), 4)
    assert claim["unit"]["level"] == "example"
    assert claim["unit"]["person_level"].startswith("not claimed")
    assert any("several records" in item for item in claim["unprotected"])


def test_rows_of_one_person_that_are_limited_are_priced_at_that_limit() -> None:
    job = make_job(data={**DATA, "unit": "column:patient", "max_per_unit": 3})
    claim = build_claim(job, {"site-1": entries(job, 1)}, SUBJECT)
    assert [row["records"] for row in claim["guarantee"]["person"]] == [3]
    assert claim["guarantee"]["person"][0]["epsilon"] > claim["guarantee"]["epsilon"]
    assert claim["unit"]["max_records_per_person"] == 3
    assert "at most 3 rows" in claim["unit"]["person_level"]


def person_job(**data: Any) -> Job:
    persons = {"unit": "column:patient", "units_per_site": 30, "records_per_site": 90}
    return make_job(data={**DATA, **persons, **data}, privacy={**QUIET, "level": "unit"})


@pytest.mark.parametrize(("most", "said"), [(None, "all rows"), (5, "the first 5 rows")])
def test_a_claim_about_persons_names_them_and_needs_no_second_figure_for_them(most: int | None, said: str) -> None:
    job = person_job(max_per_unit=most)
    claim = build_claim(job, {"site-1": entries(job, 1)}, SUBJECT)
    assert claim["guarantee"]["person"] == []
    assert "one person (all rows with one value of column patient)" in claim["statement"]
    assert claim["unit"]["definition"].startswith(f"{said} of one person")
    assert claim["unit"]["column"] == "patient"
    assert claim["unit"]["person_level"].startswith("claimed")
    assert "per person, over all their rows" in claim["mechanism"]["clipping"]
    assert not any("several records" in item for item in claim["unprotected"])


def test_each_site_carries_the_signed_head_of_its_ledger_if_it_sent_one() -> None:
    heads = {site["id"]: site["ledger_head"] for site in claim_of_two_sites()["sites"]}
    assert heads == {"site-1": HEAD, "site-2": None}


def test_a_person_at_two_sites_is_priced_at_the_two_costliest(job: Job) -> None:
    at_two = make_job(data={**DATA, "sites_per_unit": 2}, federation={"sites": 3})
    accounts = {"site-1": entries(at_two, 1), "site-2": entries(at_two, 3), "site-3": entries(at_two, 2)}
    claim = build_claim(at_two, accounts, SUBJECT)
    both = epsilon(events_of(entries(at_two, 5)), float(at_two.privacy.delta))
    assert claim["guarantee"]["epsilon"] == both > max(site["epsilon"] for site in claim["sites"])
    assert "at up to 2 sites, against everyone outside those sites" in claim["statement"]
    assert "2 costliest sites composed" in claim["composition"]["across_sites"]
    assert "of any one site's data" in claim_of_two_sites()["statement"]


def test_with_fewer_sites_than_a_person_may_be_at_all_are_composed() -> None:
    at_two = make_job(data={**DATA, "sites_per_unit": 2}, federation={"sites": 3})
    claim = build_claim(at_two, {"site-1": entries(at_two, 2)}, SUBJECT)
    assert claim["guarantee"]["epsilon"] == claim["sites"][0]["epsilon"]


def test_with_a_cap_a_unit_is_replaced_by_nothing_in_figures_and_words() -> None:
    job = make_job(
        train={"batch_size": 10, "local_steps": 2, "max_batch_size": 18},
        data={**DATA, "unit": "column:patient", "max_per_unit": 2},
        privacy={**QUIET, "noise_multiplier": 12.0},
    )
    claim = build_claim(job, {"site-1": entries(job, 2)}, SUBJECT)
    event = events_of(entries(job, 1))[0]
    assert isinstance(event, TruncatedDpSgdEvent)
    assert (event.max_batch_size, event.population) == (18, 30)
    assert claim["guarantee"]["adjacency"] == claim["unit"]["adjacency"] == "zero-out-one"
    assert claim["guarantee"]["epsilon"] == epsilon([event, event], float(job.privacy.delta))
    assert claim["guarantee"]["epsilon_second_accountant"] >= claim["guarantee"]["epsilon"]
    assert "replacing one row by nothing" in claim["statement"]
    assert claim["sites"][0]["sampling"] == "truncated poisson"
    assert claim["mechanism"]["sampling"] == "Poisson, at most 18 of 30 units"


def test_everything_that_leaves_a_site_is_listed_with_its_price() -> None:
    plain = claim_of_two_sites()["releases"]
    job = make_job(privacy={**QUIET, "clipping": "adaptive", "metrics": "noised"})
    more = build_claim(job, {"site-1": entries(job, 1)}, SUBJECT)["releases"]
    assert len(plain) == 2
    assert set(plain) < set(more)
    assert sum("inside the events" in item for item in more) == 2


def test_what_a_site_refused_is_not_charged() -> None:
    accounts = {"a": [{"round": 1}, {"round": 2, "refused": "E-BUDGET"}], "b": [{"round": 1, "refused": "E-POLICY"}]}
    assert charged(accounts) == {"a": [{"round": 1}]}
