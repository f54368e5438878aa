from __future__ import annotations

import json

import pytest

from cotune.shared.errors import JobError
from cotune.shared.files import file_sha256, write_json
from cotune.shared.report.renewal import renew


def test_cards_report_and_manifest_tell_of_what_became_known(build):
    builder = build().rounds(3).finished().claimed()
    run = builder.run
    for folder in (run.adapter, run.personal / "north"):
        folder.mkdir(parents=True)
        write_json(folder / "adapter_config.json", {})
    run.write_manifest()
    builder.attacked()
    renew(run)
    files = (run.adapter / "README.md", run.personal / "north" / "README.md", run.path / "report" / "index.html")
    assert all("0 of 10 came out of this model" in file.read_text() for file in files)
    assert "adapter of north" in files[1].read_text()
    manifest = json.loads((run.path / "MANIFEST.json").read_text())
    assert all(manifest[str(file.relative_to(run.path))] == file_sha256(file) for file in files)
    assert "attack/results.json" in manifest


def test_a_run_without_adapter_or_manifest_gets_a_report_alone(build):
    run = build().rounds(1).failed().run
    renew(run)
    assert (run.path / "report" / "index.html").exists()
    assert not run.adapter.exists() and not (run.path / "MANIFEST.json").exists()


def test_a_damaged_file_leaves_everything_as_it_was(whole_run):
    renew(whole_run)
    before = (whole_run.path / "report" / "index.html").read_bytes()
    (whole_run.path / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(JobError):
        renew(whole_run)
    assert (whole_run.path / "report" / "index.html").read_bytes() == before
