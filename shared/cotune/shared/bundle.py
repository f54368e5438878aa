"""Flower's app bundle: the same few lines for every run of one version of cotune.

A site runs nothing of it. It compares what came with a run with what its own installed version makes.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import tomli_w

from cotune.shared.errors import RefusedError
from cotune.shared.plan import cotune_version

CODE, METADATA, MANIFEST = "flower_app.py", "pyproject.toml", ".info/CONTENT"

BUNDLE_CODE = '''"""Flower's door into cotune: all a site has to approve. The rest is the cotune it installed."""

from cotune.simulations.apps import Apps

apps = Apps(bundle_version="{version}")
'''


def bundle_files() -> dict[str, bytes]:
    """The files of this version's bundle by name; which run it is for is said in the run's configuration."""
    version = cotune_version()
    project = {
        "project": {"name": "cotune", "version": version, "description": "cotune", "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "cotune",
                    "fab-include": [f"/{CODE}"],
                    "components": {
                        "serverapp": "flower_app:apps.server",
                        "clientapp": "flower_app:apps.client",
                    },
                    "config": {"job": "", "run-dir": ""},
                }
            }
        },
    }
    return {METADATA: tomli_w.dumps(project).encode(), CODE: BUNDLE_CODE.format(version=version).encode()}


def write_bundle(folder: Path) -> None:
    """Write this version's bundle as the Flower app that `flwr` packs."""
    folder.mkdir(parents=True)
    for name, content in bundle_files().items():
        (folder / name).write_bytes(content)


def bundle_sha256() -> str:
    """SHA-256 over the sorted names and hashes of the bundle's files: what a site is told and approves."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in bundle_files().items()}
    return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()).hexdigest()


def require_bundle(fab: bytes) -> None:
    """Hold a packed bundle that came from outside against this version's, name by name and byte by byte.

    Raises:
        RefusedError: E-BUNDLE: it is no bundle, lacks a file, has one more, or one that differs.
    """
    expected = bundle_files()
    lines = [f"{name},{hashlib.sha256(content).hexdigest()},{8 * len(content)}" for name, content in expected.items()]
    expected[MANIFEST] = "\n".join(lines).encode()
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            names = archive.namelist()
            if sorted(names) != sorted(expected):
                raise _foreign("it holds other files")
            for name, content in expected.items():
                with archive.open(name) as packed:
                    if packed.read(len(content) + 1) != content:  # one byte more: a bomb is not unpacked
                        raise _foreign(f"{name} differs")
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError):
        raise _foreign("it cannot be read") from None


def _foreign(what: str) -> RefusedError:
    return RefusedError(
        "E-BUNDLE",
        f"expected the bundle of cotune {cotune_version()}, {bundle_sha256()[:12]}; of the one that came, {what}",
        hint="run the same version of cotune at the coordinator and at every site",
    )
