"""Adapters of single sites: one plain PEFT folder each, under `personal/`, where a rule leaves B to the sites."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load_file

from cotune.server.aggregation.fedsa import own_adapter
from cotune.server.aggregation.updates import Updates
from cotune.server.evaluation import GlobalEvaluator
from cotune.shared.adapter import Vector
from cotune.shared.files import storage_errors
from cotune.shared.methods import save
from cotune.shared.runs import RunFolder

if TYPE_CHECKING:
    from cotune.shared.evaluation import Evaluation

UNSCORED = "rounds before the last are not scored: sites keep their B, and A without B is the base model"
STANDS_IN = "adapter/ has the mean of the sites' own B: for a site that did not take part"


def save_personal(
    run: RunFolder, joined: Mapping[str, Vector], updates: Updates, config: Mapping[str, Any], sites: Sequence[str]
) -> None:
    """Write the adapter of every site that answered in the last round, and say who did not.

    This comes before the round's checkpoint, so that whoever goes on from that finds them.

    Args:
        run: Whose.
        joined: The state after the last round.
        updates: Of that round, read one site at a time.
        config: The PEFT configuration of the adapter.
        sites: All that there are.

    Raises:
        StorageError: The disk is full.
    """
    with storage_errors(run.personal):
        shutil.rmtree(run.personal, ignore_errors=True)  # of a last round that was interrupted
        run.personal.mkdir()
    for site in updates.sites:
        save(run.personal / site, own_adapter(joined, updates, site), config, f"# {site} of {run.run_id}\n")
    for site in sorted(set(sites) - set(updates.sites)):
        run.emit("site", f"{site}: no update in the last round, so it has no adapter of its own", "warn", site=site)


def score_personal(run: RunFolder, evaluator: GlobalEvaluator) -> dict[str, Evaluation]:
    """Each site's adapter on all public evaluation rows, one after the other; empty without such rows."""
    found: dict[str, Evaluation] = {}
    for folder in sorted(run.personal.iterdir()) if evaluator.has_data else ():
        run.emit("evaluation", f"scoring the adapter of {folder.name}", site=folder.name)
        found[folder.name] = evaluator.score(load_file(folder / "adapter_model.safetensors"))
    return found


def summary_of(run: RunFolder, scores: Mapping[str, Evaluation]) -> dict[str, Any]:
    """What `summary.json` says of them: who has one, each one's figures, and their mean and range over sites."""
    rows = {site: evaluation.to_dict() for site, evaluation in scores.items()}
    spread: dict[str, Any] = {}
    for figure in ("accuracy", "token_accuracy", "loss"):
        values = [row[figure] for row in rows.values() if row.get(figure) is not None]
        if values:
            spread[figure] = {"mean": statistics.fmean(values), "lowest": min(values), "highest": max(values)}
    return {
        "sites": sorted(folder.name for folder in run.personal.iterdir()),
        "scores": rows,
        **spread,
        "note": STANDS_IN,
    }
