"""What to expect before any data is touched: the noise is that of the job, the advice is computed, never canned."""

import math
from typing import Any

import pytest

from cotune.shared.errors import PrivacyError
from cotune.shared.methods import layout_of
from cotune.shared.model import locate
from cotune.shared.outlook import outlook
from cotune.shared.planning import costs_by_person, resolve, solve
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.group import epsilon_group
from cotune.shared.privacy.mechanism import mechanism_of

UNIT = {"unit": "column:patient", "units_per_site": 20}


def expected(job: Any) -> Any:
    base = locate(job)
    return outlook(job, base, layout_of(job, base)[0].size)


def test_noise_to_signal_is_the_norm_of_the_noise_of_the_mean_over_the_clipping_norm(make_job: Any) -> None:
    job = make_job(privacy={"noise_multiplier": 2.0, "delta": 1e-3}, lora={"r": 1, "target_modules": ["v_proj"]})
    size = layout_of(job, locate(job))[0].size
    found = expected(job)
    assert found.step == pytest.approx(2.0 * math.sqrt(size) / (10 * math.sqrt(3)))
    assert found.run == pytest.approx(found.step / math.sqrt(job.steps))


@pytest.mark.slow
def test_advice_is_what_the_changed_job_really_has_at_the_same_epsilon(make_job: Any) -> None:
    job = resolve(make_job(train={"batch_size": 5}))
    found = {advice.settings: advice.noise_to_signal for advice in expected(job).advice}
    assert "train.batch_size=10" in found and "federation.sites=6" in found and "lora.r=1" in found
    changed = resolve(job.replace(train={"batch_size": 10}, privacy={"noise_multiplier": "auto"}))
    assert found["train.batch_size=10"] == pytest.approx(expected(changed).run, rel=1e-6)
    assert found["federation.sites=6"] == pytest.approx(expected(job).run / math.sqrt(2))
    assert list(found.values()) == sorted(found.values())
    assert max(found.values()) <= 0.9 * expected(job).run


def test_a_job_without_privacy_has_no_noise_to_speak_of(make_job: Any) -> None:
    assert expected(make_job(privacy={"level": "none"})) is None


def test_each_of_noise_rounds_and_epsilon_follows_from_the_other_two(make_job: Any) -> None:
    job = make_job(run={"rounds": 3})
    resolved = resolve(job)
    noise = float(solve(job, "noise").removeprefix("privacy.noise_multiplier="))
    assert noise == pytest.approx(resolved.privacy.noise_multiplier, rel=1e-4)
    fixed = job.replace(privacy={"noise_multiplier": resolved.privacy.noise_multiplier})
    assert solve(fixed, "rounds") == "run.rounds=3"
    cost = float(solve(fixed, "epsilon").removeprefix("privacy.epsilon="))
    assert 0 <= cost - epsilon([mechanism_of(resolved).event(resolved.steps)], resolved.privacy.delta) <= 1e-4
    for what in ("rounds", "epsilon"):
        with pytest.raises(PrivacyError, match="needs a noise multiplier"):
            solve(job, what)


def test_people_with_more_records_pay_more_unless_they_are_the_unit(make_job: Any) -> None:
    rows = resolve(make_job(data={**UNIT, "max_per_unit": 4}))
    costs = costs_by_person(rows)
    events = [mechanism_of(rows).event(rows.steps)]
    assert list(costs) == [1, 2, 4]
    assert costs[1] == epsilon(events, rows.privacy.delta) <= 8.0
    assert costs[4] == epsilon_group(events, rows.privacy.delta, 4) > costs[2] > 2 * costs[1]
    persons = costs_by_person(resolve(make_job(data=UNIT, privacy={"level": "unit"})))
    assert set(persons) == {1, 2, 4, 8} and len(set(persons.values())) == 1
    assert persons[8] <= 8.0


def test_a_person_at_two_sites_is_promised_the_same_epsilon_for_both_together(make_job: Any) -> None:
    one = resolve(make_job(data=UNIT, privacy={"level": "unit"}))
    two = resolve(make_job(data={**UNIT, "sites_per_unit": 2}, privacy={"level": "unit"}))
    delta = float(two.privacy.delta)
    assert two.privacy.noise_multiplier > one.privacy.noise_multiplier
    assert epsilon([mechanism_of(two).event(2 * two.steps)], delta) <= 8.0
