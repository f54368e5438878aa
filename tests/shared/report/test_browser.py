"""The page as a browser shows it: accessibility by axe-core, sizes from phone to paper, nothing fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cotune.shared.cli import run as command
from cotune.shared.errors import JobError, RunFailed
from cotune.shared.report.page import write_report
from cotune.shared.report.pdf import OFFLINE, find_browser

pytestmark = pytest.mark.slow
UNPROTECTED = [
    "people with several records: the unit is one row, and every further row weakens protection",
    "site names, who took part in which round, and when",
    "the job file, with the agreed numbers of records and persons at a site, which is public by design",
    "the base model and what it was trained on before",
    "rounding: sums are floating-point, and attacks on their last bits are made harder, not impossible",
    "what is asked of the model later: prompts are not protected by training",
    "trials: settings tuned by running on the same records again cost more than one run says",
]
KINDS = ("private", "non-private", "broken", "begun")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium that is on this machine, driven by Playwright; skipped where one of the two is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    try:
        program = find_browser()
    except JobError as error:
        pytest.skip(error.message)
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    flags = [flag for flag in OFFLINE if flag.startswith("--disable") or flag.startswith("--host")]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=[*flags, *root])
        yield started
        started.close()


@pytest.fixture
def page_of(build: Callable[..., Any]) -> Callable[[str], Path]:
    """The report of a run of each kind."""

    def make(kind: str) -> Path:
        if kind == "begun":
            return write_report(build().run)
        builder = build(privacy={"level": "none"} if kind == "non-private" else {})
        groups = {"column": "ward", "gap": 0.1, "rows": [
            {"group": name, "examples": count, "accuracy": 0.6, "accuracy_low": 0.5, "accuracy_high": 0.7}
            for name, count in (("north", 200), ("a group with quite a long name", 20))
        ]}  # fmt: skip
        scores = {"examples": 220, "loss": 1.4, "accuracy": 0.6, "accuracy_low": 0.5, "accuracy_high": 0.7}
        builder.rounds(3).finished(final={**scores, "groups": groups}).claimed(unprotected=UNPROTECTED).attacked()
        if kind == "broken":
            builder.run.set_state("failed", 3, RunFailed("E-ATTACK-BOUND", "measured 9.1, claimed 7.8"))
        return write_report(builder.run)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_no_violation(browser, page_of, kind):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(page_of(kind).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = axe.run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]})
    page.close()
    assert [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in found.response["violations"]] == []
    assert len(found.response["passes"]) > 15


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways_and_asks_for_nothing(browser, page_of, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    file = page_of("private").as_uri()
    page.goto(file)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert asked == [file]
    page.close()


def test_the_first_screen_of_a_desk_holds_the_whole_verdict(browser, page_of):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(page_of("private").as_uri())
    box = page.locator("section.verdict").bounding_box()
    assert box["y"] + box["height"] <= 800
    for said in ("Who is protected", "Against whom", "How strongly", "What is not covered", "Tried out"):
        assert page.get_by_text(said, exact=True).first.bounding_box()["y"] < 800
    page.close()


def test_a_phones_first_screen_says_who_against_whom_how_strongly_and_begins_with_what_not(browser, page_of):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(page_of("private").as_uri())
    for said in ("Who is protected", "Against whom", "How strongly", "What is not covered"):
        assert page.get_by_text(said, exact=True).first.bounding_box()["y"] < 800
    page.close()


def test_it_prints_to_pdf_and_the_manifest_knows(page_of, capsys):
    try:
        find_browser()
    except JobError as error:
        pytest.skip(error.message)
    run = page_of("private").parents[1]
    (run / "MANIFEST.json").write_text("{}", encoding="utf-8")
    assert command(["report", str(run), "--pdf", "--json"]) == 0
    printed = Path(json.loads(capsys.readouterr().out)["data"]["pdf"])
    assert printed.read_bytes().startswith(b"%PDF-")
    assert printed.stat().st_size > 20_000
    assert set(json.loads((run / "MANIFEST.json").read_text())) == {"report/index.html", "report/report.pdf"}
