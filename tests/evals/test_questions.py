"""Own questions: how each judge reads an answer, which lines are refused, and a whole evaluation of a file."""

import json
from pathlib import Path

import pytest

from herd.errors import DataError
from herd.evals.harness import evaluate
from herd.evals.results import digest
from herd.evals.tasks import Answer, Data, Generate, Likelihood, Rank, make_task
from herd.evals.tasks.json_schema import check_schema, violation
from herd.evals.tasks.task import GenerateJson

EXAMPLE = Path(__file__).parents[2] / "docs" / "how-to" / "questions.jsonl"


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="questions.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return make_task(str(path), mode="instruct")

    return write


@pytest.mark.parametrize(
    "question, answer, right",
    [
        ({"answer": "Paris"}, "Paris", True),
        ({"answer": "Paris"}, "**paris**.\n", True),
        ({"answer": "Paris"}, "The answer is Paris.", True),
        ({"answer": "Paris"}, "Final answer: Paris", True),
        ({"answer": "Paris"}, "Paris or London", False),
        ({"answer": "Paris"}, "London", False),
        ({"answer": "Paris"}, "", False),
        ({"answer": ["Au", "gold"]}, "Gold", True),
        ({"answer": 42}, "12 + 30 = 42", True),
        ({"answer": 42}, "It is 43.", False),
        ({"answer": 1234.5}, "$1,234.50", True),
        ({"answer": 1e22}, "10000000000000000000000", True),
        ({"answer": 0.1}, "0.10", True),
        ({"answer": "1,000"}, "That makes 1000.", True),
        ({"answer": "02139"}, "2139", False),
        ({"answer": "02139"}, "02139", True),
        ({"answer": "C++"}, "C++", True),
        ({"answer": "x = 3"}, "\\boxed{x = 3}", True),
        ({"choices": ["cat", "dog"], "answer": "dog"}, "B", True),
        ({"choices": ["cat", "dog"], "answer": "dog"}, "The answer is (A).", False),
        ({"choices": ["cat", "dog"], "answer": "B"}, "It is the cat.", False),
        ({"choices": ["cat", "dog"], "answer": "B"}, "dog", True),
        ({"choices": [3, 4], "answer": 4}, "B.", True),
        ({"pattern": r"\bParis\b"}, "The capital is Paris.", True),
        ({"pattern": r"\bParis\b"}, "Parisian", False),
        ({"pattern": r"\d{4}", "match": "fullmatch"}, " 1815\n", True),
        ({"pattern": r"\d{4}", "match": "fullmatch"}, "in 1815", False),
        ({"schema": {"type": "integer"}}, "12", True),
        ({"schema": {"type": "integer"}}, "```json\n12\n```", True),
        ({"schema": {"type": "integer"}}, "twelve", False),
        ({"schema": {"type": "integer"}}, "NaN", False),
        ({"schema": {"type": "number"}}, "1e999", False),
        ({"schema": {"type": "integer"}}, "[" * 100_000, False),
        ({"schema": {"type": "boolean"}, "answer": True}, "true", True),
        ({"schema": {"type": "object"}, "answer": {"a": 1}}, '{"a": 1.0}', True),
        ({"schema": {"type": "object"}, "answer": {"a": 1}}, '{"a": true}', False),
        ({"tests": "assert f(2) == 4"}, "```python\ndef f(x):\n    return x * x\n```", True),
        ({"tests": "assert f(2) == 4"}, "```python\ndef f(x):\n    return 0\n```", False),
        ({"tests": "assert f(2) == 4"}, "```python\nimport sys\nsys.exit(0)\n```", False),
        ({"tests": "assert f(2) == 4"}, "I cannot.", False),
    ],
)
def test_an_answer_is_judged_by_what_its_line_holds(write, question, answer, right):
    task = write({"question": "?", **question})
    [item] = task.items(Data())
    judged = task.judge(item, Answer(answer))
    assert judged.value == right
    assert right or judged.why or "choices" in question
    json.dumps(judged.extracted)


@pytest.mark.parametrize("question", [{"pattern": "(a|aa)+$"}, {"schema": {"pattern": "(a|aa)+$"}}])
def test_a_pattern_that_never_ends_is_stopped(write, question, monkeypatch):
    monkeypatch.setattr("herd.evals.tasks.patterns.SECONDS", 0.1)
    task = write({"question": "?", **question})
    [item] = task.items(Data())
    judged = task.judge(item, Answer(f'"{"a" * 200}b"'))
    assert judged.value == 0.0
    assert judged.why == "the pattern '(a|aa)+$' takes longer than 0.1 s"


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", ":2: not JSON"),
        ([1], ":2: a question is a JSON object, not list"),
        ({"answer": "x"}, "give either question or messages"),
        (
            {"question": "?", "messages": [{"role": "user", "content": "?"}], "answer": "x"},
            "give either question or",
        ),
        ({"question": "?"}, "no criterion"),
        ({"question": "?", "anwser": "x"}, "unknown field 'anwser': did you mean 'answer'?"),
        ({"question": "?", "zzz": "x"}, "unknown field 'zzz': known are"),
        ({"question": "?", "answer": True}, "must be text, a number, or a list of them"),
        ({"question": "?", "answer": []}, "must be text, a number, or a list of them"),
        (
            {"question": "?", "answer": "x", "max_tokens": 0},
            "max_tokens: Input should be greater than or equal to 1",
        ),
        ({"question": 3, "answer": "x"}, "question: Input should be a valid string"),
        (
            {"question": "?", "choices": ["a", "b"], "answer": "C"},
            "neither a choice nor the letter of one (A to B)",
        ),
        ({"question": "?", "choices": ["a", "a"], "answer": "a"}, "a choice is given twice"),
        (
            {"question": "?", "choices": ["B", "A"], "answer": "A"},
            "the text of one choice and the letter of another",
        ),
        ({"question": "?", "choices": ["a"], "answer": "a"}, "choices: List should have at least 2 items"),
        ({"question": "?", "choices": ["a", "b"]}, "no criterion"),
        ({"question": "?", "pattern": "("}, "is not a regular expression"),
        ({"question": "?", "pattern": "x", "tests": "y"}, "has pattern and tests: give one of them"),
        ({"question": "?", "pattern": "x", "answer": "y"}, "answer is not used by the judge 'regex'"),
        ({"question": "?", "answer": "x", "judge": "code"}, "judge 'code' needs the field 'tests'"),
        ({"question": "?", "answer": "x", "judge": "kind"}, "judge: Input should be 'exact'"),
        ({"question": "?", "schema": {"type": "int"}}, "type 'int' is unknown"),
        ({"question": "?", "schema": {"unevaluatedItems": False}}, "'unevaluatedItems' cannot be checked"),
        ({"question": "?", "schema": {"$ref": "#/$defs/x"}}, "names nothing inside the schema"),
        (
            {"messages": [{"role": "assistant", "content": "?"}], "answer": "x"},
            "last of the messages must be the user's",
        ),
        (
            {"messages": [{"role": "robot", "content": "?"}], "answer": "x"},
            "messages.0.role: Input should be",
        ),
        ({"id": 1, "question": "?", "answer": "x"}, "the id '1' is also the id of"),
    ],
)
def test_a_wrong_line_is_refused_with_file_and_line(write, line, words):
    task = write({"question": "?", "answer": "x"}, line)
    with pytest.raises(DataError) as error:
        task.items(Data())
    assert words in str(error.value)
    assert "questions.jsonl:2: " in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_and_missing_files_are_named(write):
    with pytest.raises(DataError, match=r"questions\.jsonl: "):
        write().items(Data())
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        make_task("nowhere.jsonl").items(Data())
    with pytest.raises(DataError, match="put worked examples into messages"):
        make_task("some.jsonl", shots=3)


def test_a_base_model_ranks_choices_and_continues_text(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"question": "The sky is", "choices": ["blue", "extremely green"], "answer": "blue"}\n'
        '{"question": "2 + 2 =", "answer": 4}\n'
    )
    task = make_task(str(path), mode="base")
    first, second = task.items(Data())
    assert first.request == Rank((("The sky is", " blue"), ("The sky is", " extremely green")))
    assert second.request == Generate("2 + 2 =", 256, ("\n",))
    judged = task.judge(first, Answer(likelihoods=(Likelihood(-5.0), Likelihood(-6.0))))
    assert judged.value == 1
    assert judged.metrics == {"acc_norm": 0}
    path.write_text('{"messages": [{"role": "user", "content": "?"}], "answer": "x"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl:1: messages and system need an instruct model"):
        task.items(Data())


class Parrot:
    """A model that answers every question with the same text, and notes what it is asked."""

    name, hash, mode, precision = "parrot", "00" * 8, "instruct", "fp32"

    def __init__(self, text: str = "Paris") -> None:
        self.text, self.asked = text, []

    def answer(self, requests):
        for number, request in enumerate(requests):
            self.asked.append(request)
            yield number, Answer(self.text, "stop")


def test_the_example_of_the_documentation_is_asked_and_scored(tmp_path):
    task, model = make_task(str(EXAMPLE), mode="instruct"), Parrot()
    evaluation = evaluate(model, [task], Data(), tmp_path)
    [row] = evaluation.tasks
    assert (row.task, row.n_items, row.data) == ("questions.jsonl", 10, str(EXAMPLE))
    assert row.score is not None
    assert row.score.value == pytest.approx(0.2)
    assert row.score.lo < 0.2 < row.score.hi
    assert row.score.detail["by_group"]["dialogs"]["n"] == 1
    constrained = next(request for request in model.asked if isinstance(request, GenerateJson))
    assert json.loads(constrained.schema)["required"] == ["name", "year"]
    assert constrained.prompt[0] == {"role": "system", "content": "You answer with JSON only."}
    text = EXAMPLE.with_name("evaluate-your-own-questions.md").read_text()
    assert all(line in text for line in EXAMPLE.read_text().splitlines())


def test_only_changed_questions_are_asked_again(write, tmp_path):
    rows = [{"question": f"{n}?", "answer": "Paris"} for n in range(5)]
    model = Parrot()
    evaluate(model, [write(*rows)], Data(), tmp_path / "out")
    rows[2]["answer"] = "London"
    [row] = evaluate(model, [write(*rows)], Data(), tmp_path / "out").tasks
    assert len(model.asked) == 6
    assert row.score.value == pytest.approx(0.8)


def test_an_added_kind_of_request_does_not_change_the_digests_of_others():
    assert digest(Generate("x", 7)) == digest(
        {"prompt": "x", "max_tokens": 7, "stop": (), "tools": (), "tool_call_format": "json"}
    )


@pytest.mark.parametrize(
    "schema, words",
    [
        (3, "schema #: must be an object, true or false"),
        ({"minimum": "1"}, "minimum must be a number"),
        ({"maximum": float("inf")}, "maximum must be a number"),
        ({"multipleOf": 0}, "multipleOf must be a number above 0"),
        ({"maxLength": True}, "maxLength must be a whole number from 0"),
        ({"properties": []}, "properties must be an object of schemas"),
        ({"properties": {"a": 1}}, "schema #/properties/a: must be an object, true or false"),
        ({"anyOf": []}, "anyOf must be a list of schemas"),
        ({"required": "a"}, "required must be a list of names"),
        ({"pattern": 1}, "pattern must be text"),
        ({"type": ["string", 1]}, "type 1 is unknown"),
        (
            {"items": {"patternProperties": {"(": {}}}},
            "schema #/items: pattern '(' is not a regular expression",
        ),
        ({"$ref": "other.json"}, "names nothing inside the schema"),
    ],
)
def test_a_schema_that_cannot_be_checked_is_refused(schema, words):
    with pytest.raises(DataError) as error:
        check_schema(schema)
    assert words in str(error.value)


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"not": {"$ref": "#"}}, {"anyOf": [{"$ref": "#"}]}])
def test_a_schema_that_refers_to_itself_ends(schema):
    check_schema(schema)
    assert violation(1, schema) == "the answer is nested too deeply"


@pytest.mark.parametrize(
    "schema, fits, not_",
    [
        (True, [1, None], []),
        (False, [], [1, None]),
        ({"type": ["integer", "null"]}, [1, 1.0, None, 10**400], [1.5, True, "1"]),
        ({"type": "number"}, [1, 1.5], [True, "1"]),
        ({"const": 1}, [1, 1.0], [True, "1", 2]),
        ({"enum": ["a", {"b": [1]}]}, ["a", {"b": [1]}], ["b", {"b": [2]}, {"b": [True]}]),
        ({"minimum": 2, "exclusiveMaximum": 5}, [2, 4.9, "x"], [1, 5]),
        ({"multipleOf": 0.1}, [0.3, 1], [0.35]),
        ({"minLength": 2, "maxLength": 3, "pattern": "^a"}, ["ab", "a🦙c", 7], ["a", "abcd", "ba"]),
        ({"items": {"type": "integer"}, "minItems": 1, "uniqueItems": True}, [[1, 2], {}], [[], [1, 1.0], ["x"]]),
        ({"prefixItems": [{"type": "string"}], "items": False}, [["a"], []], [["a", 1], [1]]),
        ({"contains": {"const": 3}}, [[1, 3]], [[1], []]),
        (
            {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
            [{"a": 1}, 5],
            [{}, {"a": "x"}, {"a": 1, "b": 2}],
        ),
        ({"patternProperties": {"^x": {"type": "integer"}}}, [{"x1": 1, "y": "s"}], [{"x1": "s"}]),
        ({"propertyNames": {"maxLength": 1}, "maxProperties": 2}, [{"a": 1}], [{"ab": 1}, {"a": 1, "b": 2, "c": 3}]),
        ({"anyOf": [{"type": "string"}, {"minimum": 3}]}, ["x", 3], [2]),
        ({"oneOf": [{"minimum": 3}, {"maximum": 5}]}, [2, 6], [4]),
        ({"allOf": [{"minimum": 3}, {"maximum": 5}]}, [4], [2, 6]),
        ({"not": {"type": "string"}}, [1], ["x"]),
        (
            {
                "$ref": "#/$defs/tree",
                "$defs": {"tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}},
            },
            [{"next": {"next": {}}}],
            [{"next": {"next": 1}}, 2],
        ),
        ({"$defs": {"a/b": {"const": 1}}, "$ref": "#/$defs/a~1b"}, [1], [2]),
        ({"type": "object", "title": "x", "description": "y", "format": "z"}, [{}], [1]),
    ],
)  # fmt: skip
def test_values_are_checked_as_the_standard_says(schema, fits, not_):
    check_schema(schema)
    assert [violation(value, schema) for value in fits] == [""] * len(fits)
    assert all(violation(value, schema) for value in not_)
