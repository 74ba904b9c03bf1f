"""Numeric options of all planning verbs: finite numbers are accepted, everything else is refused in one
line."""

import json
import math

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st

from herd.cli import plan, run
from herd.errors import PlanError
from herd.plan import quantity

VERBS = typer.main.get_command(plan.app).commands
# A quick base for each verb. `herd plan here`, leak, score and machines have no numeric options.
QUICK = {
    "train": ["--size", "1B", "--machine", "8xH100", "--tokens", "1B"],
    "finetune": ["--size", "1B", "--machine", "RTX4090"],
    "distil": ["--teacher", "8B", "--student", "1B", "--machine", "8xH100"],
    "run": ["--size", "1B", "--machine", "RTX4090"],
    "serve": ["--size", "1B", "--machine", "RTX4090", "--users", "2"],
    "draft": ["--size", "8B", "--draft", "1B", "--machine", "H100"],
}
OPTIONS = [
    (verb, option.opts[0])
    for verb, command in VERBS.items()
    for option in command.params
    if option.metavar == "NUMBER"
]
HOSTILE = ["nan", "inf", "-inf", "-1", "0", "1e308", "1e-308", "1e9999", "", "1e", "0x10", "1 2", "٣", "--"]


def test_the_verbs_have_numeric_options():
    assert {verb for verb, _ in OPTIONS} == set(QUICK)
    assert len(OPTIONS) > 25


@pytest.mark.parametrize("verb, option", OPTIONS, ids=lambda value: str(value))
def test_every_number_gives_a_finite_result_or_one_line(verb, option, capsys):
    for text in [*HOSTILE, "1e12", "15.6T", "1", "0.5"]:
        code = run(["plan", verb, *QUICK[verb], f"{option}={text}", "--json"])
        out, err = capsys.readouterr()
        if code == 0:
            assert text not in ("nan", "inf", "-inf", "-1", "1e308", "1e9999", ""), (option, text)
            json.loads(out, parse_constant=pytest.fail)
        else:
            assert code == 1, (option, text)
            assert err.startswith("error: ")
            assert err.count("\n") == 1


TOKENS = quantity.whole(1e18, example="15.6T")


@pytest.mark.parametrize(
    "text, value",
    [
        ("15.6T", 15_600_000_000_000),
        ("94B", 94_000_000_000),
        ("100m", 100_000_000),
        ("1,000", 1000),
        ("1,234.5k", 1_234_500),
        ("1e12", 10**12),
        ("1.5E3", 1500),
        (" 2k ", 2000),
    ],
)
def test_counts_are_read_as_people_write_them(text, value):
    assert TOKENS.parse(text, "--tokens") == value


@pytest.mark.parametrize(
    "text", ["", "-1", "0", "many", "3x", "1.2.3", "nan", "inf", "1e19", "0.5", "15.6Q", "15,6T", "1,00"]
)
def test_a_count_that_is_none_is_refused_with_its_option(text):
    with pytest.raises(PlanError, match="--tokens"):
        TOKENS.parse(text, "--tokens")


def test_contexts_count_in_powers_of_two():
    context = quantity.whole(2**40, quantity.CONTEXT)
    assert [context.parse(text, "--context") for text in ("32k", "8192", "1M")] == [32_768, 8192, 2**20]


def test_times_are_read_with_their_units():
    texts = ("1s", "500ms", "2min", "1.5", "1h")
    assert [quantity.TIME.parse(text, "--wait") for text in texts] == [1.0, 0.5, 120.0, 1.5, 3600.0]
    for wrong in ("", "-1s", "soon", "1 week", "1e300s"):
        with pytest.raises(PlanError, match="--wait"):
            quantity.TIME.parse(wrong, "--wait")


@given(st.one_of(st.floats().map(repr), st.integers().map(str), st.text(max_size=12)))
def test_any_text_is_a_number_in_range_or_refused(text):
    for option in (TOKENS, quantity.USD, quantity.TIME):
        try:
            value = option.parse(text, "--option")
        except PlanError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert math.isfinite(value)
            assert option.least <= value <= option.most
