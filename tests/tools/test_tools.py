"""Calculator against Python's own exact arithmetic, dates against datetime, the registry and the loop."""

import datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.errors import ToolError
from herd.text import ToolCall, parse
from herd.tools import TOOLS, ToolLoop, call_tool, execute_call
from herd.tools.arithmetic import calculator
from herd.tools.dates import add_days, days_between, weekday
from herd.tools.strings import count_letter

INTEGERS = st.integers(-(10**12), 10**12)


@given(INTEGERS, INTEGERS, st.sampled_from(["+", "-", "*"]))
def test_integer_arithmetic_is_exact(a, b, sign):
    assert calculator(f"({a}){sign}({b})") == str(eval(f"({a}){sign}({b})"))


@given(INTEGERS, INTEGERS.filter(bool), st.sampled_from(["//", "%"]))
def test_floor_division_and_remainder_are_exact(a, b, sign):
    assert calculator(f"({a}){sign}({b})") == str(eval(f"({a}){sign}({b})"))


@given(INTEGERS, INTEGERS.filter(bool))
def test_division_is_right_to_ten_digits(a, b):
    exact = Fraction(a, b)
    shown = Fraction(calculator(f"({a})/({b})"))
    assert abs(shown - exact) <= abs(exact) * Fraction(1, 10**9)
    assert exact.denominator > 1 or calculator(f"({a})/({b})") == str(int(exact))


def joined(parts):
    return st.tuples(parts, st.sampled_from("+-*"), parts).map("({0[0]}{0[1]}{0[2]})".format)


@given(st.recursive(st.integers(0, 99).map(str), joined, max_leaves=20))
def test_nested_expressions_have_pythons_value(expression):
    assert calculator(expression) == str(eval(expression))


@pytest.mark.parametrize(
    "expression, value",
    [
        ("2*(3+4)", "14"), ("84 / 2", "42"), ("1/3", "0.3333333333"), ("0.1+0.2", "0.3"), ("2**10", "1024"),
        ("-7//2", "-4"), ("-7 % 3", "2"), ("2**-2", "0.25"), ("1e3", "1000"), ("2**0.5", "1.414213562"),
        ("1/7*7", "1"), ("10**30+1", "1" + "0" * 29 + "1"), ("1/10**40", "1e-40"), ("  3 \n", "3"), ("+-+3",
        "-3"),
        ("3×4÷2−1", "5"), ("2^10", "1024"), ("7/0.5", "14"),
    ],
)  # fmt: skip
def test_the_value_of_expressions(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "a", "__import__('os')", "1+", "1/0", "5%0", "0**-1", "(-1)**0.5", "9**9**9", "2**100000",
    "10**10**10",
     "[1]", "'a'*3", "True", "1<<9", "1j", "1e999", "2**0.5**-9999", "f(1)", "x=1", "\0", "1;2",
     "1 if 1 else 2",
     "(" * 500 + "1" + ")" * 500,
     "-" * 900 + "1", "1+" * 600 + "1", "9" * 999 + "**999", "lambda: 1", "1.e400", "None", "..."],
)  # fmt: skip
def test_other_expressions_are_refused_in_one_line(expression):
    with pytest.raises(ToolError) as error:
        calculator(expression)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@given(st.text(max_size=40))
def test_any_text_is_a_value_or_one_line(text):
    try:
        said = calculator(text)
    except ToolError as error:
        said = str(error)
    assert said
    assert "\n" not in said


@given(st.dates(), st.dates())
def test_dates_agree_with_datetime(a, b):
    assert days_between(str(a), str(b)) == str((b - a).days)
    assert add_days(str(a), (b - a).days) == str(b)
    assert weekday(str(a)) == a.strftime("%A")


@pytest.mark.parametrize("text", ["2024-02-30", "20240101", "tomorrow", "", 5, "2024-1-1", "0000-01-01"])
def test_text_that_is_no_date_is_refused(text):
    with pytest.raises(ToolError, match="YYYY-MM-DD"):
        weekday(text)


def test_dates_out_of_range_and_several_letters_are_refused():
    with pytest.raises(ToolError, match="outside the years"):
        add_days("2024-01-01", 10**9)
    assert add_days("2024-02-28", 2) == datetime.date(2024, 3, 1).isoformat()
    assert count_letter("Banana", "a") == "3"
    with pytest.raises(ToolError, match="exactly one"):
        count_letter("Banana", "an")


def test_schemas_describe_the_functions():
    for name, tool in TOOLS.items():
        schema = tool.schema["function"]
        assert schema["name"] == name
        assert schema["description"].endswith(".")
        assert set(schema["parameters"]["required"]) == set(schema["parameters"]["properties"]) != set()
    assert TOOLS["add_days"].parameters == {"date": "string", "days": "integer"}


def test_a_call_checks_the_name_and_the_arguments():
    assert call_tool("calculator", {"expression": "6*7"}) == "42"
    assert call_tool("wolfram_alpha", {"query": "6*7"}) == "42"
    assert call_tool("code_interpreter", {"code": "print(6*7)"}) == "42\n"
    assert call_tool("code_interpreter", {"code": "```python\nprint(6*7)\n```"}) == "42\n"
    assert call_tool("add_days", {"date": "2024-01-01", "days": 3.0}) == "2024-01-04"
    for name, arguments, match in (
        ("add_days", {"date": "2024-01-01", "days": 3.5}, "not of type integer"),
        ("rm", {}, "unknown tool 'rm'"),
        ("calculator", {}, "missing"),
        ("calculator", {"expression": "1", "x": 2}, "unknown"),
        ("calculator", {"expression": 1}, "not of type string"),
        ("add_days", {"date": "2024-01-01", "days": "3"}, "not of type integer"),
        ("add_days", {"date": "2024-01-01", "days": True}, "not of type integer"),
        ("calculator", ["1"], "not an object"),
        ("code_interpreter", {"code": "1/0"}, "ZeroDivisionError"),
    ):
        with pytest.raises(ToolError, match=match):
            call_tool(name, arguments)


def run_loop(*replies, tools=TOOLS, messages=(), max_rounds=4):
    """Let a scripted model reply until the loop ends."""
    loop = ToolLoop(list(messages), lambda call: execute_call(call, tools), max_rounds)
    left = list(replies)
    while loop.waiting:
        loop.add(parse(left.pop(0)))
        list(loop.run_calls())
    assert not left
    return loop


@pytest.mark.parametrize(
    "reply, result",
    [
        ('{"type": "function", "name": "calculator", "parameters": {"expression": "6*7"}}', "42"),
        ('<function=calculator>{"expression": "6*7"}</function>', "42"),
        ('<|python_tag|>wolfram_alpha.call(query="6*7")', "42"),
        ("<|python_tag|>print(6*7)", "completed\n[stdout]42\n[/stdout]"),
        ('<function=calculator>{"expression": "6/0"}</function>', "error: calculator: '6/0' divides by zero"),
        ('<function=nothing>{"x": 1}</function>', "error: unknown tool 'nothing'"),
    ],
)
def test_the_loop_runs_a_call_and_goes_on_with_its_result(reply, result):
    loop = run_loop(reply, "It is 42.", messages=[{"role": "user", "content": "What is 6 times 7?"}])
    dialog = loop.messages
    assert [m["role"] for m in dialog] == ["user", "assistant", "ipython", "assistant"]
    assert dialog[2]["content"].startswith(result)
    assert dialog[1]["tool_calls"][0]["tool_call_format"] in ("json", "function", "builtin")
    assert dialog[-1] == {"role": "assistant", "content": "It is 42."}
    assert not loop.exhausted


def test_the_loop_ends_with_an_answer_or_after_its_rounds():
    assert run_loop("Hello.").messages[-1]["content"] == "Hello."
    greet = {"greet": lambda name: f"hi {name}"}
    reply = '{"name": "greet", "parameters": {"name": "Ada"}}'
    assert run_loop(reply, "ok", tools=greet).messages[1]["content"] == "hi Ada"
    loop = run_loop(reply, reply, tools=greet, max_rounds=2)
    assert loop.exhausted
    assert len(loop.messages) == 4


def test_the_loop_runs_nothing_of_an_incomplete_reply_or_without_a_runner():
    call = parse('{"name": "upper", "parameters": {"text": "x"}}')
    for execute, complete in ((execute_call, False), (None, True)):
        loop = ToolLoop([], execute, 4)
        loop.add(call, complete=complete)
        assert list(loop.run_calls()) == []
        assert (loop.waiting, loop.exhausted, len(loop.messages)) == (False, False, 1)


def test_failed_code_is_reported_in_the_documented_format():
    text, ok = execute_call(ToolCall("code_interpreter", {"code": "print(1/0)"}, "builtin"))
    assert not ok
    assert text.startswith("failed\n[stderr]")
    assert "ZeroDivisionError" in text
