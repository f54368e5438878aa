"""The plan's epsilon is the reference's, and the claim's of the same run."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cotune.shared.codec import encoded_bytes
from cotune.shared.errors import PrivacyError
from cotune.shared.model import locate
from cotune.shared.planning import epsilon_by_round, make_plan, resolve
from cotune.shared.privacy.claim import ClaimSubject, build_claim
from cotune.shared.privacy.mechanism import mechanism_of

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "accounting.json").read_text(encoding="utf-8")
)["vectors"]
QUICK = {"V08", "V18"}  # the other claims take seconds each


def job_of(vector: dict[str, Any], make_job: Any) -> Any:
    """A job whose sampling, noise, steps and delta are a reference vector's, in several rounds."""
    ratio = Fraction(vector["q"]).limit_denominator(60_000)
    assert float(ratio) == vector["q"]
    rounds = 2 if vector["steps"] % 2 == 0 and vector["steps"] <= 600 else 1
    return make_job(
        run={"rounds": rounds},
        data={"records_per_site": ratio.denominator},
        train={"batch_size": ratio.numerator, "local_steps": vector["steps"] // rounds},
        privacy={"epsilon": 100.0, "delta": vector["delta"], "noise_multiplier": vector["sigma"]},
    )


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_the_plan_costs_what_the_reference_says(vector: dict[str, Any], make_job: Any) -> None:
    job = resolve(job_of(vector, make_job))
    plan = make_plan(job, locate(job))
    assert plan.epsilon_by_round[-1] == pytest.approx(vector["eps"]["dp_accounting_pld"], rel=1e-6)
    assert len(plan.epsilon_by_round) == job.run.rounds
    assert all(earlier < later for earlier, later in pairwise(plan.epsilon_by_round))
    assert (plan.steps, plan.noise_multiplier, plan.delta, plan.sampling_probability) == (
        vector["steps"],
        vector["sigma"],
        vector["delta"],
        vector["q"],
    )


@pytest.mark.parametrize(
    "vector",
    [pytest.param(v, id=v["id"], marks=[] if v["id"] in QUICK else [pytest.mark.slow]) for v in VECTORS],
)
def test_the_claim_of_the_same_run_costs_exactly_what_the_plan_said(vector: dict[str, Any], make_job: Any) -> None:
    job = resolve(job_of(vector, make_job))
    event = mechanism_of(job).event(job.train.local_steps).to_dict()
    ledger = [{"round": number, "event": event} for number in range(1, job.run.rounds + 1)]
    claim = build_claim(job, {"site-1": ledger, "site-2": ledger}, ClaimSubject("run", {}, None, {}, ("", ""), {}))
    assert claim["guarantee"]["epsilon"] == epsilon_by_round(job)[-1]
    assert claim["sites"][0]["steps"] == vector["steps"]


def test_auto_settings_become_numbers_that_keep_the_budget(make_job: Any) -> None:
    job = resolve(make_job(privacy={"epsilon": 2.0}, simulation={"workers": "auto", "threads": "auto"}))
    assert job.privacy.delta == pytest.approx(1 / 300)
    assert isinstance(job.privacy.noise_multiplier, float)
    assert 0.995 * 2 <= epsilon_by_round(job)[-1] <= 2
    assert 1 <= int(job.simulation.workers) <= 3
    assert int(job.simulation.threads) >= 1


def test_resolving_twice_changes_nothing(make_job: Any) -> None:
    once = resolve(make_job(privacy={"epsilon": 2.0}, simulation={"workers": "auto", "threads": "auto"}))
    assert resolve(once).to_json() == once.to_json()


def test_a_job_without_privacy_keeps_its_autos_and_plans_no_epsilon(make_job: Any) -> None:
    job = resolve(make_job(privacy={"level": "none"}))
    plan = make_plan(job, locate(job))
    assert job.privacy.noise_multiplier == "auto"
    assert (plan.noise_multiplier, plan.delta, plan.epsilon_by_round) == (None, None, ())


@pytest.mark.parametrize("delta", [1 / 30, 0.05, 0.5, 1.0, 2.0, 0.0, -1e-3])
def test_a_delta_at_which_a_record_could_be_published_whole_is_refused(make_job: Any, delta: float) -> None:
    with pytest.raises(PrivacyError) as caught:
        resolve(make_job(privacy={"delta": delta, "noise_multiplier": 5.0}))
    assert (caught.value.code, caught.value.param) == ("E-DELTA", "privacy.delta")


def test_a_delta_just_below_one_over_the_records_is_taken_as_it_is(make_job: Any) -> None:
    delta = math.nextafter(1 / 30, 0)
    assert resolve(make_job(privacy={"delta": delta, "noise_multiplier": 5.0})).privacy.delta == delta


def test_too_little_noise_for_the_promised_epsilon_is_refused(make_job: Any) -> None:
    with pytest.raises(PrivacyError) as caught:
        resolve(make_job(privacy={"epsilon": 1.0, "noise_multiplier": 0.8}))
    assert (caught.value.code, caught.value.param) == ("E-BUDGET-IMPOSSIBLE", "privacy.noise_multiplier")


def test_more_noise_than_needed_is_kept(make_job: Any) -> None:
    assert resolve(make_job(privacy={"epsilon": 1.0, "noise_multiplier": 50.0})).privacy.noise_multiplier == 50


def test_a_budget_no_noise_reaches_is_refused_with_the_way_out(make_job: Any) -> None:
    with pytest.raises(PrivacyError) as caught:
        resolve(make_job(privacy={"epsilon": 1e-3, "delta": 1e-10}, train={"local_steps": 500}))
    assert caught.value.code == "E-BUDGET-IMPOSSIBLE"


def test_plan_sizes_follow_from_the_adapter_and_need_no_data(make_job: Any, tmp_path: Path) -> None:
    job = resolve(make_job(data={"train": str(tmp_path / "nowhere.jsonl")}, privacy={"noise_multiplier": 3.0}))
    plan = make_plan(job, locate(job))
    assert plan.trained_parameters == 2 * 2 * (32 + 16), "B of q_proj and v_proj in two layers, rank 2"
    assert plan.bytes_up >= 4 * plan.trained_parameters
    assert plan.bytes_down > plan.bytes_up
    assert plan.base_parameters > 10_000
    assert plan.memory_bytes > 4 * plan.base_parameters
    assert plan.seconds_estimate > 0
    json.dumps(plan.to_dict(), allow_nan=False)


def test_training_both_matrices_makes_the_plan_larger(make_job: Any) -> None:
    frozen, both = (
        make_plan(job, locate(job))
        for job in (
            resolve(make_job(aggregation={"rule": rule}, privacy={"noise_multiplier": 3.0}))
            for rule in ("ffa", "fedavg_ab")
        )
    )
    assert both.trained_parameters == frozen.trained_parameters + 2 * 2 * (32 + 32)
    assert both.bytes_up - frozen.bytes_up == 4 * (both.trained_parameters - frozen.trained_parameters)


@pytest.mark.parametrize(("way", "codec"), [("up", "int4"), ("up", "topk"), ("down", "bf16"), ("down", "int8")])
def test_planned_bytes_are_those_of_the_jobs_codecs(make_job: Any, way: str, codec: str) -> None:
    plain, coded = (
        make_plan(job, locate(job))
        for job in (
            resolve(make_job(transport={f"codec_{way}": name}, privacy={"noise_multiplier": 3.0}))
            for name in ("fp32", codec)
        )
    )
    saved = 4 * plain.trained_parameters - encoded_bytes(codec, plain.trained_parameters)
    assert plain.trained_parameters == coded.trained_parameters
    other = {"up": "down", "down": "up"}[way]
    assert getattr(plain, f"bytes_{way}") - getattr(coded, f"bytes_{way}") == pytest.approx(saved, abs=2)
    assert getattr(plain, f"bytes_{other}") == pytest.approx(getattr(coded, f"bytes_{other}"), abs=2)


def test_factors_that_take_turns_travel_up_one_at_a_time_and_control_variates_down(make_job: Any) -> None:
    def plan_of(**sections: Any) -> Any:
        job = resolve(make_job(privacy={"noise_multiplier": 3.0}, **sections))
        return make_plan(job, locate(job))

    both, turns = (plan_of(aggregation={"rule": rule}) for rule in ("fedavg_ab", "alternating_rounds"))
    assert both.bytes_up - turns.bytes_up == 4 * 2 * 2 * (32 + 16), "A has more numbers here, B rests"
    assert abs(both.bytes_down - turns.bytes_down) < 16, "but for the rule's name"
    plain, scaffold = (plan_of(train={"scaffold": value}) for value in (False, True))
    assert scaffold.bytes_down - plain.bytes_down == pytest.approx(4 * plain.trained_parameters, abs=2)
    assert scaffold.bytes_up == plain.bytes_up


def test_a_cap_of_rounds_a_site_is_what_its_people_pay_for(make_job: Any) -> None:
    federation = {"sites": 3, "selection": "random", "sites_per_round": 1}
    jobs = [
        resolve(make_job(run={"rounds": 6}, federation={**federation, "max_rounds_per_site": most}))
        for most in (None, 2)
    ]
    every, capped = (make_plan(job, locate(job)) for job in jobs)
    assert (every.steps, capped.steps) == (6 * 2, 2 * 2)
    assert (len(every.epsilon_by_round), len(capped.epsilon_by_round)) == (6, 2)
    assert capped.epsilon_by_round[-1] <= 8.0
    assert capped.noise_multiplier < 0.8 * every.noise_multiplier, "with it, sites need less noise"
