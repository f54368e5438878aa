"""Cryptographic randomness for batches and noise: a ChaCha20 stream keyed by the operating system."""

from __future__ import annotations

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

SUMMED_DRAWS = 4


class RandomStream:
    """An endless stream of random numbers; two streams with different keys are independent.

    Guarantee: numbers are ChaCha20 key stream (RFC 8439) under a 256-bit key, so that nobody without the key
    tells them from uniform bits. No method depends on, or changes, a global generator.

    Edge cases: asking for 0 numbers gives an empty array.
    """

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(ChaCha20(key, b"\0" * 16), mode=None).encryptor()

    def uniform_bits(self, count: int) -> NDArray[np.uint64]:
        """`count` independent uniform 64-bit integers."""
        return np.frombuffer(self._encryptor.update(b"\0" * (8 * count)), dtype="<u8").astype(np.uint64)

    def normal(self, count: int) -> NDArray[np.float64]:
        """`count` independent standard normal numbers in float64, by Box-Muller.

        Each is the sum of four draws divided by two, which spreads the gaps between the floating-point
        numbers one draw can give (Holohan and Braghin 2021, "Secure random sampling in differential
        privacy", section 5).
        """
        pairs = (count + 1) // 2
        draws = np.zeros(2 * pairs)
        for _ in range(SUMMED_DRAWS):
            bits = self.uniform_bits(2 * pairs) >> np.uint64(11)
            radius = np.sqrt(-2.0 * np.log((bits[:pairs] + np.uint64(1)) * 2.0**-53))
            angle = 2.0 * np.pi * (bits[pairs:] * 2.0**-53)
            draws += np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return draws[:count] / np.sqrt(SUMMED_DRAWS)


def secure_stream() -> RandomStream:
    """A stream under a fresh key from the operating system. The key is never stored or shown."""
    return RandomStream(os.urandom(32))


def reproducible_stream(seed: int, site: str, round_number: int) -> RandomStream:
    """TEST MODE, NOT PRIVATE: a stream anybody can reproduce, for comparing engines bit by bit.

    Reached only by `privacy.noise = "test"`, which makes every artefact of the run say that it is not private.
    """
    return RandomStream(hashlib.sha256(f"cotune test noise|{seed}|{site}|{round_number}".encode()).digest())
