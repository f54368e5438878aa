"""What every command of `cotune site` has: which home, and how to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cotune.client.home import SiteHome, default_home

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="The site's home; else $COTUNE_SITE, or ~/.local/share/cotune/site.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON envelope.")]


def home_path(home: Path | None) -> Path:
    """The home a command is about."""
    return (home or default_home()).expanduser()


def open_home(home: Path | None) -> SiteHome:
    """The same, opened; errors as for `SiteHome.open`."""
    return SiteHome.open(home_path(home))
