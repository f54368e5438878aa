"""Model, rows and private training of the plain app."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

Config = Mapping[str, Any]
IGNORED = -100  # by the loss


def load_model(config: Config) -> Any:
    """The base with a LoRA adapter; of the adapter only B is trained, beside a head if there is one."""
    classify = config["task.kind"] == "classify"
    base = _classifier(config) if classify else AutoModelForCausalLM.from_pretrained(config["model.base"])
    layers = base.config.num_hidden_layers
    lora = LoraConfig(
        task_type="SEQ_CLS" if classify else "CAUSAL_LM",
        r=config["lora.r"],
        lora_alpha=config["lora.alpha"],
        target_modules=config["lora.target_modules"].split(","),
        layers_to_transform=list(range(layers - config["lora.last_layers"], layers)),
    )
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return model


def _classifier(config: Config) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        config["model.base"],
        num_labels=len(config["task.labels"].split(",")),
        hidden_dropout_prob=0.0,  # cotune trains without dropout
        attention_probs_dropout_prob=0.0,
    )


def load_data(config: Config, partition: int) -> DataLoader[Any]:
    """A partition's rows as padded token ids, mask and what is learnt: a label, or the tokens of the answer."""
    first = partition * config["data.records_per_site"]
    rows = _rows(config["data.train"])[first : first + config["data.records_per_site"]]
    tokenizer = AutoTokenizer.from_pretrained(config["model.base"], padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    classify = config["task.kind"] == "classify"
    tokens = tokenizer(
        [row["text"] if classify else row["prompt"] + row["completion"] for row in rows],
        padding=True,
        truncation=True,
        max_length=config["model.max_length"],
        return_tensors="pt",
    )
    if classify:
        labels = config["task.labels"].split(",")
        targets = torch.tensor([labels.index(row["label"]) for row in rows])
    else:
        targets = tokens.input_ids.masked_fill(tokens.attention_mask == 0, IGNORED)
        for target, prompt in zip(targets, tokenizer([row["prompt"] for row in rows]).input_ids, strict=True):
            target[: len(prompt)] = IGNORED
    return DataLoader(TensorDataset(tokens.input_ids, tokens.attention_mask, targets), config["train.batch_size"])


@lru_cache(maxsize=1)
def _rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def train(model: Any, loader: DataLoader[Any], config: Config) -> float:
    """Take the local steps of DP-SGD, by Opacus; returns the mean loss of the steps that drew a row."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=config["train.learning_rate"])
    engine: Any = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model.train(),
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=config["privacy.noise_multiplier"],
        max_grad_norm=config["privacy.clipping_norm"],
    )
    losses: list[float] = []
    for ids, mask, targets in islice(_endless(loader), config["train.local_steps"]):
        if len(ids):
            loss = private(input_ids=ids, attention_mask=mask, labels=targets).loss
            loss.backward()
            losses.append(loss.item())
        else:  # Llama's forward pass fails without rows; the step is noise alone
            for parameter in optimizer.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        optimizer.step()
        optimizer.zero_grad()
    return sum(losses) / max(1, len(losses))


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader
