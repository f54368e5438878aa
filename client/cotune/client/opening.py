"""Opening a new site: its data set is checked, then its home made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.client.checks import Finding, RecordFile, check_file, check_units, read_file, unit_error
from cotune.client.data import unit_of
from cotune.client.home import SiteHome, taken
from cotune.client.policy import POLICY_FILE, DatasetPolicy
from cotune.shared.errors import PrivacyError
from cotune.shared.homes import refuse_taken
from cotune.shared.jobfile import validate
from cotune.shared.records import bad_rows


def open_new_site(
    home: Path, site: Mapping[str, Any], dataset: Mapping[str, Any], models: Sequence[str] = ()
) -> tuple[SiteHome, list[Finding]]:
    """Check a data set and make the home of a site that holds it; what the checks found beside errors.

    Args:
        home: Where; nothing may be there yet.
        site: Settings of `SiteSection`: its public name, and whether it is a simulated one.
        dataset: Settings of `DatasetPolicy`.
        models: Base models that jobs may use, see `AllowSection`.

    Raises:
        JobError: A setting is impossible, or there is something at `home`.
        DataError: A row cannot be used, or is nobody's (E-UNIT).
        PrivacyError: delta_total would let one unit be published whole.
    """
    settings = {"site": dict(site), "dataset": [dataset], "allow": {"models": list(models)}}
    policy = validate(settings, POLICY_FILE, origin="cotune site init")
    refuse_taken(home, taken(home))
    findings = _checked(policy.dataset[0])
    return SiteHome.create(home, policy), findings


def _checked(dataset: DatasetPolicy) -> list[Finding]:
    file = read_file(Path(dataset.path))
    if file.faults:
        raise bad_rows(file.path, file.faults, len(file.records))
    findings = check_file(file)
    if dataset.unit_column:
        findings += check_units(file, dataset.unit_column, dataset.max_per_unit)
        error = unit_error(file.path, findings, dataset.unit_column)
        if error:
            raise error
    _check_delta(dataset, file)
    return [finding for finding in findings if finding.level != "info" or finding.code == "I-UNIT"]


def _check_delta(dataset: DatasetPolicy, file: RecordFile) -> None:
    column, delta = dataset.unit_column, dataset.budget.delta_total
    records = file.records.values()
    units = len({unit_of(record, column, row) for row, record in enumerate(records)}) if column else len(records)
    if delta * units >= 1:
        raise PrivacyError(
            "E-DELTA",
            f"delta_total = {delta:g} is not below 1 over the units of the data set: one could be published whole",
            param="delta_total",
            hint=f"--delta-total {0.1 / units:.1g}",
        )
