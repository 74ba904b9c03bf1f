"""What a speed feels like: sample text streamed at a predicted pace, after the predicted wait.

Tokens are words and punctuation, cut so that English comes at about the tokenizer's 1.3 tokens a word.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator

SAMPLE = (
    "A llama is led by the bell of another. In the mountains a herd walks in a line, the old ones first, because "
    "they know where the path was before the snow. The young ones carry little and learn the way by walking it; "
    "after a few summers they carry as much as the old ones did, and nobody can say at which turn of the road it "
    "happened. So it is with models, too: a large one that knows the way walks in front, a small one follows, and "
    "what it has learned it carries home on a back that fits through the door. How fast it walks depends on the "
    "road, which here is memory: for every word that you read now, all of its weights were read once, from the "
    "first layer to the last."
)


def pieces(text: str = SAMPLE) -> Iterator[str]:
    """The text in pieces of about a token: a word with the space before it, long ones in two, punctuation."""
    for found in re.finditer(r"\s?\w+|\s?[^\w\s]", text):
        word = found[0]
        if len(word) > 8:
            yield from (word[: len(word) // 2], word[len(word) // 2 :])
        else:
            yield word


def stream(
    wait: float,
    tokens_per_s: float,
    most_seconds: float = 20.0,
    write: Callable[[str], object] | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Wait, at most ``most_seconds``, then write pieces at ``tokens_per_s`` for as long; returns how many it
    were."""
    write = write or _write
    sleep(min(wait, most_seconds))
    count, spent = 0, 0.0
    for piece in pieces():
        if spent >= most_seconds:
            break
        write(piece)
        sleep(1 / tokens_per_s)
        count, spent = count + 1, spent + 1 / tokens_per_s
    return count


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
