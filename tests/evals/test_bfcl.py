"""BFCL's judge: the data's own possible answers are right, and whatever is changed in them is wrong."""

from dataclasses import replace

import pytest
from gold import expected_calls, gold_answer

from herd.evals.bfcl import tool_schema, why_wrong
from herd.evals.tasks.calls import CATEGORIES, Bfcl
from herd.evals.tasks.data import Data
from herd.evals.tasks.task import Answer
from herd.text.toolcall_grammar import ToolCall

AREA = {
    "name": "area",
    "description": "Area of a shape.",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer", "description": "b"},
            "height": {"type": "float", "description": "h"},
            "unit": {"type": "string", "description": "u"},
            "sides": {"type": "array", "items": {"type": "string"}, "description": "s"},
            "options": {"type": "dict", "properties": {"round": {"type": "boolean"}}, "description": "o"},
        },
        "required": ["base"],
    },
}
EXPECTED = [{"area": {"base": [10], "height": [5.0, 6.0], "unit": ["square metres", ""], "sides": [["A.", "b"], ""],
                      "options": [{"round": [True], "note": ["", "x"]}, ""]}}]  # fmt: skip


def call(**arguments) -> ToolCall:
    return ToolCall("area", {"base": 10, "height": 5.0} | arguments, "json")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"height": 6},  # an integer where a float is asked
        {"unit": "Square-Metres"},
        {"sides": ["a", "B"]},
        {"options": {"round": True}},
        {"options": {"round": True, "note": "X"}},
    ],
)
def test_right_calls(arguments):
    assert why_wrong([call(**arguments)], [AREA], EXPECTED) == ""


@pytest.mark.parametrize(
    "calls, why",
    [
        ([], "0 calls instead of 1"),
        ([call(), call()], "2 calls instead of 1"),
        ([replace(call(), name="volume")], "calls volume, not area"),
        ([ToolCall("area", {"height": 5.0}, "json")], "base is missing"),
        ([ToolCall("area", {"base": 10}, "json")], "height is missing"),
        ([call(base=11)], "base is 11, not among [10]"),
        ([call(base=10.0)], "base is 10.0, not of type integer"),
        ([call(base=True)], "base is True, not of type integer"),
        ([call(colour="red")], "area has no argument colour"),
        ([call(unit="feet")], "unit is 'feet', not among ['square metres', '']"),
        ([call(sides=["b", "A."])], "sides is ['b', 'A.'], not among [['A.', 'b'], '']"),
        ([call(sides=[1])], "sides is [1], not among"),
        ([call(options={"round": False})], "options is {'round': False}, not among"),
        ([call(options={"round": True, "more": 1})], "options is {'round': True, 'more': 1}, not among"),
    ],
)
def test_wrong_calls_say_why(calls, why):
    assert why_wrong(calls, [AREA], EXPECTED).startswith(why)


def test_parallel_calls_in_any_order_each_once():
    two = [{"area": {"base": [1], "height": [2.0]}}, {"area": {"base": [3], "height": [4.0]}}]
    first, second = call(base=1, height=2.0), call(base=3, height=4.0)
    assert why_wrong([second, first], [AREA], two) == ""
    assert why_wrong([first, first], [AREA], two).startswith("no call matches area")


def test_no_function_fits():
    assert why_wrong([], [AREA], []) == ""
    assert "no function fits" in why_wrong([call()], [AREA], [])


def test_schema_in_json_terms():
    parameters = tool_schema(AREA)["parameters"]
    assert parameters["type"] == "object"
    assert parameters["properties"]["height"]["type"] == "number"
    assert parameters["properties"]["sides"]["items"]["type"] == "string"


def test_every_real_item_has_a_right_and_a_wrong_answer(real_data):
    task = Bfcl("bfcl", 0, "instruct")
    data = Data(real_data("bfcl").parent)
    items = task.items(data)
    assert len(items) == len({item.id for item in items}) == 400 + 3 * 200 + 240 + 258 + 16
    assert {item.group for item in items} == set(CATEGORIES)
    assert {item.group for item in items[: len(CATEGORIES)]} == set(CATEGORIES)
    assert all(task.judge(item, gold_answer(task, item, True)).value == 1 for item in items)
    assert not any(task.judge(item, gold_answer(task, item, False)).value for item in items)
    assert task.note(data) == ""


def test_every_changed_argument_of_real_items_is_wrong(real_data):
    items = Bfcl("bfcl", 0, "instruct").items(Data(real_data("bfcl").parent))
    changed = 0
    for item in items:
        calls = expected_calls(item.gold, item.doc["functions"])
        for number, made in enumerate(calls):
            for key, value in made.arguments.items():
                other = not value if isinstance(value, bool) else {"x": value}
                bad = replace(made, arguments=made.arguments | {key: other})
                possible = item.gold[number][made.name][key]
                if isinstance(value, bool) and other in possible:
                    continue
                assert why_wrong(
                    [*calls[:number], bad, *calls[number + 1 :]], item.doc["functions"], item.gold
                )
                changed += 1
    assert changed > 3000


def test_hostile_answers_are_wrong_and_harmless(real_data):
    task = Bfcl("bfcl", 0, "instruct")
    item = next(i for i in task.items(Data(real_data("bfcl").parent)) if i.group == "simple_python")
    for text in ("\0" * 1000, "{" * 5000, '{"name": "x", "parameters": ' * 500, "<function=a>{", "[]"):
        assert task.judge(item, Answer(text)).value == 0
