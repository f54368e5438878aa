"""A site's ledger as one signed file, with what the site says its budgets have paid for."""

from __future__ import annotations

from pathlib import Path

from cotune.client.budget import account
from cotune.client.home import SiteHome
from cotune.client.site_views import finite
from cotune.shared.exported import ExportedLedger, Spending
from cotune.shared.files import write_atomic
from cotune.shared.plan import cotune_version


def export_ledger(home: SiteHome, file: Path) -> ExportedLedger:
    """Write the ledger, its head, the site's key and its figures to a file, signed.

    Guarantee: the file holds what any coordinator may be given, the ledger's lines, and besides only names and
    budgets of data sets and figures computed from those lines: no path, no record, no count of records.

    Edge cases: data sets that were charged and have left the policy are in it with their events alone.

    Raises:
        StorageError: The file cannot be written.
    """
    head = home.ledger.head
    content = (home.path / "ledger.jsonl").read_bytes()
    lines = content.split(b"\n")[: head.seq]  # another process may have written more since
    spendings = []
    for dataset in home.policy.dataset:
        now = account(home.ledger.entries, dataset)
        spendings.append(
            Spending(
                dataset=dataset.id,
                unit=dataset.unit,
                delta=dataset.budget.delta_total,
                epsilon_total=dataset.budget.epsilon_total,
                epsilon_per_run=dataset.budget.epsilon_per_run,
                epsilon_spent=finite(now.spent),
                runs={run: finite(now.price(events)) for run, events in now.runs.items()},
            )
        )
    exported = ExportedLedger(
        site=home.name,
        public_key=head.public_key,
        simulated=home.is_simulated,
        cotune=cotune_version(),
        head=head,
        spending=tuple(spendings),
        ledger=b"\n".join([*lines, b""]).decode(),
    ).signed(home.ledger.sign)
    write_atomic(file, exported.to_json().encode())
    return exported
