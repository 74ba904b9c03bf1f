"""An answer that repeats a passage without end is noticed, and one that does not is left alone."""

import random

import pytest
from test_chat_session import Script, joined

from herd.engine import Delta
from herd.engine.chat_session import ChatSession, End, complete
from herd.engine.repetition import MAX_PASSAGE, MIN_TOKENS, RepetitionWatch
from herd.text.tokenizer import Tokenizer


def first_stop(ids: list[int], limit: int) -> int | None:
    """Return the number of tokens at which the watch stops an answer."""
    watch = RepetitionWatch(limit)
    return next((number for number, id_ in enumerate(ids, 1) if watch.feed([id_])), None)


def first_stop_by_definition(ids: list[int], limit: int) -> int | None:
    """Return the same, by comparing the end of every beginning with copies of every passage."""
    for end in range(MIN_TOKENS, len(ids) + 1):
        for length in range(1, MAX_PASSAGE + 1):
            needed = max(limit * length, MIN_TOKENS)
            tail = ids[end - needed : end]
            if needed <= end and tail == [tail[place % length] for place in range(needed)]:
                return end
    return None


@pytest.mark.parametrize("seed", range(12))
def test_the_watch_agrees_with_the_definition(seed):
    rng = random.Random(seed)
    words = rng.choice([2, 3, 40])
    start = [rng.randrange(words) for _ in range(rng.randrange(60))]
    passage = [rng.randrange(words) for _ in range(rng.choice([1, 2, 3, 7, 30, 60]))]
    limit = rng.choice([2, 6, 9])
    ids = start + passage * (10 + 140 // len(passage))
    expected = first_stop_by_definition(ids, limit)
    assert expected is not None
    assert first_stop(ids, limit) == expected


def test_long_passages_and_a_limit_of_zero_are_left_alone():
    passage = list(range(MAX_PASSAGE + 1))
    assert first_stop(passage * 9, 6) is None
    assert first_stop(passage[1:] * 9, 6) == 6 * MAX_PASSAGE
    assert first_stop([7] * 5000, 0) is None


def test_ordinary_rows_are_left_alone():
    table = [5, 6, 6, 6] * (MIN_TOKENS // 4 - 1)  # a long rule, a row of zeros
    lines = [token for number in range(400) for token in (1, 2, number, 3)]  # a numbered list
    assert first_stop(table + lines, 6) is None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["six times seven is forty-two, calculator expression parameters"] * 3, 560)


class Looping(Script):
    """A substitute for an engine whose answers never end."""

    def submit(self, request):
        stream = super().submit(request)
        stream.deltas = (Delta(f"{number % 10} ", (number % 10,)) for number in range(100_000))
        return stream


def test_a_chat_stops_such_an_answer_and_says_so(tokenizer):
    engine = Looping(tokenizer, "", "")
    session = ChatSession(engine)
    text, end = joined(session.ask("Hi"))
    assert isinstance(end, End)
    assert (end.reason, end.n_tokens, engine.cancelled) == ("repetition", MIN_TOKENS, 2)
    assert session.messages[-1]["content"] == text.text
    assert joined(complete(Looping(tokenizer, ""), "x", session.sampling))[-1].reason == "repetition"
