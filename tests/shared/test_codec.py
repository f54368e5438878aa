"""Numbers come back from fewer bytes within each codec's bound; bytes that are not a codec's are refused by name."""

from __future__ import annotations

import tracemalloc
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cotune.shared.adapter import Vector
from cotune.shared.codec import CODECS, CodecName, Payload, decode, encode, encoded_bytes
from cotune.shared.errors import ConnectionFailed, JobError

BLOCK, LEVELS = 64, {"int8": 127, "int4": 7}
LARGEST, SMALLEST = float(np.finfo(np.float32).max), 2.0**-149
FP16_MAX, BF16_MAX = float(np.finfo(np.float16).max), 255 * 2.0**120
SIZES = st.integers(0, 3 * BLOCK + 1)
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = arrays.arrays(np.float32, SIZES, elements=ANY, fill=ANY)
every_codec = pytest.mark.parametrize("codec", CODECS)
every_block_codec = pytest.mark.parametrize("codec", LEVELS)


def vector(*numbers: float) -> Vector:
    return np.array(numbers, dtype=np.float32)


def payload(*parts: bytes | Vector) -> Payload:
    """Bytes as they are, numbers as little-endian fp32."""
    raw = b"".join(part if isinstance(part, bytes) else part.astype("<f4").tobytes() for part in parts)
    return np.frombuffer(raw, dtype=np.uint8)


def normal(size: int) -> Vector:
    return np.random.default_rng(1).standard_normal(size, dtype=np.float32)


def back(flat: Vector, codec: str, seed: int = 1) -> Vector:
    return decode(encode(flat, codec, seed), codec, flat.size)


def error(flat: Vector, codec: str, seed: int = 1) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.abs(back(flat, codec, seed).astype(np.float64) - flat)


def largest_of_blocks(flat: Vector) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """For every number, the largest magnitude in its block."""
    starts = np.arange(0, flat.size, BLOCK)
    return np.repeat(np.maximum.reduceat(np.abs(flat.astype(np.float64)), starts), BLOCK)[: flat.size]


def test_the_table_holds_every_name_and_its_facts() -> None:
    assert tuple(CODECS) == get_args(CodecName)
    assert [name for name, codec in CODECS.items() if codec.lossless] == ["fp32"]
    assert [name for name, codec in CODECS.items() if codec.unbiased] == ["fp32", "int8", "int4"]
    for name, codec in CODECS.items():
        assert 8 * encoded_bytes(name, 10**6) / 10**6 == pytest.approx(codec.bits, rel=1e-12)
        assert "\n" not in codec.description


@given(VECTORS)
def test_fp32_comes_back_bit_by_bit(flat: Vector) -> None:
    assert back(flat, "fp32").tobytes() == flat.tobytes()


@given(VECTORS)
def test_fp16_is_within_half_a_unit_of_11_bits_and_saturates(flat: Vector) -> None:
    flat = np.clip(flat, -2 * FP16_MAX, 2 * FP16_MAX)
    beyond = np.abs(flat) > FP16_MAX
    assert (error(flat, "fp16") <= np.maximum(2.0**-11 * np.abs(flat), 2.0**-25))[~beyond].all()
    assert (back(flat, "fp16") == np.sign(flat) * FP16_MAX)[beyond].all()


@given(VECTORS)
def test_bf16_is_within_half_a_unit_of_8_bits_over_the_whole_range(flat: Vector) -> None:
    assert (error(flat, "bf16") <= np.maximum(2.0**-8 * np.abs(flat.astype(np.float64)), 2.0**-134)).all()


@every_block_codec
@given(flat=VECTORS, seed=st.integers(0, 2**64))
def test_blocks_are_within_one_step_and_their_largest_is_exact(codec: str, flat: Vector, seed: int) -> None:
    largest, off = largest_of_blocks(flat), error(flat, codec, seed)
    assert (off <= largest / LEVELS[codec] * (1 + 1e-5) + SMALLEST).all()
    assert (off[np.abs(flat) == largest] == 0).all(), "the largest itself comes back exactly"


@given(VECTORS)
def test_topk_keeps_the_largest_in_fp16_and_nothing_else(flat: Vector) -> None:
    kept = min(flat.size, max(1, flat.size // 20))
    order = np.lexsort((np.arange(flat.size), -np.abs(flat)))  # by magnitude, then by index
    expected = np.zeros_like(flat)
    expected[order[:kept]] = back(flat[order[:kept]], "fp16")
    np.testing.assert_array_equal(back(flat, "topk"), expected)


def test_of_equal_magnitudes_topk_keeps_the_first() -> None:
    flat = vector(*[1, -1] * 35, -2, *[-1, 1] * 15)
    assert np.flatnonzero(back(flat, "topk")).tolist() == [0, 1, 2, 3, 70]


@pytest.mark.parametrize(("codec", "infinite"), [("fp16", 0x7C00), ("bf16", 0x7F80)])
def test_every_number_of_16_bits_comes_back_as_the_same_16_bits(codec: str, infinite: int) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    finite = every[(every & 0x7FFF) < infinite].astype("<u2").view(np.uint8)
    numbers = decode(finite, codec, finite.size // 2)
    assert encode(numbers, codec, 0).tobytes() == finite.tobytes()


def test_bf16_rounds_ties_to_even_and_saturates() -> None:
    unit = 2.0**-7
    flat = vector(1 + unit / 2, 1 + 3 * unit / 2, 1 + unit / 2 + 2.0**-23, -1 - unit / 2, LARGEST, -LARGEST)
    assert back(flat, "bf16").tolist() == [1, 1 + 2 * unit, 1 + unit, -1, BF16_MAX, -BF16_MAX]


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if codec.unbiased])
def test_the_mean_over_seeds_is_the_number_itself(codec: str) -> None:
    seeds, flat = 4000, normal(BLOCK + 10)
    flat[7] *= 1e-3
    drawn = np.array([back(flat, codec, seed) for seed in range(seeds)], dtype=np.float64)
    deviation = drawn.std(axis=0)
    assert (np.abs(drawn.mean(axis=0) - flat) <= 5 * deviation / np.sqrt(seeds) + 1e-6).all()
    if codec in LEVELS:
        assert np.count_nonzero(deviation) == flat.size - 2, "all are drawn but the largest of either block"


@every_block_codec
def test_a_number_is_drawn_apart_from_its_neighbours(codec: str) -> None:
    flat = np.full(BLOCK * 64, 0.5 / LEVELS[codec], dtype=np.float32)
    flat[::BLOCK] = 1
    up = (back(flat, codec) > 0).reshape(-1, BLOCK)[:, 1:]
    for coin in (up, up[:, 1:] == up[:, :-1], up[1:] == up[:-1]):
        assert abs(np.count_nonzero(coin) - coin.size / 2) <= 5 * np.sqrt(coin.size) / 2


@every_codec
def test_the_same_seed_gives_the_same_bytes_and_another_only_other_rounding(codec: str) -> None:
    flat = normal(1000)
    first = encode(flat, codec, 3).tobytes()
    assert encode(flat.copy(), codec, 3).tobytes() == first
    assert (encode(flat, codec, 4).tobytes() == first) == (codec not in LEVELS)


@every_codec
@given(size=SIZES)
def test_the_length_is_known_beforehand(codec: str, size: int) -> None:
    encoded = encode(normal(size), codec, 1)
    decoded = decode(encoded, codec, size)
    assert (encoded.dtype, encoded.shape) == (np.uint8, (encoded_bytes(codec, size),))
    assert (decoded.dtype, decoded.shape) == (np.float32, (size,))


@pytest.mark.parametrize("size", [1000, 10_007, 1_000_000])
def test_an_adapters_worth_of_numbers_takes_so_many_times_fewer_bytes(size: int) -> None:
    for codec, least in {"fp16": 2, "bf16": 2, "int8": 3.7, "int4": 7, "topk": 10}.items():
        assert 4 * size / encoded_bytes(codec, size) >= least


@pytest.mark.parametrize(
    ("codec", "flat", "expected"),
    [
        ("fp32", vector(1, -2), payload(vector(1, -2))),
        ("fp16", vector(1, -2), payload(b"\x00\x3c\x00\xc0")),
        ("bf16", vector(1, -2), payload(b"\x80\x3f\x00\xc0")),
        ("int8", vector(127, -127, 1), payload(vector(127), b"\x7f\x81\x01")),
        ("int4", vector(7, -7, 1), payload(vector(7), b"\x1f\x89")),
        ("topk", vector(*[0] * 9, -2), payload(b"\x00\x02\x00\xc0")),
    ],
)
def test_the_bytes_are_these(codec: str, flat: Vector, expected: Payload) -> None:
    assert encode(flat, codec, 1).tobytes() == expected.tobytes()
    assert decode(expected, codec, flat.size).tobytes() == flat.tobytes()


@every_codec
def test_nothing_and_zeros_come_back_as_they_are(codec: str) -> None:
    assert encode(vector(), codec, 1).size == 0
    for size in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1):
        assert back(vector(*[0] * size), codec).tolist() == [0] * size


@every_codec
@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1])
def test_one_huge_number_stays_finite_and_leaves_other_blocks_alone(codec: str, size: int) -> None:
    flat = vector(*[0] * size)
    flat[-1] = -LARGEST
    most = {"fp16": FP16_MAX, "bf16": BF16_MAX, "topk": FP16_MAX}.get(codec, LARGEST)
    assert back(flat, codec).tolist() == [0] * (size - 1) + [-most]


@every_block_codec
def test_subnormals_alone_in_a_block_come_back(codec: str) -> None:
    flat = vector(LEVELS[codec] * SMALLEST, -3 * SMALLEST, SMALLEST, 0)
    assert back(flat, codec).tolist() == flat.tolist()


@every_codec
def test_what_is_given_is_left_as_it_was_even_strided_or_read_only(codec: str) -> None:
    flat = normal(300)[::2]
    flat.flags.writeable = False
    encoded = encode(flat, codec, 1)
    assert encoded.tobytes() == encode(flat.copy(), codec, 1).tobytes()
    unaligned, strided = payload(b"\0", encoded.tobytes())[1:], np.repeat(encoded, 2)[::2]
    for received in (unaligned, strided):
        assert decode(received, codec, flat.size).tobytes() == back(flat, codec).tobytes()
        assert received.tobytes() == encoded.tobytes()
    assert flat.tobytes() == normal(300)[::2].tobytes()


@every_codec
def test_memory_stays_within_four_copies_of_the_numbers(codec: str) -> None:
    flat = normal(200_000)
    tracemalloc.start()
    back(flat, codec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 4 * flat.nbytes


@every_codec
def test_only_flat_finite_single_precision_is_encoded(codec: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="expected finite numbers"):
            encode(vector(1, bad, 2), codec, 1)
    for flat in (np.zeros(4), np.zeros((2, 2), dtype=np.float32), np.zeros(4, dtype=np.int32)):
        with pytest.raises(ValueError, match="expected a flat float32 array"):
            encode(flat, codec, 1)  # pyright: ignore[reportArgumentType] - that is what is tested


@every_codec
def test_a_payload_of_another_length_type_or_shape_is_refused(codec: str) -> None:
    good = encode(normal(100), codec, 1)
    others = [good[:-1], np.append(good, good[:1]), good[:0], good.view(np.int8), good.astype(np.float32), good[None]]
    for other in others:
        with pytest.raises(ConnectionFailed, match=rf"expected {good.size} bytes \(uint8\) for 100 numbers") as refused:
            decode(other, codec, 100)  # pyright: ignore[reportArgumentType] - that is what is tested
        assert refused.value.code == "E-CODEC"


MALFORMED: dict[str, tuple[str, Payload, int, str]] = {
    "fp32 NaN": ("fp32", payload(vector(1, np.nan)), 2, "NaN or infinity"),
    "fp32 infinity": ("fp32", payload(vector(1, -np.inf)), 2, "NaN or infinity"),
    "fp16 NaN": ("fp16", payload(b"\x01\x7c"), 1, "NaN or infinity"),
    "fp16 infinity": ("fp16", payload(b"\x00\xfc"), 1, "NaN or infinity"),
    "bf16 NaN": ("bf16", payload(b"\x81\x7f"), 1, "NaN or infinity"),
    "bf16 infinity": ("bf16", payload(b"\x80\xff"), 1, "NaN or infinity"),
    "int8 scale NaN": ("int8", payload(vector(np.nan), b"\0"), 1, "finite scales"),
    "int8 scale infinite": ("int8", payload(vector(np.inf), b"\0"), 1, "finite scales"),
    "int8 scale negative": ("int8", payload(vector(-1), b"\1"), 1, "finite scales of at least 0"),
    "int8 code -128": ("int8", payload(vector(1), b"\x80"), 1, "codes from -127 to 127"),
    "int4 scale NaN": ("int4", payload(vector(np.nan), b"\x88"), 1, "finite scales"),
    "int4 scale infinite": ("int4", payload(vector(np.inf), b"\x88"), 1, "finite scales"),
    "int4 scale negative": ("int4", payload(vector(-1), b"\x89"), 1, "finite scales of at least 0"),
    "int4 code -8 in front": ("int4", payload(vector(1), b"\x80"), 2, "codes from -7 to 7"),
    "int4 code -8 behind": ("int4", payload(vector(1), b"\x08"), 2, "codes from -7 to 7"),
    "int4 code after the end": ("int4", payload(vector(1), b"\x98"), 1, "0 after the end"),
    "topk one place short": ("topk", payload(b"\x01", bytes(8)), 40, "2 places among 40 numbers"),
    "topk one place too many": ("topk", payload(b"\x07", bytes(8)), 40, "2 places among 40 numbers"),
    "topk place after the end": ("topk", payload(b"\x00\x02", bytes(2)), 9, "one after the end"),
    "topk NaN": ("topk", payload(b"\x01\x01\x7c"), 1, "NaN or infinity"),
    "topk infinity": ("topk", payload(b"\x01\x00\x7c"), 1, "NaN or infinity"),
}


@pytest.mark.parametrize(("codec", "bad", "size", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_bytes_are_refused_by_name(codec: str, bad: Payload, size: int, message: str) -> None:
    with pytest.raises(ConnectionFailed, match=message) as refused:
        decode(bad, codec, size)
    assert refused.value.code == "E-CODEC"


@every_codec
@given(size=st.integers(0, BLOCK + 2), data=st.data())
def test_any_bytes_are_finite_numbers_or_refused(codec: str, size: int, data: st.DataObject) -> None:
    length = encoded_bytes(codec, size)
    raw = payload(data.draw(st.binary(min_size=length, max_size=length)))
    try:
        decoded = decode(raw, codec, size)
    except ConnectionFailed as refused:
        assert refused.code == "E-CODEC"
    else:
        assert decoded.shape == (size,)
        assert np.isfinite(decoded).all()


def test_an_unknown_codec_is_named_with_the_nearest_known() -> None:
    attempts = (lambda: encode(vector(1), "int88", 1), lambda: decode(payload(b"\0"), "int88", 1))
    for attempt in (*attempts, lambda: encoded_bytes("int88", 1)):
        with pytest.raises(JobError, match=r"topk, got 'int88'\. Did you mean `int8`\?") as unknown:
            attempt()
        assert unknown.value.code == "E-CODEC-UNKNOWN"


def test_a_negative_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 0, got -1"):
        decode(payload(b""), "fp32", -1)
