"""What each part of the page says, from runs of every kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from tests.shared.report.test_page import Page

from cotune.shared.errors import RunFailed
from cotune.shared.files import write_json
from cotune.shared.report.annexes import build_annexes
from cotune.shared.report.card import model_card
from cotune.shared.report.evidence import read_evidence
from cotune.shared.report.groups import build_groups
from cotune.shared.report.page import render
from cotune.shared.report.plainly import plain_answers

ACTING = "north\x1b[2J\x07\u202egnp.exe\u2066\x00"


def scores(*groups: tuple[str, int, float], gap: float = 0.0) -> dict[str, Any]:
    rows = [
        {"group": g, "examples": n, "accuracy": a, "accuracy_low": a - 0.05, "accuracy_high": a + 0.05}
        for g, n, a in groups
    ]
    return {"examples": 400, "loss": 1.4, "accuracy": 0.7, "groups": {"column": "ward", "rows": rows, "gap": gap}}


def all_kinds(build: Callable[..., Any]) -> list[Any]:
    broken = build().rounds(3).finished().claimed().attacked(verdict="broken")
    broken.run.set_state("failed", 3, RunFailed("E-ATTACK-BOUND", "measured 9.1, claimed 7.8"))
    unit = {"data": {"unit": "column:patient", "units_per_site": 300}, "privacy": {"level": "unit"}}
    return [
        build().run,
        build().rounds(1).failed().run,
        build().rounds(3).finished(final=scores(("a", 9, 0.5), ("b", 90, 0.8))).claimed().attacked().run,
        build(privacy={"level": "none"}).rounds(3).finished().claimed().attacked().run,
        build(privacy={"noise": "test"}).rounds(3).finished().claimed().run,
        build(**unit).rounds(3).finished(engine="deployed").claimed().run,
        broken.run,
    ]


def test_every_kind_of_run_has_all_parts_and_is_never_called_what_only_a_regulator_can(build):
    for run in all_kinds(build):
        html = render(run)
        card = model_card(run) if run.state()["status"] != "queued" else ""
        assert not re.search(r"anonym|complian|certif(y|ied)", html + card, re.IGNORECASE)
        page = Page(html)
        idents = {a.get("id") for _, a in page.tags}
        assert {"verdict", "everyone", "officer", "engineer", "dpia", "hipaa", "annex-xi", "iso"} <= idents
        assert [a["href"] for a in page.all("a")] == ["#everyone", "#officer", "#engineer"]


def test_characters_that_act_on_a_reader_are_not_in_the_page(build):
    builder = build().rounds(3).finished(final=scores((ACTING, 9, 0.5)), baselines=[{"name": ACTING}])
    adversary = {"who": ACTING, "sees": ACTING, "note": ACTING, "epsilon": 1.0, "delta": 1e-5, "tradeoff": [[0.1, 0.2]]}
    builder.claimed(adversaries=[adversary], unprotected=[ACTING], statement=ACTING)
    builder.run.emit("site", ACTING, "warn")
    write_json(builder.run.path / "env" / "footprint.json", {"energy_kwh": 1.0, "how": ACTING, "country": ACTING})
    html = render(builder.run)
    assert not set("\x1b\x07\x00\u202e\u2066") & set(html)
    assert Page(html).text.count("north\ufffd[2J") >= 8


def test_an_old_claim_states_no_adversaries_and_the_page_says_so(build):
    text = Page(render(build().rounds(3).finished().claimed(adversaries=[]).run)).text
    assert "Not stated: the claim of this run names no adversaries." in text


def test_each_adversary_has_a_bound_in_odds(whole_run):
    text = Page(render(whole_run)).text
    for who in ("coordinator", "another site", "colluding sites", "reader of the released model"):
        assert re.search(rf"{who} .{{5,80}} 7\.80 at 0\.0001 21\.30 at most 80 of 100", text)


def test_adversaries_of_a_run_without_privacy_have_none(build):
    builder = build(privacy={"noise": "test"}).rounds(3).finished()
    builder.private = True
    text = Page(render(builder.claimed().run)).text
    assert "the global adapters" in text and "no bound" in text and "80 of 100" not in text


def test_groups_say_what_chance_allows_and_which_are_too_small(build):
    run = build(eval={"group_column": "ward"}).rounds(3)
    final = scores(("north", 200, 0.7), ("south", 20, 0.5), gap=0.2)
    run.finished(base=scores(("north", 200, 0.4), ("south", 20, 0.5)), final=final)
    found = build_groups(read_evidence(run.run))
    assert [(row.group, row.base, row.federated, row.few) for row in found.rows] == [
        ("north", "40.0 %", "70.0 %", False),
        ("south", "50.0 %", "50.0 %", True),
    ]
    assert "from 50.0 % (south) to 70.0 % (north); their 95 % intervals do not overlap." in found.sentence
    assert "1 of 2 groups have fewer than 30 rows" in found.sentence
    assert found.gaps == ("base model: 0.0 points", "this run: 20.0 points")
    assert "too few to say much" in Page(render(run.run)).text


def test_without_a_group_column_the_setting_is_named(whole_run):
    assert "eval.group_column" in build_groups(read_evidence(whole_run)).sentence


def test_what_was_not_measured_is_said_with_the_way_to_it(whole_run, build):
    assert "not measured: python -m pip install 'cotune[footprint]'" in Page(render(whole_run)).text
    sites = {"data": {"train": None, "sites": {"a": "site:", "b": "site:"}, "dataset": "notes"}}
    deployed = build(**sites).rounds(3).finished(engine="deployed").claimed().run
    assert "`cotune site status` at each says what its machine used" in Page(render(deployed)).text


def test_what_only_people_can_answer_is_left_to_them(whole_run):
    annexes = {annex.ident: dict(annex.rows) for annex in build_annexes(read_evidence(whole_run))}
    assert set(annexes) == {"dpia", "hipaa", "annex-xi", "iso"}
    for blank in ("(a) Purpose", "(b) Necessity and proportionality", "Residual risk, decision and signature"):
        assert annexes["dpia"][blank] == "(to be filled in by the controller)"
    for blank in ("Expert: name, qualification, experience", "Is the risk very small?", "Date and signature"):
        assert annexes["hipaa"][blank] == "(to be filled in by the expert)"
    assert "epsilon 7.80 at delta 0.0001" in annexes["hipaa"]["Method"]
    assert "30,720 trained numbers" in annexes["annex-xi"]["1(d) Architecture and parameters"]


def test_the_annexes_of_a_run_without_privacy_offer_no_safeguard(build):
    run = build(privacy={"level": "none"}).rounds(3).finished().claimed().run
    annexes = {annex.ident: dict(annex.rows) for annex in build_annexes(read_evidence(run))}
    assert annexes["dpia"]["(d) Measures"].endswith("none")
    assert annexes["hipaa"]["Method"].startswith("none")


def test_in_plain_words_weak_protection_is_not_called_strong(build):
    def answer(curve: list[list[float]]) -> str:
        guarantee = {"epsilon": 1.0, "delta": 1e-4, "tradeoff": curve, "person": []}
        evidence = read_evidence(build().rounds(3).finished().claimed(guarantee=guarantee).run)
        return dict(plain_answers(evidence))["Could somebody find out that I was in the data?"]

    assert answer([[0.2, 0.9]]).startswith("Quite possibly") and "85 times" in answer([[0.2, 0.9]])
    assert answer([[0.4, 0.5]]).startswith("Hardly better than by guessing") and "55 times" in answer([[0.4, 0.5]])
    assert answer([[0.3, 0.7]]).startswith("Better than by guessing") and "70 times" in answer([[0.3, 0.7]])
    assert answer([[0.0, 1.0]]).startswith("Quite possibly") and "100 times" in answer([[0.0, 1.0]])
    run = build(privacy={"level": "none"}).rounds(3).finished().claimed().run
    assert dict(plain_answers(read_evidence(run)))["Could somebody find out that I was in the data?"].startswith("Yes.")


@pytest.mark.parametrize("names", [("coordinator", "site-1"), ()])
def test_who_signed_can_be_checked_without_cotune(whole_run, names):
    folder = whole_run.privacy / "signatures"
    folder.mkdir()
    for name in (*names, "not; a name"):
        (folder / f"{name}.sig").write_text("x")
    text = Page(render(whole_run)).text
    for name in names:
        line = f"-I {name} -n cotune-claim -s privacy/signatures/{name}.sig < privacy/claim.json"
        assert f"ssh-keygen -Y verify -f privacy/allowed_signers {line}" in text
    assert "not; a name" not in text
    assert ("Nobody signed the claim of this run." in text) == (not names)
