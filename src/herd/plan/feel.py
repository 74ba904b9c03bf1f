"""Print sample text at a predicted speed, after the predicted wait, to show what the speed feels like."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SAMPLE = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").strip()


def sample_tokens() -> Iterator[str]:
    """Yield the sample text in pieces of about one token: a word with its space, or half a long word.

    English has about 1.3 pieces per word, as with Llama 3's tokenizer.
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
    """Wait, then print tokens at ``tokens_per_s``, each for at most ``most_seconds``. Return their number."""
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
