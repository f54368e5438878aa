"""A run's whole state as a plain adapter: the same function, computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.shared.adapter import Vector
from cotune.shared.folding import folded, folded_config

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6.0, "target_modules": ["q"]}
HEAD = "score.weight"
MODULES = ("m.0.q", "m.1.q")


def state(random: np.random.Generator, *, rank: int = 4, core: bool = False, offset: int = 0) -> dict[str, Vector]:
    """Two modules, 7 wide and 5 high, and a head."""

    def drawn(*shape: int) -> Vector:
        return random.normal(size=shape).astype(np.float32)

    made = {HEAD: drawn(3, 7)}
    for module in MODULES:
        made |= {f"{module}.lora_A.weight": drawn(rank, 7), f"{module}.lora_B.weight": drawn(5, rank)}
        made |= {f"{module}.lora_core.weight": drawn(rank, rank)} if core else {}
        if offset:
            made |= {f"{module}.offset_A.weight": drawn(offset, 7), f"{module}.offset_B.weight": drawn(5, offset)}
    return made


def by_hand(arrays: dict[str, Vector], module: str, x: Vector) -> Any:
    """What a module adds for an input x: s (B core A + offset_B offset_A) x, the scale left out."""
    a, b, core, offset_a, offset_b = (
        None if array is None else array.astype(np.float64)
        for array in (
            arrays.get(f"{module}.{part}.weight") for part in ("lora_A", "lora_B", "lora_core", "offset_A", "offset_B")
        )
    )
    inner = a @ x if core is None else core @ (a @ x)
    return b @ inner + (0 if offset_a is None else offset_b @ (offset_a @ x))


@given(seed=st.integers(0, 2**32), rank=st.integers(1, 6), core=st.booleans(), offset=st.integers(0, 9))
def test_folded_factors_are_the_same_function_as_core_and_offset(seed: int, rank: int, core: bool, offset: int) -> None:
    random = np.random.default_rng(seed)
    arrays = state(random, rank=rank, core=core, offset=offset)
    plain = folded(arrays)
    for module in MODULES:
        a, b = plain[f"{module}.lora_A.weight"], plain[f"{module}.lora_B.weight"]
        assert (a.shape, b.shape) == ((rank + offset, 7), (5, rank + offset))
        x = random.normal(size=7)
        wanted = by_hand(arrays, module, x)
        np.testing.assert_allclose(b.astype(np.float64) @ (a @ x), wanted, rtol=1e-4, atol=1e-5)


def test_factors_without_core_or_offset_are_left_to_the_bit_and_so_is_a_head() -> None:
    arrays = state(np.random.default_rng(1))
    plain = folded(arrays)
    assert plain.keys() == arrays.keys()
    for name, array in arrays.items():
        assert plain[name].tobytes() == array.tobytes()


def test_a_plain_adapter_has_nothing_of_training_in_it() -> None:
    arrays = state(np.random.default_rng(2), core=True, offset=3)
    controls = {name + "|control": np.ones_like(array) for name, array in arrays.items()}
    plain = folded({**arrays, **controls})
    assert sorted(plain) == sorted([HEAD, *(f"{m}.lora_{f}.weight" for m in MODULES for f in "AB")])
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in plain.values())


@pytest.mark.parametrize("offset", [0, 3])
def test_the_configuration_keeps_the_scale_at_the_folded_rank(offset: int) -> None:
    config = folded_config(CONFIG, folded(state(np.random.default_rng(3), offset=offset)))
    assert config["r"] == 4 + offset
    assert config["lora_alpha"] / config["r"] == pytest.approx(6.0 / 4)
    assert {name: config[name] for name in ("peft_type", "target_modules")} == {
        "peft_type": "LORA", "target_modules": ["q"],
    }  # fmt: skip
    assert CONFIG["r"] == 4


def test_peft_alone_computes_what_the_state_says(make_job: Any, tmp_path: Any) -> None:
    import torch
    from peft import PeftModel

    from cotune.shared.aggregation import RULES, sent
    from cotune.shared.methods import layout_of, quiet_peft, save
    from cotune.shared.model import load_model, locate

    job = make_job(aggregation={"rule": "fedex"})
    layout, config = layout_of(job, locate(job))
    random = np.random.default_rng(4)
    whole = sent(RULES["fedex"], layout, 3, controls=False)
    arrays = {name: (random.normal(size=shape) * 0.1).astype(np.float32) for name, shape in whole.shapes.items()}
    plain = folded(arrays)
    save(tmp_path / "adapter", plain, folded_config(config, plain), "")
    with quiet_peft():
        loaded = PeftModel.from_pretrained(load_model(locate(job), job), str(tmp_path / "adapter")).eval()
    merged = load_model(locate(job), job)
    for name in (n for n in layout.shapes if "lora_A" in n):
        module = name.removesuffix(".lora_A.weight")
        added = [by_hand(arrays, module, column) for column in np.eye(layout.shapes[name][1])]
        weight = merged.get_submodule(module.removeprefix("base_model.model.")).weight
        weight.data += torch.tensor(np.array(added).T * job.lora.alpha / job.lora.r, dtype=weight.dtype)
    ids = torch.tensor([[4, 9, 11, 6, 20]])
    with torch.no_grad():
        got, wanted = loaded(ids).logits, merged(ids).logits
        base = load_model(locate(job), job)(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert float((wanted - base).abs().max()) > 1e-2
