"""Find near-duplicates among texts: the same 5-word shingles, estimated by MinHash (Broder, 1997).

Every text gets 64 minima of hashes of its shingles. The fraction of equal minima estimates the Jaccard
similarity of two sets of shingles. Texts that share a band of four minima are compared, which finds pairs of
similarity 0.8 with a probability of 0.9998. Hashes are BLAKE2's, so the result is the same on every machine.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5
N_HASHES, BAND = 64, 4
_WORD = re.compile(r"\w+")


class NearDuplicates:
    """The texts seen so far. ``threshold`` is the similarity from which two texts count as the same."""

    def __init__(self, threshold: float = 0.8) -> None:
        self.threshold = threshold
        rng = np.random.default_rng(0)
        self._factors_H = rng.integers(0, 1 << 63, N_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._seen: list[NDArray[np.uint64]] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def add(self, text: str) -> bool:
        """Add a text. Return whether a similar one was added before. Such a text is not remembered."""
        minima_H = self._minima(text)
        bands = [(at, minima_H[at : at + BAND].tobytes()) for at in range(0, N_HASHES, BAND)]
        for other in {number for band in bands for number in self._bands.get(band, ())}:
            if float((self._seen[other] == minima_H).mean()) >= self.threshold:
                return True
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._seen))
        self._seen.append(minima_H)
        return False

    def _minima(self, text: str) -> NDArray[np.uint64]:
        words = _WORD.findall(text.lower())
        n = max(1, len(words) - SHINGLE + 1)
        shingles = {" ".join(words[start : start + SHINGLE]) for start in range(n)}
        digests = (hashlib.blake2b(shingle.encode(), digest_size=8).digest() for shingle in shingles)
        hashes_S = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
        # modulo 2^64: a permutation for each odd factor
        return (hashes_S[:, None] * self._factors_H).min(axis=0)
