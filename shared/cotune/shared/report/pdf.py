"""The report as PDF, printed by a Chromium that is there already."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from cotune.shared.errors import JobError, RunFailed

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
BROWSER = "COTUNE_BROWSER"
OFFLINE = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-quic", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--no-pdf-header-footer",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
TIMEOUT_S = 120


def find_browser() -> str:
    """The program that prints: what COTUNE_BROWSER names, or a Chromium on the path.

    Raises:
        JobError: There is none (E-NO-BROWSER).
    """
    named = os.environ.get(BROWSER)
    found = next(filter(None, map(shutil.which, (named,) if named else NAMES)), None)
    if found is None:
        raise JobError(
            "E-NO-BROWSER",
            f"expected a Chromium to print with, found {f'no `{named}`' if named else 'none on the path'}",
            param="--pdf",
            hint=f"install Chromium, or set {BROWSER}; or open the HTML page in any browser and print it to a file",
        )
    return found


def print_pdf(page: Path) -> Path:
    """Print a report beside itself as ``report.pdf``. The browser is given no network and an empty profile.

    Raises:
        JobError: There is no browser.
        RunFailed: It printed nothing (E-PDF).
    """
    browser, target = find_browser(), page.with_name("report.pdf")
    root = os.geteuid() == 0  # Chromium's sandbox does not start for root
    with tempfile.TemporaryDirectory(prefix="cotune-print-") as folder:
        printed = Path(folder) / "report.pdf"
        profile = f"--user-data-dir={folder}/profile"
        command = [browser, *OFFLINE, *(["--no-sandbox"] if root else []), profile, f"--print-to-pdf={printed}"]
        try:
            done = subprocess.run(
                [*command, page.resolve().as_uri()], capture_output=True, timeout=TIMEOUT_S, check=False
            )
            code: object = done.returncode
        except subprocess.TimeoutExpired:
            code = f"none within {TIMEOUT_S} s"
        if not printed.exists():
            raise RunFailed("E-PDF", f"{browser} printed nothing (exit code {code})", hint=f"open {page} and print it")
        target.unlink(missing_ok=True)
        shutil.copyfile(printed, target)
    return target
