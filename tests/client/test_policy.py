"""A site's policy file, and each of its rules by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.client.budget import account
from cotune.client.policy import Policy, granting, parse_policy, policy_text, protected_unit
from cotune.client.rules import BUDGET_RULES, RULES, Request, first_refusal
from cotune.shared.chain import Entry
from cotune.shared.errors import JobError
from cotune.shared.job import Job
from cotune.shared.privacy.mechanism import mechanism_of
from cotune.shared.signing import public_key_line, sign

KEY = Ed25519PrivateKey.generate()
SIGNER = public_key_line(KEY.public_key())
FILE = Path("policy.toml")
MODEL = "ab" * 32

TWO_DATASETS = """
[site]
name = "st-mary"

[[dataset]]
id = "notes"
path = "/a"
unit = "record"
[dataset.budget]
epsilon_total = 8
epsilon_per_run = 3

[[dataset]]
id = "letters"
path = "/b"
unit = "column:patient"
[dataset.budget]
epsilon_total = 8
epsilon_per_run = 3
"""


def fault(text: str) -> JobError:
    with pytest.raises(JobError) as caught:
        parse_policy(text, FILE)
    assert caught.value.exit_code == 4
    return caught.value


def test_the_text_of_a_policy_reads_back_as_the_policy(make_policy: Any) -> None:
    for policy in (
        make_policy(),
        make_policy(site={"org": 'St "Mary"\n', "contact": "dpo"}, allow={"signers": [SIGNER]}),
    ):
        assert parse_policy(policy_text(policy), FILE) == policy


def test_nothing_is_allowed_that_is_not_written_down() -> None:
    policy = parse_policy(TWO_DATASETS, FILE)
    assert policy.allow.models == ()
    assert policy.approve.mode == "manual"
    assert policy.release.train_metrics == "none"
    assert not policy.site.simulated


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'name = "st-mary"',
            'nmae = "x"',
            "`site.nmae` is not a setting. Did you mean `site.name`? (policy.toml line 3)",
        ),
        ("[site]", "[sites]", "`sites` is not a setting. Did you mean `site`? (policy.toml line 2)"),
        ("[site]", "colour = 1\n[site]", "`colour` is not a setting. Known here: allow, approve, dataset,"),
        ('path = "/b"', 'path = "/b"\nmax_per_units = 3', "`dataset.max_per_unit`? (policy.toml line 16)"),
    ],
    ids=["in a section", "a section", "at the top", "in the second data set"],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_one(old: str, new: str, said: str) -> None:
    error = fault(TWO_DATASETS.replace(old, new))
    assert error.code == "E-POLICY-KEY"
    assert said in error.message
    assert error.hint == "cotune site policy"


def test_the_line_is_that_of_the_right_one_of_several_data_sets() -> None:
    head, _, tail = TWO_DATASETS.rpartition("epsilon_total")
    error = fault(f"{head}epsilon_totl{tail}")
    assert "`dataset.budget.epsilon_totl` is not a setting." in error.message
    assert "Did you mean `dataset.budget.epsilon_total`?" in error.message
    assert "line 18" in error.message


@pytest.mark.parametrize("name", ["gdp", "GDP", "clt", "rdp", "prv", "magic", 3])
def test_only_pld_prices_a_budget_and_every_other_accountant_is_refused_by_name(name: object) -> None:
    literal = f'"{name}"' if isinstance(name, str) else name
    error = fault(TWO_DATASETS.replace("epsilon_per_run = 3", f"epsilon_per_run = 3\naccountant = {literal}", 1))
    assert error.code == "E-POLICY-VALUE"
    assert f"not {str(name)!r}" in error.message
    assert "line 12" in error.message
    if str(name).lower() == "gdp":
        assert "no bound" in error.message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epsilon_total = 8", "epsilon_total = 0"),
        ("epsilon_total = 8", "epsilon_total = nan"),
        ("epsilon_total = 8", "epsilon_total = inf"),
        ("epsilon_total = 8", "epsilon_total = 2"),
        ("epsilon_total = 8", "epsilon_total = 8\ndelta_total = 1.0"),
        ("epsilon_total = 8", "epsilon_total = 8\ndelta_total = 0"),
        ('unit = "record"', 'unit = "person"'),
        ('unit = "record"', 'unit = "record"\nmax_per_unit = 4'),
        ('unit = "column:patient"', 'unit = "column:patient"\nmax_per_unit = 0'),
        ('id = "letters"', 'id = "notes"'),
        ('id = "letters"', 'id = "Le tters"'),
        ('name = "st-mary"', 'name = "St Mary"'),
        ("[site]", 'require.level = "unit"\n[site]'),
        ("[site]", "require.min_noise_multiplier = 0.1\n[site]"),
        ("[site]", 'approve.mode = "auto-within-policy"\n[site]'),
        ("[site]", 'approve.mode = "auto"\n[site]'),
        ("[site]", 'allow.models = ["ab12"]\n[site]'),
        ("[site]", 'allow.methods = ["full"]\n[site]'),
        ("[site]", 'allow.signers = ["alice"]\n[site]'),
        ("[site]", "schema = 2\n[site]"),
    ],
    ids=str,
)
def test_an_impossible_setting_is_refused(old: str, new: str) -> None:
    assert fault(TWO_DATASETS.replace(old, new, 1)).code == "E-POLICY-VALUE"


@pytest.mark.parametrize("text", ["[site", "", '[site]\nname = "st-mary"\n', "dataset = []"])
def test_a_file_that_is_no_policy_is_refused(text: str) -> None:
    assert fault(text).code in ("E-POLICY-SYNTAX", "E-POLICY-VALUE")


def request(policy: Policy, job: Job, entries: tuple[Entry, ...] = (), **changes: Any) -> Request:
    facts: dict[str, Any] = {
        "rounds": job.run.rounds, "model_sha256": MODEL, "signature": None, "coordinators": None,
    }  # fmt: skip
    return Request(job=job, account=account(entries, policy.dataset[0]), **{**facts, **changes})


def refusal(policy: Policy, asked: Request) -> tuple[str, str] | None:
    found = first_refusal({**RULES, **BUDGET_RULES}, policy, policy.dataset[0], asked)
    return (found.rule, found.text) if found else None


RECORDS = {"unit": "record", "units_per_site": None, "max_per_unit": None}

# rule -> what the policy says, what the job says, what comes with it, and what the refusal tells
BROKEN: dict[str, list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]]] = {
    "job.mechanism": [
        ({}, {"privacy": {"noise_multiplier": "auto"}}, {}, "auto"),
        ({}, {"privacy": {"delta": "auto"}}, {}, "auto"),
        ({}, {"privacy": {"noise_multiplier": 0.0}}, {}, "noise_multiplier"),
        ({}, {"privacy": {"noise_multiplier": -1.0}}, {}, "noise_multiplier"),
    ],
    "privacy.none": [({}, {"privacy": {"level": "none"}}, {}, "without noise")],
    "noise.test": [({}, {"privacy": {"noise": "test"}}, {}, '"test"')],
    "allow.models": [
        ({}, {}, {"model_sha256": "cd" * 32}, "sha256:cdcd"),
        ({"allow": {"models": []}}, {}, {}, "list of 0"),
    ],
    "allow.methods": [({"allow": {"methods": []}}, {}, {}, "LoRA")],
    "allow.max_lora_rank": [({}, {"lora": {"r": 17}}, {}, "lora.r = 17 is above 16")],
    "allow.signers": [
        ({"allow": {"signers": [SIGNER]}}, {}, {}, "not signed"),
        ({"allow": {"signers": [SIGNER]}}, {}, {"signature": "forged"}, "no listed signer"),
        ({}, {}, {"coordinators": {"north": SIGNER}}, "coordinator this site has joined is needed"),
        ({}, {}, {"coordinators": {"north": SIGNER}, "signature": "forged"}, "no coordinator this site has joined"),
        ({}, {}, {"coordinators": {}, "signature": "forged"}, "no coordinator this site has joined"),
    ],
    "require.level": [
        ({}, {"privacy": {"level": "example"}}, {}, '"example" promises less than "unit"'),
        ({}, {"privacy": {"level": "example"}, "data": RECORDS}, {}, "promises less"),
    ],
    "require.unit": [
        ({}, {"data": {"unit": "column:visit"}}, {}, "'column:visit'"),
        ({"dataset": {"unit": "record", "max_per_unit": None}}, {}, {}, 'per "record"'),
    ],
    "dataset.max_per_unit": [
        ({}, {"data": {"max_per_unit": 5}}, {}, "is 5; at most 4"),
        ({}, {"data": {"max_per_unit": None}}, {}, "not set; at most 4"),
    ],
    "require.min_sites": [({"require": {"min_sites": 3}}, {}, {}, "min_sites = 2 is below 3")],
    "require.min_noise_multiplier": [
        ({"require": {"min_noise_multiplier": 1.6}}, {}, {}, "1.5 is below 1.6"),
        ({}, {"privacy": {"noise_multiplier": 0.19}}, {}, "0.19 is below 0.2"),
    ],
    "release.train_metrics": [({}, {"privacy": {"metrics": "noised"}, "train": {"batch_size": 40}}, {}, '"none"')],
    "budget.steps": [({}, {"run": {"rounds": 100_000}, "train": {"local_steps": 11}}, {}, "1,100,000 steps")],
    "budget.delta": [({}, {"privacy": {"delta": 1e-4}}, {}, "0.0001 is above 1e-05")],
    "budget.epsilon_per_run": [({"budget": {"epsilon_per_run": 0.5}}, {}, {}, "0.5 is allowed")],
    "budget.epsilon_total": [],  # below: it takes a history
    "dataset.unit": [],
}  # fmt: skip


def test_a_job_within_the_policy_breaks_no_rule(make_policy: Any, ask_job: Any) -> None:
    assert refusal(make_policy(), request(make_policy(), ask_job())) is None


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_refuses_what_breaks_it_and_says_what_was_asked_and_what_is_allowed(
    rule: str, make_policy: Any, ask_job: Any
) -> None:
    for allowed, asked, comes, told in BROKEN[rule]:
        policy = make_policy(**allowed)
        found = refusal(policy, request(policy, ask_job(**asked), **comes))
        assert found is not None
        assert found[0] == rule
        assert told in found[1]


def test_every_rule_has_a_job_that_breaks_it() -> None:
    assert BROKEN.keys() == {**RULES, **BUDGET_RULES}.keys()


def history(job: Job, runs: int, unit: str = "column:patient") -> tuple[Entry, ...]:
    """So many earlier runs of a job on the data set."""
    event = mechanism_of(job).event(job.steps).to_dict()
    return tuple(
        Entry(n, "budget.reserve", {"dataset": "notes", "unit": unit, "run_id": f"old-{n}", "event": event}, "0" * 64)
        for n in range(1, runs + 1)
    )


def test_what_was_spent_before_counts_against_the_total(make_policy: Any, ask_job: Any) -> None:
    policy, job = make_policy(budget={"epsilon_total": 2.0}), ask_job()
    answers = [refusal(policy, request(policy, job, history(job, runs))) for runs in (0, 1, 8)]
    assert answers[:2] == [None, None]
    assert answers[2] is not None
    assert answers[2][0] == "budget.epsilon_total"
    assert "2 is allowed" in answers[2][1]
    assert "spent already" in answers[2][1]


def test_a_data_set_that_has_spent_per_record_takes_no_job_per_person(make_policy: Any, ask_job: Any) -> None:
    policy, job = make_policy(), ask_job()
    found = refusal(policy, request(policy, job, history(job, 1, unit="record")))
    assert found is not None
    assert found[0] == "dataset.unit"


def test_a_listed_signers_signature_of_this_very_job_is_accepted(make_policy: Any, ask_job: Any) -> None:
    policy, job = make_policy(allow={"signers": [f"{SIGNER} alice@consortium"]}), ask_job()
    signature = sign(KEY, "cotune-job", job.sha256().encode())
    assert refusal(policy, request(policy, job, signature=signature)) is None
    other = ask_job(run={"seed": 18})
    for wrong in (
        sign(KEY, "cotune-job", other.sha256().encode()),
        sign(KEY, "cotune-head", job.sha256().encode()),
        sign(Ed25519PrivateKey.generate(), "cotune-job", job.sha256().encode()),
    ):
        found = refusal(policy, request(policy, job, signature=wrong))
        assert found is not None
        assert found[0] == "allow.signers"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_job_that_passes_is_looser_than_the_policy(data: st.DataObject, make_policy: Any, ask_job: Any) -> None:
    draw = data.draw
    rank, noise = draw(st.integers(1, 99)), draw(st.floats(0.2, 9))
    sites, rows = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    policy = make_policy(
        dataset={"max_per_unit": rows},
        allow={"max_lora_rank": rank},
        require={"min_noise_multiplier": noise, "min_sites": sites},
    )
    job = ask_job(
        lora={"r": draw(st.integers(1, 99))},
        federation={"min_sites": draw(st.integers(1, 2))},
        data={
            "max_per_unit": draw(st.none() | st.integers(1, 9)),
            "unit": draw(st.sampled_from(["column:patient", "column:patient", "column:x"])),
        },
        privacy={
            "level": draw(st.sampled_from(["unit", "unit", "unit", "example", "none"])),
            "noise_multiplier": draw(st.floats(0.0, 20.0)),
            "noise": draw(st.sampled_from(["secure", "secure", "test"])),
        },
    )
    if first_refusal(RULES, policy, policy.dataset[0], request(policy, job)) is not None:
        return
    assert job.lora.r <= rank
    assert job.privacy.noise_multiplier >= noise
    assert job.federation.min_sites >= sites
    assert job.data.max_per_unit is not None and job.data.max_per_unit <= rows
    assert (protected_unit(job), job.privacy.noise, job.privacy.level) == ("column:patient", "secure", "unit")


@pytest.mark.parametrize(
    "privacy",
    [{}, {"noise": "test"}, {"level": "none"}, {"level": "example"}, {"metrics": "noised", "clipping": "adaptive"}],
    ids=str,
)
def test_a_simulated_policy_grants_its_job_and_not_a_greater_one(privacy: dict[str, Any], ask_job: Any) -> None:
    job = ask_job(privacy={"epsilon": 6.0, **privacy}, train={"batch_size": 40})
    policy = granting("st-mary", job, MODEL)
    assert policy.site.simulated
    assert policy.dataset[0].budget.epsilon_total == policy.dataset[0].budget.epsilon_per_run == 4 * 6.0
    assert refusal(policy, request(policy, job)) is None
    for greater in (job.replace(run={"rounds": 9999}), job.replace(lora={"r": 99})):
        if privacy != {"level": "none"} or greater.lora.r == 99:
            assert refusal(policy, request(policy, greater)) is not None
    assert refusal(policy, request(policy, job, model_sha256="cd" * 32)) is not None
