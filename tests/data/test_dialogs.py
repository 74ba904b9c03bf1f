"""Dialogs made by program are right, held out as documented, and learnable by copying."""

import datetime
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.data.dialogs import Dialog, make_dialogs, showcase_dialogs, training_texts
from herd.data.prompts import system_prompt
from herd.data.scoring import score, states
from herd.data.turns import KINDS, TASKS
from herd.data.wordings import LANGUAGES, expand, load_wordings
from herd.data.wordings.programs import PROGRAMS
from herd.errors import DataError
from herd.text.chat_format import render
from herd.text.llama3_chat import TOOL_CALL_FORMATS
from herd.text.messages import CODE_INTERPRETER
from herd.text.tokenizer import Tokenizer
from herd.text.toolcall import parse
from herd.tools import Sandbox, ToolLoop, call_tool, execute_call


@pytest.fixture(scope="module")
def train() -> list[Dialog]:
    return make_dialogs(8000, 1)


@pytest.fixture(scope="module")
def test() -> list[Dialog]:
    return make_dialogs(4000, 2, split="test")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


def after_prompt(dialog: Dialog) -> tuple:
    return dialog.messages[len(dialog.prompt) :]


# Oracle: the tools and the sandbox compute again what the generator wrote


def test_every_call_gives_its_result_and_the_answer_states_it(train, test):
    for dialog in train + test:
        if not dialog.call or dialog.call["name"] == CODE_INTERPRETER:
            continue
        assert call_tool(dialog.call["name"], dialog.call["arguments"]) == dialog.result
        said = (
            datetime.date.fromisoformat(dialog.call["arguments"]["date"]).weekday()
            if dialog.kind == "weekday"
            else None
        )
        expected = dialog.result if said is None else load_wordings(dialog.lang).weekdays[said]
        assert dialog.answer == expected
        assert states(dialog.messages[-1]["content"], expected), dialog.messages


def test_interpreter_code_prints_the_result(train, sandbox):
    seen = Counter()
    for dialog in train:
        if dialog.call and dialog.call["name"] == CODE_INTERPRETER and seen[dialog.kind] < 6:
            seen[dialog.kind] += 1
            outcome = sandbox.run(dialog.call["arguments"]["code"])
            assert outcome.ok, outcome.stderr
            assert outcome.stdout == dialog.result + "\n"
            assert dialog.messages[-2] == {
                "role": "ipython",
                "content": f"completed\n[stdout]{dialog.result}\n[/stdout]",
            }
    assert len(seen) == 15 - seen.get("repeat", 0)  # every kind that calls a tool


def test_right_programs_pass_their_check_and_wrong_ones_fail(train, test, sandbox):
    bodies = set()
    for dialog in train + test:
        if dialog.kind != "program":
            continue
        scope: dict = {}
        exec(dialog.messages[-1]["content"] + "\n" + dialog.check, scope)
        bodies.add(dialog.messages[-1]["content"].split("return", 1)[1])
        assert dialog.answer in dialog.messages[-1]["content"]
    assert len(bodies) > 2 * len(PROGRAMS)
    dialog = next(d for d in test if d.kind == "program")
    right = dialog.messages[-1]["content"]
    assert score(dialog, [{"role": "assistant", "content": right}], sandbox.run).correct
    fenced = f"Here:\n```python\n{right}\n```"
    assert score(dialog, [{"role": "assistant", "content": fenced}], sandbox.run).correct
    for wrong in (right.replace("return", "return 1 +"), "def x(", "", right + "\nraise SystemExit"):
        assert not score(dialog, [{"role": "assistant", "content": wrong}], sandbox.run).correct


def test_a_perfect_model_gets_full_marks_through_the_tool_loop(test, sandbox):
    """The scripted model writes the calls as text. Parser, loop and tools are the real ones."""
    tried = Counter()
    for dialog in test:
        if tried[dialog.kind, dialog.tool_call_format] >= 2:
            continue
        tried[dialog.kind, dialog.tool_call_format] += 1
        script = [m for m in after_prompt(dialog) if m["role"] == "assistant"]
        loop = ToolLoop(list(dialog.prompt), execute_call, max_rounds=4)
        for message in script:
            loop.add(parse(written_text(message, dialog.tool_call_format)))
            list(loop.run_calls())
        produced = loop.messages[len(dialog.prompt) :]
        verdict = score(dialog, produced, sandbox.run)
        assert verdict.correct, (verdict, produced)
    assert len(tried) == len(KINDS) * len(TOOL_CALL_FORMATS)


def written_text(message: dict, tool_call_format: str) -> str:
    dialog = Dialog((message,), tool_call_format, "en", "", "", "")
    code = any(call["name"] == CODE_INTERPRETER for call in message.get("tool_calls", ()))
    return ("<|python_tag|>" if code else "") + list(training_texts([dialog]))[-1]


# Held out


def normalised(question: str) -> str:
    return re.sub(r"[^\w{}+*/-]+", " ", question).strip().casefold()


@pytest.mark.parametrize("lang", LANGUAGES)
def test_wordings_of_train_and_test_are_disjoint_and_many(lang):
    words = load_wordings(lang)
    assert set(words.topics) == set(KINDS)
    assert set(words.programs) == {program.key for program in PROGRAMS}
    assert not set(words.names["train"]) & set(words.names["test"])
    assert len(words.weekdays) == 7
    for kind, topic in words.topics.items():
        train = {normalised(w) for line in topic.train for w in line}
        test = {normalised(w) for line in topic.test for w in line}
        assert not train & test, (lang, kind)
        assert len(train) >= 4
        assert len(test) >= 2
        if KINDS[kind][0] in ("arithmetic", "dates", "programs"):
            assert len(train) >= 5
    for task in ("arithmetic", "dates", "strings"):
        assert (
            sum(len(line) for k, t in words.topics.items() if KINDS[k][0] == task for line in t.train) >= 25
        )


def test_numbers_words_dates_and_programs_are_disjoint(train, test):
    def arithmetic(dialogs):
        return {tuple(re.findall(r"\d+", d.expression)) for d in dialogs if d.expression}

    assert not arithmetic(train) & arithmetic(test)

    def arguments(dialogs, kind):
        found = {
            str(sorted(d.call["arguments"].items()))
            for d in dialogs
            if d.kind == kind and d.tool_call_format != "builtin"
        }
        assert found
        return found

    for kind in ("date_after", "date_before", "days_between", "weekday", "reverse", "upper", "count"):
        assert not arguments(train, kind) & arguments(test, kind)
    programs = [
        {d.messages[-1]["content"] for d in dialogs if d.kind == "program"} for dialogs in (train, test)
    ]
    assert not programs[0] & programs[1]
    for lang in LANGUAGES:
        for name in load_wordings(lang).names["test"]:
            assert not any(
                re.search(rf"(?<!\w){name}(?!\w)", d.prompt[-1]["content"]) for d in train if d.lang == lang
            )


def test_every_small_number_is_an_operand_in_train():
    dialogs = make_dialogs(60_000, 5, languages=["en"], tasks=["add", "sub", "mul"])
    seen = {int(n) for d in dialogs for n in re.findall(r"\d+", d.expression)}
    assert set(range(1000)) <= seen


# Properties


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 40),
    split=st.sampled_from(["train", "test"]),
    languages=st.lists(st.sampled_from(LANGUAGES), min_size=1, max_size=3),
    tool_call_formats=st.lists(st.sampled_from(TOOL_CALL_FORMATS), min_size=1, max_size=3),
    tasks=st.none() | st.lists(st.sampled_from((*TASKS, *KINDS)), min_size=1, max_size=3),
)
def test_the_stream_is_a_pure_function_of_its_arguments(seed, n, split, languages, tool_call_formats, tasks):
    options = {"split": split, "languages": languages, "tool_call_formats": tool_call_formats, "tasks": tasks}
    dialogs = make_dialogs(n, seed, **options)
    assert dialogs == make_dialogs(n, seed, **options)
    assert dialogs[: n // 2] == make_dialogs(n // 2, seed, **options)
    for dialog in dialogs:
        assert dialog.lang in languages
        assert dialog.tool_call_format in tool_call_formats
        assert tasks is None or dialog.kind in tasks or dialog.task in tasks
        assert dialog.prompt[-1]["role"] == "user"
        assert dialog.messages[-1]["role"] == "assistant"


def test_other_splits_and_seeds_give_other_dialogs(train):
    assert make_dialogs(50, 1) != make_dialogs(50, 2)
    assert make_dialogs(50, 1) != make_dialogs(50, 1, split="test")
    assert {d.task for d in train} == set(TASKS)
    assert {(d.lang, d.tool_call_format) for d in train} == {
        (lang, tool_call_format) for lang in LANGUAGES for tool_call_format in TOOL_CALL_FORMATS
    }


def test_every_slot_is_filled(train, test):
    for dialog in train + test:
        for message in dialog.messages:
            assert message["content"].strip() == message["content"]
            if not message["content"].startswith("def "):
                assert not re.search(r"[{}|]|  | [.,]|\n\n", message["content"]), message


# Rendering


@pytest.fixture(scope="module")
def tokenizer(train) -> Tokenizer:
    return Tokenizer.train(training_texts(train[:3000]), 2304)


def test_rendered_calls_parse_back(test, tokenizer):
    for dialog in test[:600]:
        rendered = render(dialog.messages, tokenizer, tool_call_format=dialog.tool_call_format)
        first = next(s for s in rendered.spans if s.message == len(dialog.prompt))
        assert first.role == "assistant"
        parsed = parse(
            tokenizer.decode(rendered.ids[first.start : first.end]).split("\n\n", 1)[1].rsplit("<|eo", 1)[0]
        )
        assert [{"name": c.name, "arguments": c.arguments} for c in parsed.calls] == (
            [dialog.call] if dialog.call else []
        )


def test_dialogs_fit_a_short_context(train, tokenizer):
    lengths = sorted(
        len(render(d.messages, tokenizer, tool_call_format=d.tool_call_format).ids) for d in train[3000:4000]
    )
    assert sum(lengths) / len(lengths) <= 100
    assert lengths[-1] <= 320


def test_operands_keep_their_tokens_from_question_to_call(train, tokenizer):
    """The task can be learned because a number or word to copy has the same tokens everywhere."""
    for dialog in train[:500]:
        if (
            dialog.kind not in ("mul", "reverse", "date_after")
            or dialog.tool_call_format == "builtin"
            or len(dialog.messages) > 5
        ):
            continue
        arguments = dialog.call["arguments"]
        wanted = re.findall(r"\d+", dialog.expression) or [arguments.get("text") or arguments["date"]]
        ids = render(dialog.messages, tokenizer, tool_call_format=dialog.tool_call_format).ids
        for value in wanted:
            piece = tokenizer.encode(value)
            places = [i for i in range(len(ids)) if ids[i : i + len(piece)] == piece]
            assert len(places) >= 2, (value, dialog.messages)


# Scoring


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        ("It is 816.", "816", True),
        ("816", "816", True),
        ("It is 8,160.", "8160", True),
        ("Das macht 8.160 Stück", "8160", True),
        ("8\u202f160 pommes", "8160", True),
        ("1,234,567", "1234567", True),
        ("कुल ८१६ सेब", "816", True),
        ("It is 8160.", "816", False),
        ("It is 2816.", "816", False),
        ("It is 816.5", "816", False),
        ("It is 0.816", "816", False),
        ("It is 816,5", "816", False),
        ("It is -816.", "816", False),
        ("It is -816.", "-816", True),
        ("on 2024-08-16", "16", False),
        ("on 2024-08-16", "2024", False),
        ("x816", "816", False),
        ("12, 816 and 7", "816", True),
        ("1,816 things", "816", False),
        ("on 2024-08-16.", "2024-08-16", True),
        ("on 12024-08-16.", "2024-08-16", False),
        ('It is "ananab".', "ananab", True),
        ("bananab", "ananab", False),
        ("เป็นวันจันทร์ค่ะ", "วันจันทร์", True),
        ("BANANA", "banana", False),
        ("", "1", False),
    ],
)
def test_an_answer_is_found_only_as_a_whole_word(text, answer, expected):
    assert states(text, answer) is expected


def messages_for(call_: dict | None, answer: str) -> list[dict]:
    asked = [{"role": "assistant", "content": "", "tool_calls": [call_]}, {"role": "ipython", "content": "?"}]
    return [*(asked if call_ else []), {"role": "assistant", "content": answer}]


def test_a_right_dialog_needs_both_the_call_and_the_answer(test):
    dialog = next(
        d
        for d in test
        if d.kind == "mul" and d.tool_call_format == "json" and "*0" not in d.expression and int(d.result) > 9
    )
    right, wrong = (
        {"name": "calculator", "arguments": {"expression": dialog.expression}},
        {"expression": "1+1"},
    )
    answer = f"It is {dialog.result}."
    assert score(dialog, messages_for(right, answer)).correct
    a, b = dialog.expression.split("*")
    assert score(
        dialog, messages_for({"name": "calculator", "arguments": {"expression": f"{b} * {a}"}}, answer)
    ).correct
    verdicts = [
        score(dialog, messages_for(None, answer)),
        score(dialog, messages_for({"name": "calculator", "arguments": wrong}, answer)),
        score(dialog, messages_for({"name": "calc", "arguments": wrong}, answer)),
        score(dialog, messages_for({"name": "calculator", "arguments": {"expression": "("}}, answer)),
        score(dialog, messages_for({"name": "calculator", "arguments": {}}, answer)),
        score(dialog, messages_for({"name": "calculator", "arguments": ["x"]}, answer)),
        score(dialog, messages_for(right, f"It is {dialog.result}0.")),
        score(dialog, messages_for(right, answer)[:-1]),
        score(dialog, []),
    ]
    assert not any(v.correct for v in verdicts)
    assert all(v.why for v in verdicts)
    assert [v.answer_ok for v in verdicts] == [True, True, True, True, True, True, False, False, False]


def test_a_call_is_wrong_where_none_is_wanted(test):
    dialog = next(d for d in test if d.kind == "identity")
    assert score(dialog, messages_for(None, dialog.answer)).correct
    assert not score(
        dialog, messages_for({"name": "calculator", "arguments": {"expression": "1"}}, dialog.answer)
    ).correct
    assert not score(dialog, messages_for(None, "I am a cat.")).correct


# Examples


def test_showcase_is_held_out_and_in_every_language(train):
    for lang in LANGUAGES:
        assert len({dialog.prompt[-1]["content"] for dialog in showcase_dialogs(lang)}) == 5
        for tool_call_format in TOOL_CALL_FORMATS:
            for dialog in showcase_dialogs(lang, tool_call_format):
                assert dialog.tool_call_format == tool_call_format
                assert dialog.messages[0] == {"role": "system", "content": system_prompt(tool_call_format)}
    assert [d.kind for d in showcase_dialogs("en")] == "mul story_sub date_after program identity".split()


def test_alternatives_are_expanded():
    assert expand("[a|b] {x}[?|]") == ("a {x}?", "a {x}", "b {x}?", "b {x}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split 'dev' unknown: choose from train, test"),
        ({"languages": ["xx", "en"]}, "languages 'xx' unknown: choose from"),
        ({"languages": []}, "languages is empty: choose from"),
        ({"tool_call_formats": []}, "tool_call_formats is empty: choose from"),
        ({"tasks": ["sums"]}, "tasks 'sums' unknown: choose from arithmetic, "),
        ({"tasks": ()}, "tasks is empty: choose from"),
    ],
)
def test_unknown_and_empty_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        make_dialogs(1, 0, **options)


def test_showcase_dialogs_refuse_an_unknown_format():
    with pytest.raises(DataError, match="tool_call_format 'xml' unknown: choose from"):
        showcase_dialogs("en", "xml")
