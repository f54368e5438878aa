"""The plain app's server: FedAvg over the adapter, one array a tensor."""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict
from task import load_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and note when each one ended."""
    config = context.run_config

    def note(_round: int, _arrays: ArrayRecord) -> MetricRecord | None:
        with Path(str(config["times"])).open("a", encoding="ascii") as times:
            times.write(f"{time.time()}\n")
        return None

    strategy = FedAvg(fraction_train=float(config["fraction_train"]), fraction_evaluate=0.0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(load_model(config))),
        num_rounds=int(config["run.rounds"]),
        evaluate_fn=note,
    )
