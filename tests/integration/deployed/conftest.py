"""One federation for all slow tests of deployment: they are one story, told in the order of their files."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.integration.deployed.federation import federation
from tests.integration.deployed.run_faults import DISKS
from tests.integration.deployed.story import Story
from tests.integration.deployed.study import SITES, simulated_adapter, write_job, write_records
from tests.integration.killed_study import tiny_model

from cotune.shared.jobfile import load_job
from cotune.shared.model import locate


@pytest.fixture(scope="package")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Three sites that have joined and are up, with machines to spare, and a recorder on the line."""
    folder = tmp_path_factory.mktemp("deployed")
    os.environ["COTUNE_CACHE"] = str(folder / "cache")
    records = {site: write_records(folder / "records", site) for site in SITES}
    job = write_job(folder / "job", tiny_model(folder / "model"), records)
    expected, wiretap = simulated_adapter(job), folder / "wiretap"
    sha256 = locate(load_job(job)).sha256
    with federation(folder, sha256, spare=("site-4", "stranger", "rival"), record=wiretap, disks=DISKS) as made:
        yield Story(folder, made, job, expected, wiretap)
