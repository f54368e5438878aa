"""Server optimisers against the papers' formulas number by number, and the average of adapters."""

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cotune.server.optimisers import OptimiserSettings, ServerOptimiser, average, step
from cotune.shared.errors import JobError

OPTIMISERS: tuple[ServerOptimiser, ...] = get_args(ServerOptimiser)
fp32 = st.floats(-(2.0**40), 2.0**40, width=32)


def one(value: float) -> dict[str, np.ndarray]:
    return {"t": np.array([value], dtype=np.float32)}


def paper(settings: OptimiserSettings, deltas: list[float]) -> list[tuple[float, float]]:
    """What one number is moved by in each round: Hsu et al. 2019; Reddi et al. 2021, algorithm 2.

    With each, what rounding the memory to fp32 may make of it.
    """
    m, v, seen, scale, moves = 0.0, settings.tau**2, 0.0, 1.0, []
    b1, b2 = settings.momentum, settings.beta2
    for d in deltas:
        if settings.name == "none":
            m = d
        elif settings.name == "fedavgm":
            m = b1 * m + d
        else:
            m = b1 * m + (1 - b1) * d
            if settings.name == "fedadam":
                v = b2 * v + (1 - b2) * d * d
            else:
                v = v - (1 - b2) * d * d * math.copysign(v != d * d, v - d * d)
            scale = math.sqrt(v) + settings.tau
        seen += abs(d)
        moves.append((settings.learning_rate * m / scale, 1e-6 * settings.learning_rate * seen / scale))
    return moves


@pytest.mark.parametrize("name", OPTIMISERS)
@hypothesis_settings(max_examples=50)
@given(
    deltas=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8),
    rate=st.floats(1e-3, 10),
    momentum=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.999),
    tau=st.floats(1e-4, 1),
)
def test_each_step_is_the_papers(
    name: ServerOptimiser, deltas: list[float], rate: float, momentum: float, beta2: float, tau: float
) -> None:
    settings = OptimiserSettings(name, rate, momentum, beta2, tau)
    memory: dict[str, np.ndarray] = {}
    for delta, (expected, rounding) in zip(deltas, paper(settings, deltas), strict=True):
        added, memory = step(settings, one(delta), memory)
        assert added["t"].dtype == np.float32
        assert float(added["t"][0]) == pytest.approx(expected, rel=1e-4, abs=rounding + 1e-37)


def test_adaptive_steps_to_five_digits() -> None:
    """Two rounds by hand: d = 0.5 then -0.25, beta1 0.9, beta2 0.99, tau 0.1, rate 1."""
    deltas = [0.5, -0.25]
    for name, second in {
        # v: 0.01 -> 0.0124 -> 0.012901, m: 0.05 -> 0.02
        "fedadam": [0.05 / (math.sqrt(0.0124) + 0.1), 0.02 / (math.sqrt(0.012901) + 0.1)],
        # v: 0.01 + 0.0025 -> 0.0125 + 0.000625
        "fedyogi": [0.05 / (math.sqrt(0.0125) + 0.1), 0.02 / (math.sqrt(0.013125) + 0.1)],
        "fedavgm": [0.5, 0.2],
    }.items():
        memory: dict[str, np.ndarray] = {}
        for delta, expected in zip(deltas, second, strict=True):
            added, memory = step(OptimiserSettings(name, tau=0.1), one(delta), memory)
            assert float(added["t"][0]) == pytest.approx(expected, rel=1e-5)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_none_adds_the_update_bit_by_bit_and_remembers_nothing(values: list[float]) -> None:
    delta = {"t": np.array([*values, -0.0, 1e-45, 3.4e38], dtype=np.float32)}
    added, memory = step(OptimiserSettings("none"), delta, {})
    assert added["t"].tobytes() == delta["t"].tobytes()
    assert memory == {}


def test_momentum_of_a_steady_update_grows_to_its_tenfold() -> None:
    memory: dict[str, np.ndarray] = {}
    for _ in range(200):
        added, memory = step(OptimiserSettings("fedavgm"), one(0.01), memory)
    assert float(added["t"][0]) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_optimisers_move_coordinates_of_any_scale_alike(name: ServerOptimiser) -> None:
    settings = OptimiserSettings(name, learning_rate=0.01, tau=1e-9)
    delta, memory = {"t": np.array([1e-4, 1.0, 1e4], dtype=np.float32)}, {}
    for _ in range(2000):
        added, memory = step(settings, delta, memory)
    assert added["t"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_tensors_that_were_not_trained_are_left_alone(name: ServerOptimiser) -> None:
    settings = OptimiserSettings(name)
    _, memory = step(settings, {**one(1.0), "u": np.ones((2, 3), dtype=np.float32)}, {})
    before = {key: array.copy() for key, array in memory.items()}
    added, after = step(settings, one(2.0), memory)
    assert list(added) == ["t"]
    assert after.keys() == before.keys()
    for key, array in before.items():
        assert memory[key].tobytes() == array.tobytes()  # what was given is not written to
        assert (after[key].tobytes() == array.tobytes()) == key.startswith("u|")


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_run_that_reads_its_memory_from_a_file_goes_on_bit_by_bit(name: ServerOptimiser, tmp_path: Path) -> None:
    generator = np.random.default_rng(9)
    settings = OptimiserSettings(name, learning_rate=0.3)
    shapes = {"m.lora_A.weight": (2, 5), "m.lora_B.weight": (4, 2)}
    through: dict[str, np.ndarray] = {}
    resumed: dict[str, np.ndarray] = {}
    for number in range(4):
        delta = {n: generator.standard_normal(s).astype(np.float32) * 1e-4 for n, s in shapes.items()}
        if number % 2:
            delta.pop("m.lora_A.weight")
        expected, through = step(settings, delta, through)
        save_file(resumed, tmp_path / "memory.safetensors")
        found, resumed = step(settings, delta, load_file(tmp_path / "memory.safetensors"))
        assert {k: a.tobytes() for k, a in found.items()} == {k: a.tobytes() for k, a in expected.items()}
    assert {k: a.tobytes() for k, a in resumed.items()} == {k: a.tobytes() for k, a in through.items()}
    count = {"none": 0, "fedavgm": 1}.get(name, 2)
    assert len(through) == count * len(shapes)
    assert all(array.dtype == np.float32 for array in through.values())


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_a_memory_of_another_shape_is_refused_and_never_stretched(name: ServerOptimiser) -> None:
    _, memory = step(OptimiserSettings(name), one(1.0), {})
    with pytest.raises(ValueError, match=r"t\|m: expected shape \(3,\), got \(1,\)"):
        step(OptimiserSettings(name), {"t": np.ones(3, dtype=np.float32)}, memory)


@pytest.mark.parametrize(
    ("setting", "value"),
    [(s, v) for s in ("learning_rate", "tau") for v in (0.0, -1.0, math.inf, math.nan)]
    + [(s, v) for s in ("momentum", "beta2") for v in (-0.1, 1.0, math.nan)],
)
def test_impossible_settings_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(JobError, match=f"{setting}: expected") as caught:
        OptimiserSettings("fedadam", **{setting: value})
    assert caught.value.param == setting


@given(values=st.lists(fp32, min_size=1, max_size=12), decay=st.floats(0, 0.999))
def test_the_average_weighs_each_round_by_its_age_and_sums_to_one(values: list[float], decay: float) -> None:
    averaged: dict[str, np.ndarray] = {}
    for rounds, value in enumerate(values, start=1):
        averaged = average(decay, one(value), averaged, rounds)
    weights = [(1 - decay) * decay**age for age in range(len(values))]
    expected = math.fsum(w * v for w, v in zip(weights, reversed(values), strict=True)) / math.fsum(weights)
    assert averaged["t"].dtype == np.float32
    assert float(averaged["t"][0]) == pytest.approx(expected, rel=1e-5, abs=1e-6 * max(map(abs, values)))


def test_the_first_average_is_the_first_adapter_whatever_was_kept_of_another_run() -> None:
    assert average(0.9, one(1 / 3), {}, 1)["t"] == one(1 / 3)["t"]
    assert average(0.9, one(1 / 3), {"t": np.ones(7, dtype=np.float32)}, 1)["t"] == one(1 / 3)["t"]


def test_without_decay_the_average_is_the_newest_adapter() -> None:
    assert average(0.0, one(2.5), one(-7.0), 9)["t"] == one(2.5)["t"]


def test_averages_that_do_not_belong_to_the_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="t: expected its average of the 2 rounds before, got none"):
        average(0.9, one(1.0), {}, 3)
    with pytest.raises(ValueError, match=r"t: expected shape \(1,\), got \(2,\)"):
        average(0.9, one(1.0), {"t": np.ones(2, dtype=np.float32)}, 2)
    with pytest.raises(ValueError, match="at least the first round, got 0"):
        average(0.9, one(1.0), {}, 0)
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(JobError, match="decay: expected a share"):
            average(decay, one(1.0), one(1.0), 2)
