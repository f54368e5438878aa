"""`cotune site files`: what a site's machine needs to keep it running."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cotune.client.site_options import AsJson, HomeOption, open_home
from cotune.shared.cli import show

if TYPE_CHECKING:
    from cotune.client.home import SiteHome
    from cotune.shared.units import Service

TO_GIVE_THE_COURIER_ITS_USER = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID")


def files(
    out: Annotated[Path, typer.Option(help="The folder they are written to.")] = Path("cotune-site-files"),
    user: Annotated[str | None, typer.Option(help="Who the site runs as; else the home's owner.")] = None,
    courier_user: Annotated[
        str | None, typer.Option(help="Who the couriers run as; then the site itself runs as root.")
    ] = None,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Write a hardened systemd unit and a compose file for this site."""
    from cotune.shared.units import compose_text, owner_of, unit_text, write_files

    opened = open_home(home)
    courier = owner_of(opened.path, courier_user) if courier_user else None
    service = service_of(opened, "root" if courier else owner_of(opened.path, user), courier)
    texts = {f"{service.name}.service": unit_text(service)}
    if courier is None:  # a container has one user
        texts["compose.yaml"] = compose_text(service)
    written = write_files(out, texts)
    text = "\n".join([*map(str, written), "each says at its top how it is installed"])
    show({"files": [str(path) for path in written]}, as_json=as_json, text=text)


def service_of(home: SiteHome, user: str, courier_user: str | None) -> Service:
    """`cotune site up` as a service. Where every coordinator has a number for its address, it talks to those alone."""
    from cotune.client.courier_folder import courier_folder
    from cotune.shared.packages import cache_dir
    from cotune.shared.units import Service

    hosts = [each.address.rpartition(":")[0].strip("[]") for each in home.coordinators.all().values()]
    as_courier = ("--courier-user", courier_user) if courier_user else ()
    return Service(
        name="cotune-site",
        description=f"cotune site {home.name}",
        arguments=("site", "up", "--home", str(home.path), *as_courier),
        user=user,
        writable=(home.path, courier_folder(home.path), cache_dir()),
        readable=tuple(home.data_path(dataset) for dataset in home.policy.dataset),
        peers=tuple(hosts) if hosts and all(map(_is_number, hosts)) else None,
        capabilities=TO_GIVE_THE_COURIER_ITS_USER if courier_user else (),
        has_devices=True,
    )


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
