"""`cotune site up`, `down` and `status`: a site that takes part."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import click
import typer

from cotune.client.site_options import AsJson, HomeOption, home_path
from cotune.shared.cli import show, show_failed


def up(
    courier_user: Annotated[
        str | None, typer.Option(help="Run the couriers as this user, who cannot read the site's home. Needs root.")
    ] = None,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Take part: start the agent and the couriers and keep them running until Ctrl-C, SIGTERM or `site down`."""
    from cotune.client.up import keep_up

    path = home_path(home)
    keep_up(path, courier_user, lambda line: click.echo(line, err=True))
    show({"home": str(path), "state": "stopped"}, as_json=as_json, text=f"{path}: stopped")


def down(
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for it to end.")] = 60.0,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Stop a site that is up. A round that is being trained may be lost, and is then charged once more."""
    from cotune.shared.supervision import stop_running

    path = home_path(home)
    ran = stop_running(path, timeout)
    show({"home": str(path), "ran": ran}, as_json=as_json, text=f"{path}: {'stopped' if ran else 'was not up'}")


def status(home: HomeOption = None, as_json: AsJson = False) -> None:
    """Look at all a site needs: data, budget, disk, device, agent, federations. Exit code 1 if a check fails."""
    from cotune.client.status import checks, error_of, faults, text_of

    found = list(checks(home_path(home)))
    data, text = {"checks": [asdict(each) for each in found]}, text_of(found)
    if not faults(found):
        show(data, as_json=as_json, text=text)
        return
    show_failed(error_of(found), data, as_json=as_json, text=text)
