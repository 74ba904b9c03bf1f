"""Propose draft tokens by lookup: those that followed the latest occurrence of the same few tokens.

Answers repeat their prompts (summaries, edits of code, tool results) and themselves. This is a draft without
a model (prompt lookup decoding, Saxena 2023; Yang et al., arXiv 2304.04487). The index grows with each token
and depends only on the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4
"""Length of the ending that is looked up first. Shorter endings follow."""
SHORTEST = 2
"""Length of the shortest ending that is looked up."""


class NGramIndex:
    """An index of the latest occurrence of each n-gram of a growing text."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._next_index: dict[tuple[int, ...], int] = {}  # after the latest occurrence of each n-gram
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` to the text."""
        for token in tokens:
            # an n-gram at the end can be found only once a token follows it
            for gram in self._last_grams():
                self._next_index[gram] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that followed the longest repeated ending, or [] if there is none."""
        for gram in self._last_grams():
            if (index := self._next_index.get(gram)) is not None:
                return self._tokens[index : index + most]
        return []

    def _last_grams(self) -> list[tuple[int, ...]]:
        longest = min(LONGEST, len(self._tokens))
        return [tuple(self._tokens[-n:]) for n in range(longest, SHORTEST - 1, -1)]
