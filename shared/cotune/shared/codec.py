"""Codecs: one flat fp32 array as fewer bytes, and back.

They work on what is public already (noised updates, the global adapter), with public randomness: post-processing,
which costs no privacy (Dwork and Roth 2014, proposition 2.1). Bytes are little-endian on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cotune.shared.adapter import Vector
from cotune.shared.errors import ConnectionFailed, JobError, did_you_mean

CodecName = Literal["fp32", "fp16", "bf16", "int8", "int4", "topk"]
Payload = NDArray[np.uint8]

FP16_MAX = 65504.0
BF16_MAX = (2 - 2.0**-7) * 2.0**127
# A block's scale is its largest magnitude in fp32: every block has one, and that number comes back exactly. In fp16
# it would save 3 % (int8) or 6 % (int4) of the bytes, round blocks under 3e-8 to 0 and cut those over 65504.
BLOCK = 64
INT8_LEVELS = 127
INT4_LEVELS = 7
TOPK_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One way to write numbers, and what is known of it.

    Attributes:
        encode: (finite numbers of shape (n,), seed) -> bytes of shape (`length(n)`,).
        decode: (bytes of shape (`length(n)`,), n) -> numbers of shape (n,), perhaps not finite.
        length: n -> bytes.
        lossless: Every number comes back bit by bit.
        unbiased: The mean over seeds is the number itself, but for fp32 rounding.
        bits: Bits per number of a long array.
        description: One line for people.
    """

    encode: Callable[[Vector, int], Payload]
    decode: Callable[[Payload, int], Vector]
    length: Callable[[int], int]
    lossless: bool
    unbiased: bool
    bits: float
    description: str


def encode(flat: Vector, codec: str, seed: int) -> Payload:
    """Write numbers of shape (n,) as bytes of shape (`encoded_bytes(codec, n)`,).

    Args:
        flat: What to write.
        codec: A name in `CODECS`.
        seed: Public randomness of the stochastic rounding, at least 0; the same seed gives the same bytes.

    Raises:
        JobError: There is no such codec.
        ValueError: Not a flat fp32 array, or a number is NaN or infinite.
    """
    chosen = _codec(codec)
    if flat.dtype != np.float32 or flat.ndim != 1:
        raise ValueError(f"expected a flat float32 array, got {flat.dtype} of shape {flat.shape}")
    if not np.isfinite(flat).all():
        raise ValueError("expected finite numbers, got NaN or infinity")
    return chosen.encode(flat, seed)


def decode(payload: Payload, codec: str, size: int) -> Vector:
    """Read `size` finite numbers, shape (size,), from bytes that came from outside.

    Raises:
        JobError: There is no such codec.
        ConnectionFailed: The bytes are not what `encode` writes for `size` numbers.
        ValueError: The size is negative.
    """
    chosen = _codec(codec)
    expected = encoded_bytes(codec, size)
    if payload.dtype != np.uint8 or payload.shape != (expected,):
        raise _refused(f"{expected} bytes (uint8) for {size} numbers, got {payload.dtype} of shape {payload.shape}")
    flat = chosen.decode(np.ascontiguousarray(payload), size)
    if not np.isfinite(flat).all():
        raise _refused("finite numbers, got NaN or infinity")
    return flat


def encoded_bytes(codec: str, size: int) -> int:
    """Exact length of the payload for `size` numbers, in bytes.

    Raises:
        JobError: There is no such codec.
        ValueError: The size is negative.
    """
    if size < 0:
        raise ValueError(f"expected a size of at least 0, got {size}")
    return _codec(codec).length(size)


def _codec(name: str) -> Codec:
    if name not in CODECS:
        raise JobError(
            "E-CODEC-UNKNOWN", f"expected a codec of {', '.join(CODECS)}, got {name!r}.{did_you_mean(name, CODECS)}"
        )
    return CODECS[name]


def _refused(expected: str) -> ConnectionFailed:
    return ConnectionFailed("E-CODEC", f"encoded numbers: expected {expected}")


def _to_fp32(flat: Vector, _seed: int) -> Payload:
    return flat.astype("<f4").view(np.uint8)


def _from_fp32(payload: Payload, _size: int) -> Vector:
    return payload.view("<f4").astype(np.float32)


def _to_fp16(flat: Vector, _seed: int = 0) -> Payload:
    return np.clip(flat, -FP16_MAX, FP16_MAX).astype("<f2").view(np.uint8)


def _from_fp16(payload: Payload, _size: int) -> Vector:
    return payload.view("<f2").astype(np.float32)


def _to_bf16(flat: Vector, _seed: int) -> Payload:
    """The upper 16 bits of fp32, to nearest, ties to even: just under half a unit is added, all of it if odd."""
    bits = np.clip(flat, -BF16_MAX, BF16_MAX).view(np.uint32)
    bits += 0x7FFF + (bits >> 16 & 1)
    return (bits >> 16).astype("<u2").view(np.uint8)


def _from_bf16(payload: Payload, _size: int) -> Vector:
    bits = payload.view("<u2").astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _quantise(flat: Vector, levels: int, seed: int) -> tuple[Payload, NDArray[np.int8]]:
    """Stochastic rounding of each block to multiples of its largest magnitude / levels.

    Alistarh et al. 2017 (QSGD), section 3, with the maximum norm. A number's error is under one such step;
    it is rounded up with the probability that makes the mean right, to 2^-24.

    Returns:
        Scales as bytes, shape (4 blocks,), and codes from -levels to levels, shape (64 blocks,), 0 after the end.
    """
    scaled = np.zeros((_blocks(flat.size), BLOCK), dtype=np.float32)
    scaled.reshape(-1)[: flat.size] = flat
    scales = np.maximum(scaled.max(axis=1), -scaled.min(axis=1))
    scaled /= np.where(scales > 0, scales, np.float32(1))[:, None]
    scaled *= levels
    lower = np.floor(scaled)
    scaled -= lower
    lower += np.random.Generator(np.random.PCG64(seed)).random(scaled.shape, dtype=np.float32) < scaled
    return scales.astype("<f4").view(np.uint8), lower.astype(np.int8).reshape(-1)


def _restore(scale_bytes: Payload, codes: NDArray[np.int8], levels: int, size: int) -> Vector:
    scales = scale_bytes.view("<f4")
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise _refused("finite scales of at least 0, got another")
    if codes.min(initial=0) < -levels or codes[size:].any():
        raise _refused(f"codes from {-levels} to {levels} and 0 after the end, got another")
    values = np.zeros((_blocks(size), BLOCK), dtype=np.float32)
    values.reshape(-1)[:size] = codes[:size]
    values /= levels  # before the scale: the product is within the scale and cannot overflow
    values *= scales[:, None]
    return values.reshape(-1)[:size]


def _to_int8(flat: Vector, seed: int) -> Payload:
    scales, codes = _quantise(flat, INT8_LEVELS, seed)
    return np.concatenate([scales, codes[: flat.size].view(np.uint8)])


def _from_int8(payload: Payload, size: int) -> Vector:
    start = 4 * _blocks(size)
    return _restore(payload[:start], payload[start:].view(np.int8), INT8_LEVELS, size)


def _to_int4(flat: Vector, seed: int) -> Payload:
    """Two codes a byte, the first in the lower half, each plus 8."""
    scales, codes = _quantise(flat, INT4_LEVELS, seed)
    codes += 8
    low, high = codes.view(np.uint8).reshape(-1, 2).T
    high <<= 4
    return np.concatenate([scales, (low | high)[: -(-flat.size // 2)]])


def _from_int4(payload: Payload, size: int) -> Vector:
    start = 4 * _blocks(size)
    pairs = payload[start:]
    codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1).view(np.int8)
    codes -= 8
    return _restore(payload[:start], codes, INT4_LEVELS, size)


def _kept(size: int) -> int:
    return min(size, max(1, int(TOPK_SHARE * size)))


def _to_topk(flat: Vector, _seed: int) -> Payload:
    """A bitmap of the places kept, first place in the lowest bit, then their numbers in fp16.

    A bit per number is less than four bytes per kept one (1.6 bits), and no place can be named twice.
    Stich et al. 2018, section 2, without its memory of what was left out. Of equal magnitudes the first are kept.
    """
    kept = _kept(flat.size)
    keep = np.zeros(flat.size, dtype=np.bool_)
    if kept:
        magnitude = np.abs(flat)
        least = np.partition(magnitude, flat.size - kept)[flat.size - kept]
        np.greater(magnitude, least, out=keep)
        keep[np.flatnonzero(magnitude == least)[: kept - np.count_nonzero(keep)]] = True
    return np.concatenate([np.packbits(keep, bitorder="little"), _to_fp16(flat[keep])])


def _from_topk(payload: Payload, size: int) -> Vector:
    kept, start = _kept(size), -(-size // 8)
    keep = np.unpackbits(payload[:start], bitorder="little").view(np.bool_)
    if keep[size:].any() or np.count_nonzero(keep) != kept:
        raise _refused(f"{kept} places among {size} numbers, got another number of them or one after the end")
    flat = np.zeros(size, dtype=np.float32)
    flat[keep[:size]] = _from_fp16(payload[start:], kept)
    return flat


CODECS: dict[CodecName, Codec] = {
    "fp32": Codec(
        encode=_to_fp32,
        decode=_from_fp32,
        length=lambda size: 4 * size,
        lossless=True,
        unbiased=True,
        bits=32,
        description="as it is",
    ),
    "fp16": Codec(
        encode=_to_fp16,
        decode=_from_fp16,
        length=lambda size: 2 * size,
        lossless=False,
        unbiased=False,
        bits=16,
        description="half precision, to nearest: 11 significant bits down to 6e-5, saturates at 65504",
    ),
    "bf16": Codec(
        encode=_to_bf16,
        decode=_from_bf16,
        length=lambda size: 2 * size,
        lossless=False,
        unbiased=False,
        bits=16,
        description="the upper half of fp32, to nearest: 8 significant bits over its whole range",
    ),
    "int8": Codec(
        encode=_to_int8,
        decode=_from_int8,
        length=lambda size: 4 * _blocks(size) + size,
        lossless=False,
        unbiased=True,
        bits=8 + 32 / BLOCK,
        description=f"blocks of {BLOCK} stochastically rounded to 1/{INT8_LEVELS} of their largest magnitude",
    ),
    "int4": Codec(
        encode=_to_int4,
        decode=_from_int4,
        length=lambda size: 4 * _blocks(size) + -(-size // 2),
        lossless=False,
        unbiased=True,
        bits=4 + 32 / BLOCK,
        description=f"blocks of {BLOCK} stochastically rounded to 1/{INT4_LEVELS} of their largest magnitude",
    ),
    "topk": Codec(
        encode=_to_topk,
        decode=_from_topk,
        length=lambda size: -(-size // 8) + 2 * _kept(size),
        lossless=False,
        unbiased=False,
        bits=1 + 16 * TOPK_SHARE,
        description=f"the {TOPK_SHARE:.0%} of largest magnitude in fp16, zero for the others",
    ),
}
