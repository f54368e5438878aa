"""The form of a claim: the schema that ships is that of the code, and nothing else passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.shared.privacy.test_claim import claim_of_two_sites, entries, make_job

from cotune.shared.chain import SignedHead
from cotune.shared.errors import JobError
from cotune.shared.privacy.adversaries import WHO
from cotune.shared.privacy.claim import ClaimSubject, build_claim, claim_bytes
from cotune.shared.privacy.claim_form import json_schema, read_claim
from cotune.shared.privacy.wording import NON_PRIVATE

SHIPPED = resources.files("cotune.shared") / "privacy" / "claim.schema.json"
COORDINATOR = {"public_key": "ssh-ed25519 " + "A" * 68, "simulated": False}


@pytest.fixture(scope="module")
def whole(sign_head: Callable[[str, int], SignedHead]) -> dict[str, Any]:
    heads = {"site-1": sign_head("site-1", 7).model_dump()}
    job = make_job()
    subject = ClaimSubject("run-1", {"a/b": "a" * 64}, None, heads, ("base", "c" * 64), COORDINATOR)
    return json.loads(json.dumps(build_claim(job, {"site-1": entries(job, 2), "site-2": entries(job, 1)}, subject)))


def broken(claim: dict[str, Any], change: Callable[[Any], object]) -> bytes:
    other = json.loads(json.dumps(claim))
    change(other)
    return json.dumps(other).encode()


def test_the_shipped_schema_is_that_of_the_model() -> None:
    """To write it anew: python -c 'from cotune.shared.privacy.claim_form import json_schema; print(json_schema())'."""
    assert SHIPPED.read_text(encoding="utf-8") == json_schema()
    Draft202012Validator.check_schema(json.loads(json_schema()))


def test_a_claim_passes_both_readers_and_comes_back_as_it_is(whole: dict[str, Any]) -> None:
    assert read_claim(claim_bytes(whole)) == whole
    Draft202012Validator(json.loads(json_schema())).validate(whole)


def test_a_red_claim_has_the_form_too() -> None:
    job = make_job(privacy={"level": "none"})
    subject = ClaimSubject("run-1", {}, None, {}, ("base", "c" * 64), COORDINATOR)
    claim = build_claim(job, {"site-1": entries(job, 1)}, subject)
    assert read_claim(claim_bytes(claim))["guarantee"] is None
    assert all(each["epsilon"] is None and not each["tradeoff"] for each in claim["adversaries"])
    assert {each["note"] for each in claim["adversaries"]} == {NON_PRIVATE}


CHANGES: dict[str, Callable[[Any], object]] = {
    "a key too many": lambda c: c.update(certified=True),
    "a key too many inside": lambda c: c["guarantee"].update(sure=True),
    "a key missing": lambda c: c.pop("unprotected"),
    "nothing unprotected": lambda c: c.update(unprotected=[]),
    "negative epsilon": lambda c: c["guarantee"].update(epsilon=-1.0),
    "epsilon as a word": lambda c: c["guarantee"].update(epsilon="1.0"),
    "delta of 1": lambda c: c["guarantee"].update(delta=1.0),
    "a rate above 1": lambda c: c["guarantee"]["tradeoff"].append([0.5, 1.5]),
    "three adversaries": lambda c: c["adversaries"].pop(),
    "a name that is a path": lambda c: c["sites"][0].update(id="../../etc"),
    "a run that is a path": lambda c: c.update(run_id="../run"),
    "an id of another kind": lambda c: c.update(claim_id="md5:0"),
    "another key type": lambda c: c["coordinator"].update(public_key="ssh-rsa AAAA"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_anything_else_is_no_claim_for_both_readers(whole: dict[str, Any], name: str) -> None:
    content = broken(whole, CHANGES[name])
    with pytest.raises(JobError) as caught:
        read_claim(content)
    assert caught.value.code == "E-CLAIM-FORM"
    assert not Draft202012Validator(json.loads(json_schema())).is_valid(json.loads(content))


def test_a_key_that_is_said_twice_and_nan_are_refused(whole: dict[str, Any]) -> None:
    text = json.dumps(whole)
    for content in (
        text.replace('"unit"', '"run_id": "run-1", "unit"', 1),
        text.replace('"delta": ', '"delta": NaN, "d": ', 1),
    ):
        with pytest.raises(JobError) as caught:
            read_claim(content.encode())
        assert caught.value.code == "E-CLAIM-FORM"


def test_a_claim_of_another_version_is_named_with_the_command_that_mends_it(whole: dict[str, Any]) -> None:
    with pytest.raises(JobError) as caught:
        read_claim(broken(whole, lambda claim: claim.update(schema="cotune/privacy-claim/2", new="field")))
    assert caught.value.code == "E-CLAIM-VERSION"
    assert caught.value.message == "this claim is of version 2; this cotune knows 1"
    assert caught.value.hint == "pip install -U cotune"


def test_every_adversary_is_there_once_with_the_figures_of_single_updates() -> None:
    claim = claim_of_two_sites()
    assert tuple(each["who"] for each in claim["adversaries"]) == WHO
    for each in claim["adversaries"]:
        for name in ("epsilon", "delta", "epsilon_without_amplification", "tradeoff"):
            assert each[name] == claim["guarantee"][name]
        assert "at two sites" in each["note"]
    notes = {each["who"]: each["note"] for each in claim["adversaries"]}
    assert "a smaller epsilon may hold; none is claimed" in notes["reader of the released model"]


def test_persons_at_several_sites_are_said_to_be_composed() -> None:
    job = make_job(data={"train": "nowhere", "records_per_site": 30, "sites_per_unit": 2}, federation={"sites": 3})
    subject = ClaimSubject("run-1", {}, None, {}, ("base", "c" * 64), COORDINATOR)
    claim = build_claim(job, {"site-1": entries(job, 1), "site-2": entries(job, 1)}, subject)
    assert all("the 2 costliest sites composed" in each["note"] for each in claim["adversaries"])


def test_the_delta_profile_falls_and_goes_through_the_claimed_pair() -> None:
    from cotune.shared.privacy.accounting import delta_profile
    from cotune.shared.privacy.claim import events_of
    from cotune.shared.privacy.event import DpSgdEvent, NonPrivateEvent

    guarantee, job = claim_of_two_sites()["guarantee"], make_job()
    deltas = [delta for _, delta in guarantee["delta_of_epsilon"]]
    assert deltas == sorted(deltas, reverse=True)
    events = events_of(entries(job, 2))
    [(_, delta)] = delta_profile(events, [guarantee["epsilon"]])
    assert delta == pytest.approx(guarantee["delta"], rel=1e-3)
    gaussian = DpSgdEvent(sampling_probability=1.0, noise_multiplier=1.0, steps=1)
    assert delta_profile([gaussian], [1.0])[0][1] == pytest.approx(0.12693674, abs=1e-7)  # Balle and Wang 2018
    assert delta_profile([NonPrivateEvent()], [1.0]) == [(1.0, 1.0)]
    assert delta_profile([], [1.0]) == [(1.0, 0.0)]
