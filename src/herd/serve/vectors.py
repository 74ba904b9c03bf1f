"""The numbers of embeddings as OpenAI's API writes them: a list, or in base64 as fp32, lowest byte first."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any


def vector_text(vector: Sequence[float]) -> str:
    """Return numbers in base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def read_vector(value: Any) -> Sequence[float]:
    """Return the numbers of an embedding. Raises ValueError, TypeError or struct.error for anything else."""
    if isinstance(value, str):
        raw = base64.b64decode(value, validate=True)
        numbers: Sequence[float] = struct.unpack(f"<{len(raw) // 4}f", raw)
    else:
        numbers = list(map(float, value))
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("an embedding is empty, or has a number that is not finite")
    return numbers
