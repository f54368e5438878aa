"""An adapter's numbers keep their names, shapes and order on the way to one flat array and back."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from cotune.shared.adapter import Layout, Vector, fingerprint, flat_sha256, nested

LAYOUT = Layout(
    shapes={"a.lora_A": (2, 3), "a.lora_B": (4, 2), "b.lora_A": (2, 3), "b.lora_B": (1, 2)},
    trained=("a.lora_B", "b.lora_B"),
)


def values() -> dict[str, Vector]:
    random = np.random.default_rng(1)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in LAYOUT.shapes.items()}


def test_only_trained_tensors_travel_in_order_of_names() -> None:
    made = values()
    flat = LAYOUT.flatten(made)
    assert LAYOUT.size == 10
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(flat, [*made["a.lora_B"].ravel(), *made["b.lora_B"].ravel()])


def test_a_flat_array_comes_back_as_the_tensors_it_was_made_of() -> None:
    made = values()
    back = LAYOUT.unflatten(LAYOUT.flatten(made))
    assert tuple(back) == LAYOUT.trained
    for name, array in back.items():
        np.testing.assert_array_equal(array, made[name])


@pytest.mark.parametrize("shape", [(9,), (11,), (0,), (10, 1), (1, 10)], ids=str)
def test_an_array_of_another_length_or_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected shape \(10,\)"):
        LAYOUT.unflatten(np.zeros(shape, dtype=np.float32))


def test_a_missing_tensor_is_an_error() -> None:
    with pytest.raises(KeyError):
        LAYOUT.flatten({"a.lora_B": np.zeros((4, 2), dtype=np.float32)})


def test_a_fingerprint_names_values_shapes_and_names_but_not_their_order() -> None:
    made = values()
    known = fingerprint(made)
    assert fingerprint(dict(reversed(list(made.items())))) == known
    changed = [
        {**made, "a.lora_A": np.nextafter(made["a.lora_A"], np.float32(9))},
        {**made, "a.lora_A": made["a.lora_A"].reshape(3, 2)},
        {("c" if name == "a.lora_A" else name): array for name, array in made.items()},
        {name: array for name, array in made.items() if name != "a.lora_A"},
        {**made, "a.lora_A": made["b.lora_A"], "b.lora_A": made["a.lora_A"]},
    ]
    assert len({known, *map(fingerprint, changed)}) == 6


def test_a_fingerprint_is_of_fp32_values_wherever_they_lie_in_memory() -> None:
    made = values()
    same = {name: np.asfortranarray(array.astype(">f8")) for name, array in made.items()}
    assert fingerprint(same) == fingerprint(made)


def test_a_flat_hash_is_sha256_of_little_endian_fp32_bytes() -> None:
    flat = np.array([1.0, -2.5], dtype=np.float32)
    assert flat_sha256(flat) == hashlib.sha256(bytes.fromhex("0000803f000020c0")).hexdigest()
    assert flat_sha256(flat[::-1]) != flat_sha256(flat)


REAL = Layout(
    shapes={
        "m.lora_A.weight": (4, 7), "m.lora_B.weight": (5, 4), "m.lora_core.weight": (4, 4), "score.weight": (3, 7),
    },
    trained=("m.lora_A.weight", "m.lora_B.weight", "score.weight"),
)  # fmt: skip


@pytest.mark.parametrize("rank", [1, 3, 4, 6])
def test_at_another_rank_factors_change_and_heads_do_not(rank: int) -> None:
    other = REAL.at_rank(rank)
    assert other.trained == REAL.trained
    assert other.shapes["m.lora_A.weight"] == (rank, 7)
    assert other.shapes["m.lora_B.weight"] == (5, rank)
    assert other.shapes["score.weight"] == (3, 7)
    assert other.size == 12 * rank + 21
    assert other.at_rank(4) == REAL


def test_only_some_tensors_keep_their_order_and_the_shapes_of_all() -> None:
    some = REAL.only(["score.weight", "m.lora_A.weight", "unknown"])
    assert some.trained == ("m.lora_A.weight", "score.weight")
    assert some.shapes == REAL.shapes
    assert some.size == 28 + 21


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_nested_adapter_is_the_first_rows_of_a_and_columns_of_b(rank: int) -> None:
    random = np.random.default_rng(2)
    made = {name: random.normal(size=shape).astype(np.float32) for name, shape in REAL.shapes.items()}
    part = nested(made, rank)
    np.testing.assert_array_equal(part["m.lora_A.weight"], made["m.lora_A.weight"][:rank])
    np.testing.assert_array_equal(part["m.lora_B.weight"], made["m.lora_B.weight"][:, :rank])
    np.testing.assert_array_equal(part["score.weight"], made["score.weight"])
    flat = REAL.at_rank(rank).flatten(part)
    back = REAL.at_rank(rank).unflatten(flat)
    assert all(np.array_equal(back[name], part[name]) for name in REAL.trained)
    assert nested(part, rank).keys() == made.keys()
