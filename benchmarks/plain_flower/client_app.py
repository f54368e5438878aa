"""The plain app's client: everything is loaded in the call, as in Flower's own examples."""

from __future__ import annotations

import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from task import load_data, load_model
from task import train as train_privately

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global adapter on this node's rows."""
    torch.set_num_threads(1)
    config, started = context.run_config, time.process_time()
    model = load_model(config)
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    loader = load_data(config, int(context.node_config["partition-id"]))
    loaded = time.process_time()
    loss = train_privately(model, loader, config)
    trained = time.process_time()
    metrics = {"train_loss": loss, "load_cpu_s": loaded - started, "train_cpu_s": trained - loaded}
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({**metrics, "num-examples": int(config["data.records_per_site"])}),
        }
    )
    return Message(content, reply_to=message)
