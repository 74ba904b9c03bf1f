"""Rows of facts: every trained answer is in the row before, behind the same words."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herd.data.lookup import LEVELS, LookupStream, draw_distance
from herd.data.needle import two_word_names
from herd.errors import DataError


def answers(tokenizer, level: str, context: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Return (ids before, answer) of every complete answer of a row."""
    batch = LookupStream(tokenizer, context, seed, levels=(level,)).batch(3, 1)
    ids, targets = batch.tokens_BT[0].tolist(), batch.targets_BT[0].tolist()
    found = []
    start = None
    for t, target in enumerate([*targets, -100]):
        if target >= 0 and start is None:
            start = t
        elif target < 0 and start is not None:
            found.append((ids[: start + 1], targets[start:t]))
            start = None
    return found


@pytest.mark.parametrize("level", ["pairs", "apart", "names"])
@given(seed=st.integers(0, 10**6))
def test_an_answer_stood_behind_the_same_name(byte_tokenizer, level: str, seed: int) -> None:
    """The oracle: the value is what followed the longest earlier copy of the words before the question."""
    found = answers(byte_tokenizer, level, 128, seed)
    assert found
    for before, answer in found[:-1]:  # the row may end within the last one
        lengths = {n: places(before, n) for n in range(1, 8)}
        longest = max(n for n, at in lengths.items() if at)
        assert longest >= 1 + (level != "pairs") + (level == "names")
        assert any(before[at : at + len(answer)] == answer for at in lengths[longest])


def places(before: list[int], n: int) -> list[int]:
    """Return the positions behind earlier copies of the last ``n`` ids."""
    end = before[-n:]
    return [at + n for at in range(len(before) - n) if before[at : at + n] == end]


@given(seed=st.integers(0, 10**6))
def test_sentences_ask_for_codes_that_were_told(byte_tokenizer, seed: int) -> None:
    for before, answer in answers(byte_tokenizer, "sentences", 700, seed)[:-1]:
        text, code = bytes(before).decode(), bytes(answer).decode()
        assert re.fullmatch(r" [1-9]\d{3}[.\n]", code)
        name = max(two_word_names("train"), key=text.rfind)
        line = next(line for line in text.splitlines() if name in line and re.search(r"\d{4}", line))
        assert code[1:5] in line


def test_rows_do_not_depend_on_how_they_are_asked_for(byte_tokenizer) -> None:
    stream = LookupStream(byte_tokenizer, 64, 3)
    whole = stream.batch(5, 7)
    for i in range(7):
        one = stream.batch(5 + i, 1)
        assert torch.equal(one.tokens_BT[0], whole.tokens_BT[i])
        assert torch.equal(one.targets_BT[0], whole.targets_BT[i])


def test_near_facts_are_asked_most() -> None:
    random = np.random.default_rng(0)
    counts = np.bincount([draw_distance(random, 4) for _ in range(5000)], minlength=5)[1:]
    expected = 5000 * np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)
    assert np.abs(counts / expected - 1).max() < 0.1


@pytest.mark.parametrize(
    "levels, context, match",
    [(("far",), 64, "choose from pairs"), ((), 64, "choose from"), (LEVELS, 31, "give 32 or more")],
)
def test_what_cannot_be_made_is_refused(
    byte_tokenizer, levels: tuple[str, ...], context: int, match: str
) -> None:
    with pytest.raises(DataError, match=match):
        LookupStream(byte_tokenizer, context, 0, levels=levels)
