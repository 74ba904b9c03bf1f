"""Permute 0..n-1 at random, entry by entry, without a list of n numbers.

A Feistel network permutes the numbers below a power of four. Results of n or more are permuted again until
they are below n (cycle walking), and the result is a permutation of 0..n-1. Row 10**12 of a shuffled epoch
costs the same as row 0, so the whole state of a stream is one integer. Source: Black & Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6
MASK = (1 << 64) - 1


def mix(x: np.ndarray) -> np.ndarray:
    """Return splitmix64's finalizer of uint64 numbers: every bit of the result depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mixed_key(*numbers: int) -> int:
    """Return a 64-bit key from integers of any size (seed, epoch, purpose, ...). Their order matters."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            # Python integers may be negative or longer than 64 bits: mix in every word.
            while True:
                word = np.array([number & MASK], dtype=np.uint64)
                state = mix(state + np.uint64(0x9E3779B97F4A7C15) + mix(word + np.uint64(1)))
                number >>= 64
                if number in (0, -1):
                    break
            state = mix(state + np.uint64(number & 1))
    return int(state[0])


def permute(index_N: np.ndarray, n: int, secret: int) -> np.ndarray:
    """Return the images of ``index_N`` under the permutation of 0..n-1 with key ``secret``, (N,) int64."""
    if n < 1 or (len(index_N) and (index_N.min() < 0 or index_N.max() >= n)):
        raise ValueError(f"permute: an index is outside 0..{n - 1}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    out_N = np.asarray(index_N, dtype=np.uint64).copy()
    todo_N = np.arange(len(out_N))
    keys = [np.uint64(mixed_key(secret, round)) for round in range(ROUNDS)]
    while len(todo_N):
        out_N[todo_N] = _feistel(out_N[todo_N], half, keys)
        todo_N = todo_N[out_N[todo_N] >= np.uint64(n)]
    return out_N.astype(np.int64)


def epoch_row(position: int, n_rows: int, seed: int) -> int:
    """Return the row at a position of a stream of ``n_rows`` rows that every epoch has in another order."""
    epoch, row = divmod(position, n_rows)
    return int(permute(np.array([row]), n_rows, mixed_key(seed, epoch))[0])


def generator(*numbers: int) -> np.random.Generator:
    """Return numpy's generator, seeded by several integers. It draws the same numbers on every machine."""
    return np.random.default_rng(mixed_key(*numbers))


def _feistel(x_N: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    bits, low = np.uint64(half), np.uint64((1 << half) - 1)
    left_N, right_N = x_N >> bits, x_N & low
    with np.errstate(over="ignore"):
        for secret in keys:
            left_N, right_N = right_N, left_N ^ (mix(right_N + secret) & low)
    return (left_N << bits) | right_N
