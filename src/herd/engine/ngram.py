"""Propose draft tokens by lookup: the tokens that followed the last time the same few tokens occurred.

Answers repeat their prompts (summaries, edits of code, tool results) and themselves. This is a draft without
a model (prompt lookup decoding, Saxena 2023; Yang et al., arXiv 2304.04487). The index grows with each token
and is a function of the tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4
"""Tokens at the end that must have occurred before; otherwise one fewer, down to `SHORTEST`."""
SHORTEST = 2


class NGramIndex:
    """An index of where each n-gram of a growing text last ended."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its last occurrence
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` to the text."""
        for token in tokens:
            # an n-gram at the end can be found only once a token follows it
            for gram in self._last_grams():
                self._followed[gram] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that followed the longest repeated ending, if there is one."""
        for gram in self._last_grams():
            if (place := self._followed.get(gram)) is not None:
                return self._tokens[place : place + most]
        return []

    def _last_grams(self) -> list[tuple[int, ...]]:
        longest = min(LONGEST, len(self._tokens))
        return [tuple(self._tokens[-n:]) for n in range(longest, SHORTEST - 1, -1)]
