from __future__ import annotations

import itertools
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from cotune.shared.errors import JobError
from cotune.shared.report.page import render, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)>`|$x$\\"


class Page(HTMLParser):
    """Checks that tags balance, and collects what the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_one_well_formed_file_that_loads_and_runs_nothing(whole_run):
    path = write_report(whole_run)
    assert path == whole_run.path / "report" / "index.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "img", "form"}
    assert "://" not in html
    for _, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(key) or "#").startswith(("#", "data:,"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_the_page_can_be_read_by_a_screen_reader(whole_run):
    page = Page(render(whole_run))
    assert page.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    tables = len(page.all("table"))
    assert tables == len(page.all("caption")) > 0
    assert all(head.get("scope") in {"row", "col"} for head in page.all("th"))
    assert len(page.all("figure")) == len(page.all("figcaption")) == 4
    identifiers = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert max(identifiers.values()) == 1
    for drawing in page.all("svg"):
        named = drawing.get("role") == "img" and set((drawing["aria-labelledby"] or "").split()) <= set(identifiers)
        assert named or drawing.get("aria-hidden") == "true"
    used = {a["href"] for a in page.all("use")}
    assert used and all(href and href.removeprefix("#") in identifiers for href in used)


def test_the_verdict_says_who_against_whom_how_strongly_and_what_not(whole_run):
    text = Page(render(whole_run)).text
    assert "Each single record of any one site: one JSONL row, cut to 64 tokens." in text
    assert "Everyone outside that site, the coordinator included." in text
    assert "50 are right by chance; with this adapter in hand, the best attack gets at most 80 right." in text
    assert "Each record is protected" in text
    assert "Epsilon 7.80 at delta 0.0001 (target 8.00), when one record is added or removed." in text
    assert "second, independent accountant computes epsilon 7.75" in text
    assert "epsilon 21.30" in text and "epsilon 13.10" in text
    assert "with 2 rows" in text and "the base model" in text
    assert f"cotune verify {whole_run.run_id}" in text
    assert "legal advice" in text


def test_words_that_would_promise_too_much_do_not_occur(build, whole_run):
    for run in (whole_run, build(privacy={"level": "none"}).rounds(3).finished().claimed().run):
        assert not re.search(r"anonym|complian", render(run), re.IGNORECASE)


def test_results_stand_beside_the_base_model_and_baselines(whole_run):
    text = Page(render(whole_run)).text
    assert "Accuracy went from 50.0 % (base model) to 74.0 % (federated); the 95 % intervals do not overlap." in text
    assert "hospital-1 alone" in text and "57.0 to 65.0 %" in text
    assert "744.0 kB" in text


def test_overlapping_intervals_are_said_to_allow_for_chance(build):
    close = {"accuracy": 0.52, "accuracy_low": 0.48, "accuracy_high": 0.56, "loss": 1.9, "examples": 400}
    text = Page(render(build().rounds(3).finished(final=close).run)).text
    assert "overlap: it may be chance" in text


@pytest.mark.parametrize(
    ("privacy", "banner"),
    [({"level": "none"}, "NON-PRIVATE"), ({"noise": "test"}, "TEST NOISE: NOT PRIVATE")],
)
def test_a_run_that_protects_nobody_says_so_above_everything(build, privacy, banner):
    html = render(build(privacy=privacy).rounds(3).finished().claimed().run)
    page = Page(html)
    assert page.text.index(banner) < page.text.index("Privacy and result report", 80)
    assert f"<strong>{banner}</strong>" in html
    assert "This run protects nobody" in page.text
    assert "is protected with epsilon" not in page.text
    assert "Privacy spent by round" not in page.text


@pytest.mark.parametrize("noise", ["secure", "test"])
def test_a_claim_never_overrules_a_record_that_the_run_is_not_private(build, noise):
    builder = build(privacy={"noise": noise}).rounds(3).finished(non_private=True)
    builder.private = True
    text = Page(render(builder.claimed().run)).text
    assert "This run protects nobody" in text
    assert "differentially private for one record" not in text
    assert "7.80" not in text


def test_a_failed_run_reports_what_it_has_and_claims_nothing(build):
    run = build().rounds(1).failed().run
    text = Page(render(run)).text
    assert "Failed: there is no result that may be published." in text
    assert "E-MIN-SITES: 1 of 3 required sites answered" in text
    assert "cotune simulate run.toml" in text
    assert "Nobody: the run ended without a claim." in text
    assert "Spent so far: epsilon 2.60 of 8.00" in text
    assert "(after round 1, not final)" in text
    assert "hospital-2" in text
    assert "PeftModel" not in text


def test_a_run_that_has_only_begun_has_a_report(build):
    text = Page(render(build().run)).text
    assert "Not started" in text
    assert "No round has been measured yet." in text
    assert "No site has reported yet." in text
    assert "The target is epsilon 8.00." in text


@pytest.mark.parametrize("status", ["running", "paused", "cancelled"])
def test_a_run_in_any_state_has_a_report(build, status):
    builder = build().rounds(2)
    builder.run.set_state(status, 2)
    assert f"Status {status}, round 2 of 3." in Page(render(builder.run)).text


def test_a_run_without_accuracy_shows_token_accuracy_and_loss(build):
    scores = {"examples": 9, "loss": 1.5, "token_accuracy": 0.61, "accuracy": None}
    run = build().rounds(3, accuracy=False).finished(base=scores, final=scores).run
    text = Page(render(run)).text
    assert "Token accuracy" in text and "61.0 %" in text
    assert "Loss by round" in text


def test_names_made_to_break_out_are_shown_as_text(build):
    builder = build().rounds(3)
    builder.run.emit("site", HOSTILE, "warn")
    site = {"site": HOSTILE, "epsilon": 1.0, "delta": 1e-4, "steps": 3, "bytes_up": 1, "bytes_down": 1}
    baseline = {"name": HOSTILE, "epsilon": None, "evaluation": {"accuracy": 0.6, "loss": 1.0}}
    model = {"base": HOSTILE, "sha256": HOSTILE, "dequantised": None, "parameters": 3}
    builder.finished(sites=[site], baselines=[baseline], model=model, engine=HOSTILE)
    builder.claimed(statement=HOSTILE, unprotected=[HOSTILE], threat_model={HOSTILE: HOSTILE}, created=HOSTILE)
    page = Page(render(builder.run))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.text.count("<script>alert('x')</script>") >= 8


def test_paths_of_the_machine_stay_out_of_the_page(whole_run):
    html = render(whole_run)
    assert "held-out.jsonl" in html
    assert "/srv/secret" not in html
    assert str(whole_run.path.parent) not in html


def test_equal_records_give_equal_bytes(whole_run):
    first = write_report(whole_run).read_bytes()
    assert write_report(whole_run).read_bytes() == first


def test_warnings_are_listed_and_ordinary_events_are_not(build):
    builder = build().rounds(3).finished().claimed()
    builder.run.emit("site", "hospital-2 did not answer", "warn")
    builder.run.emit("site", "hospital-1 joined", "info")
    text = Page(render(builder.run)).text
    assert "hospital-2 did not answer" in text
    assert "hospital-1 joined" not in text


def test_a_damaged_summary_is_an_error_not_an_empty_report(whole_run):
    (whole_run.path / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(JobError, match=r"summary\.json"):
        write_report(whole_run)


def test_a_person_level_run_speaks_of_persons(build):
    unit = {"data": {"unit": "column:patient", "units_per_site": 300}, "privacy": {"level": "unit"}}
    builder = build(**unit).rounds(3).finished()
    guarantee = {"epsilon": 3.0, "delta": 1e-4, "tradeoff": [[0.01, 0.05]], "adjacency": "zero-out-one", "person": []}
    text = Page(render(builder.claimed(guarantee=guarantee, releases=["a noised update"]).run)).text
    assert "Each person is protected with epsilon 3.00" in text
    assert "when one person is replaced by nothing" in text
    assert "1,000 records of 300 persons" in text
    assert "a noised update" in text
