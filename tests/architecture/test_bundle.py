"""The Flower bundle is thin: a site that approves it by hash approves two files it can read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDED_BY_FLOWER = {".info/CONTENT", "pyproject.toml"}
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "runs", "dist", "build", "*.fab"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What `flwr build` packs from a copy of this checkout, with data lying about as a user would have it."""
    copy = tmp_path_factory.mktemp("bundle") / "cotune"
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
    (copy / "records.jsonl").write_text('{"text": "never to be packed"}\n', encoding="utf-8")
    (copy / "study").mkdir()
    (copy / "study" / "run.toml").write_text("schema = 1\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", "from flwr.cli.app import app; app()", "build", "--app", str(copy)],
        cwd=copy.parent,
        env={
            **os.environ,
            "FLWR_HOME": str(copy.parent / "flwr-home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [fab] = copy.parent.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_bundle_holds_flowers_door_and_nothing_of_ours_besides(bundle: dict[str, bytes]) -> None:
    assert set(bundle) == {"flower_app.py", *ADDED_BY_FLOWER}


def test_the_door_in_the_bundle_is_the_file_in_this_checkout(bundle: dict[str, bytes]) -> None:
    assert bundle["flower_app.py"] == (ROOT / "flower_app.py").read_bytes()


def test_the_bundle_says_which_version_of_cotune_it_needs(bundle: dict[str, bytes]) -> None:
    packed = tomllib.loads(bundle["pyproject.toml"].decode())
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert packed["project"]["version"] == ours["project"]["version"]
    assert packed["tool"]["flwr"]["app"]["components"] == ours["tool"]["flwr"]["app"]["components"]
