"""Show what a speed feels like: sample text printed at a predicted pace, after the predicted wait."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator

SAMPLE = (
    "A llama is led by the bell of another. In the mountains a herd walks in a line, the old ones first, "
    "because "
    "they know where the path was before the snow. The young ones carry little and learn the way by "
    "walking it; "
    "after a few summers they carry as much as the old ones did, and nobody can say at which turn of the "
    "road it "
    "happened. So it is with models, too: a large one that knows the way walks in front, a small one "
    "follows, and "
    "what it has learned it carries home on a back that fits through the door. How fast it walks depends "
    "on the "
    "road, which here is memory: for every word that you read now, all of its weights were read once, "
    "from the "
    "first layer to the last."
)


def sample_tokens() -> Iterator[str]:
    """Yield the sample in pieces of about a token: words with the space before them, long ones in two halves.

    English then has about 1.3 pieces per word, as with the tokenizer.
    """
    for found in re.finditer(r"\s?\w+|\s?[^\w\s]", SAMPLE):
        word = found[0]
        middle = len(word) // 2 if len(word) > 8 else len(word)
        yield from filter(None, (word[:middle], word[middle:]))


def print_at_speed(
    wait: float,
    tokens_per_s: float,
    most_seconds: float = 20.0,
    write: Callable[[str], object] | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Wait, then print tokens at ``tokens_per_s``, both at most ``most_seconds``; return how many."""
    sleep(min(wait, most_seconds))
    count = 0
    for token in sample_tokens():
        if count / tokens_per_s >= most_seconds:
            break
        (write or sys.stdout.write)(token)
        sys.stdout.flush()
        sleep(1 / tokens_per_s)
        count += 1
    return count
