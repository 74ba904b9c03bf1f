"""Shared runs of 13 words are found wherever they stand, and nothing else is."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.errors import DataError
from herd.evals import contamination
from herd.evals.contamination import WORDS, grams, overlaps, own_text
from herd.evals.tasks import Data, make_task
from herd.evals.tasks.task import Generate, Item, Rank


def item(text: str, id_: str = "0") -> Item:
    return Item(id_, Generate(text), None)


def words(n: int, start: int = 0) -> str:
    return " ".join(f"w{i}" for i in range(start, start + n))


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from("abcde"), max_size=60),
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=200),
)
def test_same_as_comparing_words(test, corpus):
    def runs(some):
        return {tuple(some[i : i + WORDS]) for i in range(len(some) - WORDS + 1)}

    found = overlaps({"t": [item(" ".join(test))]}, [" ".join(corpus)], "c")["t"]
    assert bool(found.hit) == bool(runs(test) & runs(corpus))
    assert bool(found.short) == (len(test) < WORDS)


def test_thirteen_words_are_enough_and_twelve_are_not():
    tests = {"t": [item(f"x {words(13)} y", "hit"), item(words(12), "short"), item(words(40, 100), "clean")]}
    found = overlaps(tests, [f"so. {words(13).upper()}, and on", words(12, 100)], "c")["t"]
    assert (found.hit, found.clean, found.short) == (["hit"], ["clean"], ["short"])
    assert found.share == 0.5
    record = found.record({"hit": 1.0, "short": 0.0, "clean": 1.0})
    assert record["score_without"] == 0.5
    assert record["share_of_grams"] == pytest.approx(1 / (3 + 28))


def test_across_the_seam_of_pieces(monkeypatch):
    monkeypatch.setattr(contamination, "PIECE_WORDS", 20)
    for start in range(30):
        assert overlaps({"t": [item(words(13, start))]}, [words(60)], "c")["t"].hit


def test_memory_does_not_grow_with_the_corpus():
    tests = {"t": [item(words(50))]}
    peaks = []
    for n in (20, 200):
        tracemalloc.start()
        overlaps(tests, (f"{words(2_000, 1_000)} {i}" for i in range(n)), "c")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_gold_answer_belongs_to_an_item_and_shots_do_not():
    assert own_text(Item("0", Rank((("Q:", " no"), ("Q:", " yes"))), 1)) == "Q: yes"
    tasks = {"boolq": make_task("boolq", shots=0).items(Data())}
    text = own_text(tasks["boolq"][3])
    found = overlaps(tasks, ["other words", f"... {text} ..."], "c")["boolq"]
    assert found.hit == [tasks["boolq"][3].id]


def test_empty_corpus_is_refused():
    with pytest.raises(DataError, match="no text"):
        overlaps({"t": [item(words(13))]}, [" ", ""], "c")


def test_few_words_have_no_grams():
    assert len(grams("one two")) == 0
    assert len(grams(words(13))) == 1
