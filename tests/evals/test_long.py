"""Long texts: as long as asked, the answer in them where it should be, names and codes that training never saw."""

import re
from collections import Counter

import pytest
from gold import gold_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.data.needle import TEST_EVERY, WORDS
from herd.errors import DataError
from herd.evals.ruler import CALM, KINDS, LongQuestion, Maker, Passage, share_found
from herd.evals.tasks import Data, make_task
from herd.evals.tasks.long import DEPTHS, LENGTHS, PER_LENGTH, bytes_as_tokens
from herd.evals.tasks.task import Answer

PASSAGES = [Passage(f"The number of house {n} is {n}{n}. It is painted green.", f"House {n}?", (f"{n}{n}",))
            for n in range(10, 40)]  # fmt: skip


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(bytes_as_tokens, passages=PASSAGES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [700, 4_096])
def test_as_long_as_asked_and_answerable(maker, kind, length):
    found = maker.make(kind, length, 0.5, 3)
    assert found == maker.make(kind, length, 0.5, 3)
    assert found.text != maker.make(kind, length, 0.5, 4).text
    assert found.n_tokens <= length
    if kind not in ("questions", "common_words"):  # which end with what they have
        assert found.n_tokens > length - 60
    assert share_found(found, f"It is {' and '.join(found.expected)}.") == 1
    assert share_found(found, "I do not know.") == 0
    if not found.any_of:
        assert share_found(found, found.expected[0]) == pytest.approx(1 / len(found.expected))
        assert all(re.search(rf"\b{one}\b", found.text) for one in found.expected)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_single_needle_stands_at_its_depth(seed, depth):
    found = Maker(bytes_as_tokens).make("single", 2_000, depth, seed)
    lines = found.text.split("\n")
    at = [n for n, line in enumerate(lines) if found.expected[0] in line]
    assert len(at) == 1
    assert abs(at[0] / (len(lines) - 1) - depth) < 0.02


@pytest.mark.parametrize("kind", ["single", "multikey", "multivalue", "multiquery", "distractors"])
def test_names_and_codes_are_not_those_of_training(maker, kind):
    trained = {word for words in WORDS["train"] for word in words}
    for seed in range(10):
        found = maker.make(kind, 1_500, 0.2, seed)
        facts = re.findall(r"The secret code for (.+) is (\d+)\.", found.text)
        assert facts
        for name, code in facts:
            assert not trained & set(name.split())
            assert int(code) % TEST_EVERY == 0


def test_chains_lead_from_the_value_to_every_variable(maker):
    for seed in range(20):
        found = maker.make("variables", 1_200, seed / 20, seed)
        value = re.search(r"the value (\d+)", found.question)[1]
        known = {value}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", found.text):  # in the order of the text
            if source in known:
                known.add(name)
        assert known - {value} == set(found.expected)


def test_counts_are_as_promised(maker):
    found = maker.make("common_words", 4_000, 0, 1)
    assert {word for word, _ in Counter(found.text.split()).most_common(10)} == set(found.expected)
    found = maker.make("frequent_words", 4_000, 0, 1)
    assert [word for word, _ in Counter(found.text.split()).most_common(3)] == list(found.expected)


def test_questions_have_their_paragraph_once(maker):
    found = maker.make("questions", 500, 1.0, 2)
    assert found.text.split("\n")[-1].startswith("The number of house")
    assert found.text.count(found.expected[0]) == 1


def test_too_short_and_unknown_say_so(maker):
    with pytest.raises(DataError, match="too short for this question"):
        maker.make("multiquery", 40, 0.5, 0)
    with pytest.raises(DataError, match="unknown kind"):
        maker.make("riddle", 400, 0.5, 0)
    with pytest.raises(DataError, match=r"squad/validation\.jsonl"):
        Maker(bytes_as_tokens).make("questions", 400, 0.5, 0)


def test_numbers_must_stand_alone():
    found = LongQuestion("", "", "", ("4715",), 0)
    assert share_found(found, "14715 47150") == 0
    assert share_found(found, "4715.") == 1


class _Small:
    context, mode = 2_048, "instruct"

    def count(self, text: str) -> int:
        return len(text.split())


def test_tasks_fit_themselves_to_the_model():
    task = make_task("needle_single", mode="instruct").fitted(_Small())
    assert task.settings["lengths"] == [512, 1_024, 2_048]
    items = task.items(Data())
    assert len(items) == 3 * PER_LENGTH
    assert {item.group for item in items[:3]} == {"512", "1,024", "2,048"}
    for item in items:
        assert len(item.request.prompt[0]["content"].split()) + item.request.max_tokens <= int(
            item.id.split("/")[0]
        )
    judged = [task.judge(item, gold_answer(task, item, n % 2 == 0)).value for n, item in enumerate(items)]
    assert judged == [1.0, 0.0] * (len(items) // 2)
    assert make_task("needle_multi").fitted(object()).settings["lengths"] == list(LENGTHS)


def test_of_short_contexts_those_lengths_remain_that_hold_the_question():
    def fitted(name: str, context: int):
        model = type("Model", (), {"context": context, "count": staticmethod(lambda text: len(text) // 2)})
        return make_task(name, mode="instruct").fitted(model())

    task = fitted("needle_single", 256)
    assert task.settings["lengths"] == [128, 256]
    assert {item.group for item in task.items(Data())} == {"256"}
    assert task.note(Data()).endswith("lengths 256 tokens")
    with pytest.raises(
        DataError, match=r"a context of .* tokens is too short for this task \(a text of .*\); use a model"
    ):
        fitted("needle_multi", 256).items(Data())
    with pytest.raises(DataError, match="use a model with a longer context"):
        fitted("needle_single", 100).items(Data())


def test_grid_of_length_and_depth():
    from herd.evals.results import ItemResult

    task = make_task("needle_single").fitted(_Small())
    results = [
        ItemResult(item.id, float("/0.50/" in item.id), item.gold, "", "", item.group)
        for item in task.items(Data())
    ]
    score = task.scores(results)[0]
    grid = {(cell["length"], cell["depth"]): cell["value"] for cell in score.detail["grid"]}
    assert len(grid) == 3 * len(DEPTHS)
    assert all(value == (depth == 0.5) for (_, depth), value in grid.items())
    assert set(score.detail["by_group"]) == {"512", "1,024", "2,048"}


@pytest.mark.parametrize("name", ["needle_multi", "ruler_questions", "ruler_variables"])
def test_builtin_items_of_every_kind(name):
    task = make_task(name).fitted(type("Model", (_Small,), {"context": 1_024})())
    items = task.items(Data())
    assert all(task.judge(item, gold_answer(task, item, True)).value == 1 for item in items)
    assert not any(task.judge(item, gold_answer(task, item, False)).value for item in items)
    assert task.judge(items[0], Answer("\0" * 9999)).value == 0


def test_lines_say_nothing():
    assert not {word for line in CALM for word in re.findall(r"\w+", line.lower())} & {
        word for words in WORDS["test"] for word in words
    }
