from __future__ import annotations

import json

import pytest

from cotune.shared.cli import run as command
from cotune.shared.errors import RunFailed
from cotune.shared.report.pdf import print_pdf


def test_without_a_browser_the_page_is_written_and_the_way_out_is_said(whole_run, monkeypatch, capsys):
    monkeypatch.setenv("COTUNE_BROWSER", "no-such-browser")
    assert command(["report", str(whole_run.path), "--pdf", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "E-NO-BROWSER" and "no-such-browser" in error["message"]
    assert "COTUNE_BROWSER" in error["hint"]
    assert (whole_run.path / "report" / "index.html").exists()


def test_a_browser_that_prints_nothing_is_an_error(whole_run, monkeypatch):
    monkeypatch.setenv("COTUNE_BROWSER", "false")
    with pytest.raises(RunFailed, match="printed nothing"):
        print_pdf(whole_run.path / "report" / "index.html")


def test_a_report_written_again_leaves_what_was_changed_elsewhere_in_the_manifest(whole_run, capsys):
    whole_run.write_manifest()
    manifest = whole_run.path / "MANIFEST.json"
    before = json.loads(manifest.read_text())
    (whole_run.path / "metrics.jsonl").write_text("")
    assert command(["report", str(whole_run.path)]) == 0
    after = json.loads(manifest.read_text())
    assert after.pop("report/index.html")
    assert after == before
    assert capsys.readouterr().out == f"wrote {whole_run.path}/report/index.html\n"
