"""The bundle a site accepts is the one Flower packs from ours, and no other."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from cotune.shared.bundle import CODE, MANIFEST, bundle_files, bundle_sha256, require_bundle, write_bundle
from cotune.shared.errors import RefusedError

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of flwr's own build


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bundle as `flwr run` packs it."""
    folder = tmp_path_factory.mktemp("bundle") / "cotune"
    write_bundle(folder)
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_bundle_that_flower_packs_is_accepted(tmp_path: Path) -> None:
    write_bundle(tmp_path / "cotune")
    require_bundle(build_fab_from_disk(tmp_path / "cotune"))


def test_every_run_has_the_same_bundle() -> None:
    assert bundle_files() == bundle_files()
    lines = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(bundle_files().items())
    )
    assert bundle_sha256() == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("name", [CODE, "pyproject.toml", MANIFEST])
def test_a_file_that_differs_by_a_byte_is_refused_by_name(ours: dict[str, bytes], name: str) -> None:
    for changed in (ours[name] + b"\n", ours[name][:-1], b"#" + ours[name][1:]):
        with pytest.raises(RefusedError, match=f"{name} differs") as caught:
            require_bundle(packed({**ours, name: changed}))
        assert (caught.value.code, caught.value.exit_code) == ("E-BUNDLE", 6)


@pytest.mark.parametrize("more", ["evil.py", "sub/flower_app.py", "../flower_app.py", ".info/METADATA"])
def test_a_file_more_is_refused(ours: dict[str, bytes], more: str) -> None:
    with pytest.raises(RefusedError, match="other files"):
        require_bundle(packed({**ours, more: b"x = 1\n"}))


def test_a_file_less_or_twice_is_refused(ours: dict[str, bytes]) -> None:
    for name in ours:
        with pytest.raises(RefusedError, match="other files"):
            require_bundle(packed({n: content for n, content in ours.items() if n != name}))
    buffer = io.BytesIO(packed(ours))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(CODE, b"import os\n")
    with pytest.raises(RefusedError, match="other files"):
        require_bundle(buffer.getvalue())


def test_what_is_no_archive_or_a_damaged_one_is_refused(ours: dict[str, bytes]) -> None:
    whole = packed(ours)
    damaged = whole[:40] + bytes(byte ^ 0xFF for byte in whole[40:60]) + whole[60:]
    for fab in (b"", b"PK", whole[:-30], damaged, b"\0" * 1000):
        with pytest.raises(RefusedError) as caught:
            require_bundle(fab)
        assert caught.value.code == "E-BUNDLE"


def test_a_bomb_is_refused_without_being_unpacked(ours: dict[str, bytes]) -> None:
    with pytest.raises(RefusedError, match="differs"):
        require_bundle(packed({**ours, CODE: bytes(200_000_000)}))
