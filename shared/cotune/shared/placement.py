"""Where a base model lies and in which numbers: CPU or GPU, fp32, bf16 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from cotune.shared.errors import ModelError
from cotune.shared.job import Job


def device() -> torch.device:
    """Where models run: the GPU if torch finds one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def placement(job: Job) -> dict[str, Any]:
    """How and where a base model's weights are kept, in the words of `from_pretrained`.

    Raises:
        ModelError: E-MODEL-4BIT: the job wants 4 bits, and bitsandbytes or a GPU is missing.
    """
    dtype: torch.dtype = getattr(torch, job.model.dtype)
    how: dict[str, Any] = {"dtype": dtype}
    if device().type != "cpu":
        how["device_map"] = {"": device()}
    if job.model.quantize == "none":
        return how
    needed = {"a CUDA GPU": torch.cuda.is_available(), "bitsandbytes": find_spec("bitsandbytes") is not None}
    missing = [name for name, there in needed.items() if not there]
    if missing:
        raise ModelError(
            "E-MODEL-4BIT",
            f'model.quantize = "4bit" needs a CUDA GPU and bitsandbytes; missing here: {", ".join(missing)}',
            param="model.quantize",
            hint='on a machine with a CUDA GPU: python -m pip install bitsandbytes; or set model.quantize = "none"',
        )
    from transformers import BitsAndBytesConfig

    how["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return how


def keep_float32(heads: Iterable[nn.Module | None]) -> None:
    """Make trained heads fp32, and what goes into them: a base in bf16 must not round what is learnt."""
    for head in heads:
        if head is not None:
            head.float().register_forward_pre_hook(_as_the_weights)


def _as_the_weights(head: nn.Module, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = next(head.parameters()).dtype  # a head may be several layers, as RoBERTa's is
    return tuple(value.to(dtype) for value in values)
