"""The n-gram index, compared with a search by definition."""

from hypothesis import given
from hypothesis import strategies as st

from herd.engine.ngram import LONGEST, SHORTEST, NGramIndex


def looked_up(tokens: list[int], most: int) -> list[int]:
    """Find the last earlier place of the longest possible ending by trying all."""
    for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + most]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6), st.integers(0, 40))
def test_the_index_finds_what_a_search_finds(tokens, most, cut):
    index = NGramIndex(tokens[:cut])
    index.extend(tokens[cut:])
    assert index.propose(most) == looked_up(tokens, most)


def test_the_latest_continuation_is_proposed():
    assert NGramIndex([1, 2, 3, 9, 1, 2, 4, 9, 1, 2]).propose(2) == [4, 9]
    assert NGramIndex([1, 2, 3, 4]).propose(2) == []
    assert NGramIndex([7, 7, 7, 7, 7]).propose(3) == [7]
