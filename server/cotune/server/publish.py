"""The end of a run: adapter saved, reloaded in a fresh process, claim, card, report, manifest."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cotune.server.coordinator import Outcome
from cotune.server.evaluation import RELOAD_ROWS, GlobalEvaluator
from cotune.server.personal import summary_of
from cotune.server.signatories import Signatories
from cotune.shared.adapter import Layout, fingerprint
from cotune.shared.aggregation import what_is_trained
from cotune.shared.errors import RunFailed
from cotune.shared.files import file_sha256, write_atomic, write_json
from cotune.shared.folding import folded_config
from cotune.shared.job import Job
from cotune.shared.methods import save
from cotune.shared.model import BaseModel
from cotune.shared.privacy.claim import ClaimSubject, build_claim, charged, site_costs, statement_text
from cotune.shared.report.card import cards, personal_folders
from cotune.shared.report.page import write_report
from cotune.shared.runs import RunFolder

if TYPE_CHECKING:
    from cotune.shared.evaluation import Evaluation

RELATIVE_TOLERANCE = 1e-3
RELOAD_TIMEOUT_S = 900


@dataclass(frozen=True)
class Adapted:
    """The base model, and how the adapter lies on it.

    Attributes:
        base: The base.
        layout: The adapter's arrays.
        config: PEFT's configuration of it.
    """

    base: BaseModel
    layout: Layout
    config: Mapping[str, Any]


def publish(
    run: RunFolder,
    outcome: Outcome,
    evaluator: GlobalEvaluator,
    adapted: Adapted,
    signatories: Signatories,
    engine: str,
) -> None:
    """Save the result and everything that is said of it, signed.

    Raises:
        RunFailed: The saved adapter does not give the loss it was saved with; nothing is published.
    """
    job = run.job()
    run.emit("publish", "saving the adapter and loading it in a fresh process")
    save(run.adapter, outcome.arrays, folded_config(adapted.config, outcome.arrays), f"# {run.run_id}\n")
    reload_check = _reload(run, evaluator.score(outcome.arrays, RELOAD_ROWS).loss)
    accounts = _accounts(run)
    heads = json.loads((run.privacy / "heads.json").read_text(encoding="utf-8"))
    folders = (run.adapter, *personal_folders(run))
    released = [path for folder in folders for path in folder.iterdir() if path.name != "README.md"]
    files = {str(path.relative_to(run.path)): file_sha256(path) for path in released}
    base, coordinator = (adapted.base.name, adapted.base.sha256), signatories.coordinator()
    claim = build_claim(job, accounts, ClaimSubject(run.run_id, files, reload_check, heads, base, coordinator))
    run.emit("publish", "the sites sign the privacy claim")
    signatories.sign(claim)
    write_atomic(run.privacy / "statement.txt", statement_text(claim).encode())
    summary = _summary(run, outcome, claim["sites"], adapted, engine)
    write_json(run.path / "summary.json", {**summary, "reload": reload_check})
    for path, card in cards(run).items():
        write_atomic(path, card)
    run.write_metrics_csv()
    run.set_state("succeeded", int(summary["rounds"]))
    write_report(run)
    run.write_manifest()


def note(run: RunFolder, outcome: Outcome, adapted: Adapted, engine: str) -> None:
    """Write down a run's figures alone: it is one of many that are compared, and nothing of it is released."""
    sites = site_costs(run.job(), _accounts(run))
    write_json(run.path / "summary.json", _summary(run, outcome, sites, adapted, engine))
    run.write_metrics_csv()
    run.set_state("succeeded", run.job().run.rounds)
    run.write_manifest()


def _accounts(run: RunFolder) -> dict[str, list[dict[str, Any]]]:
    return charged(json.loads((run.privacy / "accountant.json").read_text(encoding="utf-8"))["sites"])


def _reload(run: RunFolder, loss: float) -> dict[str, float]:
    """Loss of the saved adapter in a fresh process, by PEFT's own loader."""
    command = [
        sys.executable,
        "-m",
        "cotune.shared.cli",
        "eval",
        str(run.path),
        "--limit",
        str(RELOAD_ROWS),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RELOAD_TIMEOUT_S, check=False)
    try:
        reloaded = float(json.loads(done.stdout.splitlines()[-1])["data"]["loss"])
    except (IndexError, KeyError, ValueError):
        raise RunFailed(
            "E-VERIFY-LOSS", "the saved adapter does not load in a fresh process; nothing was published",
            hint=f"cotune eval {run.path}",
        ) from None  # fmt: skip
    if not math.isclose(reloaded, loss, rel_tol=RELATIVE_TOLERANCE):
        raise RunFailed(
            "E-VERIFY-LOSS",
            f"the saved adapter gives loss {reloaded:.4f} when reloaded, training ended at {loss:.4f}: it was not"
            " saved correctly; nothing was published",
            hint=f"cotune eval {run.path}",
        )
    return {"loss_saved": loss, "loss_reloaded": reloaded}


def _summary(
    run: RunFolder, outcome: Outcome, sites: Sequence[dict[str, Any]], adapted: Adapted, engine: str
) -> dict[str, Any]:
    job, base = run.job(), adapted.base
    taken = {(row["site"], row["round"]) for row in run.metrics() if row.get("site")}
    rounds = Counter(site for site, _ in taken)
    totals = [sum(pair[i] for pair in outcome.traffic.values()) for i in (0, 1)]
    return {
        "schema": 1,
        "run_id": run.run_id,
        "name": job.run.name,
        "engine": engine,
        "rounds": len({number for _, number in taken}),
        "job_sha256": job.sha256(),
        "non_private": not job.is_private,
        "model": {"base": base.name, "sha256": base.sha256, "dequantised": base.dequantised},
        "adapter": {
            "parameters": adapted.layout.size,
            "trained": _trained(job),
            "sha256": fingerprint(outcome.arrays),
        },
        "base": _scores(outcome.base),
        "final": _scores(outcome.final),
        **({"personal": summary_of(run, outcome.personal)} if job.rule.personal else {}),
        "sites": [_site(site, outcome, rounds[site["id"]]) for site in sites],
        "bytes_up": totals[0],
        "bytes_down": totals[1],
        "seconds": round(outcome.seconds, 1),
        "baselines": [],
    }


def _site(site: Mapping[str, Any], outcome: Outcome, rounds: int) -> dict[str, Any]:
    up, down = outcome.traffic.get(site["id"], (0, 0))
    kept = {key: site[key] for key in ("steps", "epsilon", "delta")}
    return {"site": site["id"], "rounds": rounds, **kept, "bytes_up": up, "bytes_down": down}


def _scores(evaluation: Evaluation | None) -> dict[str, Any] | None:
    return evaluation.to_dict() if evaluation else None


def _trained(job: Job) -> str:
    layers = "all layers" if job.lora.last_layers == "all" else f"top {job.lora.last_layers} layers"
    return f"{what_is_trained(job.rule)} of {', '.join(job.lora.target_modules)}, {layers}"
