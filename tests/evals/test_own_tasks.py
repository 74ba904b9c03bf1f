"""Tasks of the project's own: its tool dialogs, and the same text in many languages."""

import json

import pytest
from gold import gold_answer, judged

from herd.evals.results import ItemResult
from herd.evals.tasks import Data, make_task
from herd.evals.tasks.task import Answer


@pytest.mark.parametrize("name", ["tool_calls", "tool_answers"])
def test_dialogs_have_right_and_wrong_answers(name):
    task = make_task(name, mode="instruct")
    items = task.items(Data())
    assert len({item.id for item in items}) == 200
    assert {item.id.partition("-")[2] for item in items} == {"json", "builtin", "function"}
    assert all(j.value == 1 for j in judged(task, items[::4], right=True))
    assert all(j.value == 0 and j.why for j in judged(task, items[::4], right=False))


def test_an_answer_that_calls_again_is_none():
    task = make_task("tool_answers", mode="instruct")
    item = task.items(Data())[0]
    text = json.dumps({"name": "x", "parameters": {"a": item.gold}})
    assert task.judge(item, Answer(text)).value == 0


def scored(task, items, right=True):
    results = [
        ItemResult(item.id, j.value, None, None, None, item.group, j.metrics)
        for item, j in zip(items, judged(task, items, right), strict=True)
    ]
    return {score.name: score for score in task.scores(results)}


def test_bits_per_byte_by_language_on_own_text():
    task = make_task("bpb_sentences")
    items = task.items(Data())
    assert {item.group for item in items} == {"en", "de", "fr", "it", "pt", "hi", "es", "th", "ja"}
    found = scored(task, items)
    assert found["bpb"].value == pytest.approx(1.0)
    assert found["bpb"].detail["by_group"]["th"]["value"] == pytest.approx(1.0)
    assert scored(task, items, right=False)["bpb"].value == 0
    assert "held-out sentences" in task.note(Data())


def test_a_window_holds_as_many_words_as_its_tokens_allow(real_data):
    task = make_task("bpb_sentences")
    items = task.items(Data(real_data("ud_pud_parallel").parent))
    assert len(items) == 1_000
    results = []
    for item in items:  # a model with a token for every word, and twice as many for German
        words = len(item.doc["text"].split()) * (2 if item.group == "de" else 1)
        metrics = task.judge(item, gold_answer(task, item, True)).metrics | {"tokens": words}
        results.append(ItemResult(item.id, 1.0, None, None, None, item.group, metrics))
    found = {score.name: score for score in task.scores(results)}
    by_group = found["english_words_per_128k"].detail["by_group"]
    assert by_group["en"]["value"] == pytest.approx(131_072)
    assert found["words_per_128k"].detail["by_group"]["de"]["value"] == pytest.approx(65_536)
    assert by_group["de"]["value"] < by_group["en"]["value"] < 131_073
    assert by_group["de"]["lo"] < by_group["de"]["value"] < by_group["de"]["hi"]
