from __future__ import annotations

import json

import pytest
from tests.shared.report.conftest import attacked
from tests.shared.report.test_page import Page

from cotune.shared.errors import JobError, RunFailed
from cotune.shared.report.attack_charts import exposure_chart, leak_chart, membership_chart
from cotune.shared.report.attacks import build_attacks, measured_charts
from cotune.shared.report.evidence import read_evidence
from cotune.shared.report.page import render
from cotune.shared.report.wording import ABSENT


def attacks_of(run):
    return build_attacks(read_evidence(run))


def test_a_run_that_was_not_attacked_says_so_and_how_to(whole_run):
    page = Page(render(whole_run))
    assert attacks_of(whole_run).standing == "not run"
    assert "No attack was run on this result" in page.text
    assert f"cotune attack {whole_run.run_id}" in page.text


def test_what_was_measured_stands_beside_what_is_claimed(build):
    run = build().rounds(3).finished().claimed().attacked().run
    found = attacks_of(run)
    assert found.standing == "not refuted"
    assert "at least epsilon 0.40 (95 % confidence); claimed is at most 7.80: within the claim" in found.sentence
    assert "0 of 10 came out of this model; from the same training without privacy, 9 of 10" in found.sentence
    (bound,) = found.bounds
    assert (bound.lower, bound.most, bound.claimed, bound.holds) == ("0.40", "2.55", "7.80", True)
    assert "Its 40 guesses were too few to refute such a claim." in found.sentence
    assert ("Planted secrets that came out", "0 of 10", "9 of 10") in [(p.what, p.run, p.control) for p in found.pairs]
    (secret,) = found.secrets
    assert (secret.run_told, secret.control_told) == (False, True)
    text = Page(render(run)).text
    assert (
        "Nothing was found against the claim." in text
        and "the secret came out" in text
        and "a weaker attack may have had luck" in text
    )
    assert [chart.ident for chart in measured_charts(read_evidence(run))] == ["membership", "exposure", "leak"]


@pytest.mark.parametrize("how", ["verdict", "state"])
def test_a_claim_that_an_attack_broke_is_not_repeated(build, how):
    builder = build().rounds(3).finished().claimed()
    builder.attacked(verdict="broken") if how == "verdict" else builder.attacked()
    if how == "state":
        builder.run.set_state("failed", 3, RunFailed("E-ATTACK-BOUND", "measured 9.1, claimed 7.8"))
    page = Page(render(builder.run))
    assert page.text.index("BROKEN BY ATTACK", 30) < page.text.index("Privacy and result report", 80)
    assert "The privacy claim does not hold" in page.text
    assert "Each record is protected" not in page.text
    assert "differentially private for one record" not in page.text
    assert "The claim is broken." in page.text


def test_a_broken_run_whose_results_are_gone_still_says_what_was_measured(build):
    builder = build().rounds(3).finished().claimed()
    builder.run.set_state("failed", 3, RunFailed("E-ATTACK-BOUND", "measured 9.1, claimed 7.8"))
    text = Page(render(builder.run)).text
    assert "BROKEN BY ATTACK" in text and "measured 9.1, claimed 7.8" in text


def test_results_of_another_claim_are_not_shown_as_this_ones(build):
    run = build().rounds(3).finished().claimed().attacked(claim_id="sha256:other").run
    assert attacks_of(run).standing == "not run"
    assert "results of an attack on another run or claim" in Page(render(run)).text
    assert "PIN 4711" not in render(run)


def test_half_an_attack_is_shown_as_far_as_it_goes(build):
    bare = {"canaries": None, "audit": [], "exposure": None, "membership": None, "secrets": None}
    run = build().rounds(3).finished().claimed().attacked(run=bare, control=None, leakage=None, limits=[]).run
    assert "An attack was run" in Page(render(run)).text
    assert measured_charts(read_evidence(run)) == ()


def test_an_attack_that_could_test_no_claim_is_not_said_to_have_held(build):
    builder = build().rounds(3).finished().claimed()
    for verdict in ("not tested", "nothing claimed", "a later word"):
        found = attacks_of(builder.attacked(verdict=verdict).run)
        assert found.standing == "not tested"
    assert "The claim was not tested." in Page(render(builder.run)).text


@pytest.mark.parametrize(("guesses", "most"), [(0, "–"), (1, "0.00"), (10, "1.05"), (100, "3.49"), (500, "5.11")])  # noqa: RUF001
def test_what_so_many_guesses_can_prove_is_known_before(build, guesses, most):
    results = attacked(0.0, 0.5, 0, 7.8)
    results["audit"][0] |= {"guesses": guesses, "right": 0}
    found = attacks_of(build().rounds(3).finished().claimed().attacked(run=results, control=None).run)
    assert found.bounds[0].most == most
    assert "No attack could prove a leak; claimed is at most 7.80: within the claim." in found.sentence


def test_a_run_without_privacy_shows_what_came_out_of_it(build):
    text = Page(render(build(privacy={"level": "none"}).rounds(3).finished().claimed().attacked().run)).text
    assert "Nothing was claimed." in text and "nothing was claimed" in text


def test_damaged_results_are_an_error_by_name(whole_run):
    (whole_run.path / "attack").mkdir()
    for damaged in ("{", "[1]", "[" * 100_000):
        (whole_run.path / "attack" / "results.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(JobError, match=r"results\.json"):
            render(whole_run)


def test_hostile_words_in_results_stay_words(build):
    hostile = "<script>alert(1)</script>\x1b[2J\u202egnp.exe"
    builder = build().rounds(3).finished().claimed().attacked()
    path = builder.run.path / "attack" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["limits"] = [hostile]
    results["leakage"]["note"] = hostile
    results["run"]["audit"][0] |= {"adversary": hostile, "method": hostile}
    results["run"]["secrets"]["examples"] = [{"prompt": hostile, "secret": hostile, "said": hostile}]
    results["control"]["run_id"] = hostile
    path.write_text(json.dumps(results), encoding="utf-8")
    html = render(builder.run)
    assert "script" not in {tag for tag, _ in Page(html).tags}
    assert Page(html).text.count("<script>alert(1)</script>") >= 7
    assert not {"\x1b", "\u202e"} & set(html)


def test_the_curves_meet_the_table():
    chart = membership_chart([(0.1, 0.3)], [], [(0.1, 0.6), (0.5, 0.9)])
    assert chart is not None
    by_rate = {row[0]: row[1:] for row in chart.rows}
    assert by_rate["10.0 %"] == ("30.0 %", ABSENT, "60.0 %")
    assert by_rate["5.0 %"] == ("15.0 %", ABSENT, "30.0 %")
    assert "finds 30.0 % of the members; the claim allows 60.0 %." in chart.caption
    assert membership_chart([], [], []) is None


def test_exposure_is_counted_in_shares():
    chart = exposure_chart({"values": [0.0, 1.0, 12.0, 12.0], "mean": 6.25, "chance_mean": 1.44}, {})
    assert chart is not None
    assert [row[1] for row in chart.rows][:2] == ["25.0 %", "25.0 %"]
    assert chart.rows[-1] == ("11.0 to 12.0", "50.0 %", ABSENT)
    assert exposure_chart({"values": []}, {}) is None


def test_a_leak_without_figures_is_not_drawn():
    assert leak_chart({}) is None
    assert leak_chart({"recovered_without_dp": 0.9}) is None
