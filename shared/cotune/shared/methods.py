"""LoRA on a base model: attach, read out, write in, save as PEFT.

    y = W x + (alpha / r) B A x        W frozen; A [r, in] orthonormal rows; B [out, r] starts at zero

Which of them is trained, the job's aggregation rule says. With A frozen the mean of the products is the product of
the mean (FFA-LoRA, Sun et al. 2024), and orthonormal A gives what a server-side SVD would (||A|| = 1). With Fed-SB
(Singhal et al. 2025) both are frozen and orthonormal, and only an r x r core between them is trained.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from cotune.shared.adapter import Layout, Vector
from cotune.shared.aggregation import CORE, A, B, Rule, factor_of
from cotune.shared.errors import ModelError, did_you_mean
from cotune.shared.files import storage_errors, write_atomic
from cotune.shared.folding import folded
from cotune.shared.job import Job
from cotune.shared.model import BaseModel, load_model

OUTPUT_LAYERS = ("lm_head", "embed_tokens", "classifier", "score")
_ADAPTERS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # asking PEFT takes as long as a small model


def peft_config(job: Job, model: Any) -> Any:
    """The PEFT configuration of the job's adapter on this model.

    Raises:
        ModelError: No such module, a rank above the dimension, or more layers than there are.
    """
    from peft import LoraConfig

    _check_targets(job, model)
    layers = int(model.config.num_hidden_layers)
    wanted = layers if job.lora.last_layers == "all" else job.lora.last_layers
    if not 1 <= wanted <= layers:
        raise ModelError(
            "E-LORA-LAYERS",
            f"lora.last_layers: expected 1 to {layers}, got {wanted}",
            param="lora.last_layers",
        )
    classify = job.task.kind == "classify"
    return LoraConfig(
        task_type="SEQ_CLS" if classify else "CAUSAL_LM",
        r=job.lora.r,
        lora_alpha=job.lora.alpha,  # pyright: ignore[reportArgumentType] - a float works and is needed
        lora_dropout=0.0,
        target_modules=list(job.lora.target_modules),
        layers_to_transform=list(range(layers - wanted, layers)),
        modules_to_save=["score" if hasattr(model, "score") else "classifier"] if classify else None,
        inference_mode=False,
    )


def _check_targets(job: Job, model: Any) -> None:
    from torch import nn

    linear = {n.rpartition(".")[2]: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    known = sorted(set(linear) - set(OUTPUT_LAYERS))
    for name in job.lora.target_modules:
        if name not in known:
            raise ModelError(
                "E-LORA-TARGET",
                f"lora.target_modules: this model has no linear layer `{name}` to adapt; it has {', '.join(known)}."
                + did_you_mean(name, known),
                param="lora.target_modules",
            )
        dimension = min(linear[name].in_features, linear[name].out_features)
        if job.lora.r > dimension:
            raise ModelError(
                "E-LORA-RANK",
                f"lora.r = {job.lora.r} exceeds the smaller dimension {dimension} of `{name}`",
                param="lora.r",
                hint=f"cotune config validate run.toml lora.r={dimension}",
            )


def attach(model: Any, job: Job) -> Any:
    """Put the adapter, at its public initial values, into a base model. Returns the PEFT model."""
    from peft import get_peft_model

    with quiet_peft():
        adapted = get_peft_model(model, peft_config(job, model))
    parameters = _named(adapted)
    for name, parameter in parameters.items():
        factor = factor_of(name)
        # The core has no parameter of its own: B's gradient gives the core's.
        parameter.requires_grad_(factor is None or factor in job.rule.trains or (factor == "B" and job.rule.core))
    if next(iter(parameters.values())).device.type != "meta":
        write(adapted, initial_values(layout(adapted, job.rule), job.run.seed))
    return adapted.eval()


@contextlib.contextmanager
def quiet_peft() -> Generator[None]:
    """Without the warning that peft 0.21 asks transformers 5 for an attribute by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def layout(adapted: Any, rule: Rule) -> Layout:
    """Names and shapes of an attached adapter; with a core, it is what is trained in B's place."""
    parameters = _named(adapted)
    shapes: dict[str, tuple[int, ...]] = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if rule.core:
        shapes |= {name.replace(B, CORE): (shape[1], shape[1]) for name, shape in shapes.items() if B in name}
        trained = [name.replace(B, CORE) for name in trained]
    return Layout({name: shapes[name] for name in sorted(shapes)}, tuple(sorted(trained)))


def layout_of(job: Job, base: BaseModel) -> tuple[Layout, dict[str, Any]]:
    """The adapter's layout and PEFT configuration (plain JSON values) without loading any weight."""
    model = load_model(base, job, weights=False)
    config = peft_config(job, model).to_dict()
    return layout(attach(model, job), job.rule), {
        **_plain(config),
        "base_model_name_or_path": base.name,
        "inference_mode": True,
    }


def initial_values(shape: Layout, seed: int, turn: int = 0) -> dict[str, Vector]:
    """Public starting values: A with orthonormal rows drawn from the seed, everything else zero.

    With a core, B has orthonormal columns and the core is zero.

    Args:
        shape: Of the adapter.
        seed: The job's public seed.
        turn: For rules that draw A anew: how often that was done.
    """
    generator = np.random.Generator(np.random.PCG64([seed, turn] if turn else seed))
    core = any(CORE in name for name in shape.shapes)
    values: dict[str, Vector] = {}
    for name, size in shape.shapes.items():
        if A in name or (core and B in name):
            flipped = A in name
            q, r = np.linalg.qr(generator.standard_normal(size[::-1] if flipped else size))
            q = q * np.sign(np.diagonal(r))
            values[name] = np.ascontiguousarray(q.T if flipped else q, dtype=np.float32)
        else:
            values[name] = np.zeros(size, dtype=np.float32)
    return values


def write(adapted: Any, arrays: Mapping[str, Vector]) -> None:
    """Write named arrays into an attached adapter, in place; at another rank than before, if they have one.

    A core is multiplied into B. The scale alpha / r stays the job's, whatever the rank.
    """
    import torch

    parameters = _parameters(adapted)
    with torch.no_grad():
        for name, array in folded(arrays).items():
            values = torch.from_numpy(np.array(array)).to(parameters[name])
            if parameters[name].shape == values.shape:
                parameters[name].copy_(values)
            else:
                parameters[name].data = values


def read(adapted: Any) -> dict[str, Vector]:
    """Copies of all arrays of an attached adapter."""
    return {name: p.detach().cpu().numpy().astype(np.float32) for name, p in _parameters(adapted).items()}


def trainable(adapted: Any) -> dict[str, Any]:
    """The trained parameters by PEFT name, in the layout's order."""
    return {name: p for name, p in _parameters(adapted).items() if p.requires_grad}


def save(folder: Path, arrays: Mapping[str, Vector], config: Mapping[str, Any], card: str) -> None:
    """Write a plain PEFT folder: adapter_config.json, adapter_model.safetensors, README.md.

    Raises:
        StorageError: The disk is full or read-only.
    """
    from safetensors.numpy import save as to_bytes

    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    write_atomic(folder / "adapter_config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    write_atomic(folder / "README.md", card.encode())
    write_atomic(folder / "adapter_model.safetensors", to_bytes(tensors, metadata={"format": "pt"}))


def _parameters(adapted: Any) -> dict[str, Any]:
    """What `_named` said of this model the last time."""
    return _ADAPTERS.get(adapted) or _named(adapted)


def _named(adapted: Any) -> dict[str, Any]:
    """The adapter's parameters under the names PEFT saves them by, sorted."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    live = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter
        for name, parameter in adapted.named_parameters()
        if ".lora_" in name or ".modules_to_save." in name
    }
    if saved.keys() != live.keys():
        raise ModelError("E-LORA-NAMES", "PEFT would save other tensors than are trained; this version is unsupported")
    _ADAPTERS[adapted] = {name: live[name] for name in sorted(live)}
    return _ADAPTERS[adapted]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON values: sets become sorted lists, enums their values."""

    def plain(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return getattr(value, "value", value)

    return {key: plain(value) for key, value in config.items()}
