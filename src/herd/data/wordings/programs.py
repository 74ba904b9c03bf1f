"""Small Python functions to ask for: each with its body, its parameter names, its constants and its check.

A program is asked for as ``area(w, h): the area of a rectangle``. The names of function and parameters are given in
the question and must be copied; what to compute must be known. The reference below is Python's own, so the hidden
check (a few asserts on inputs the question does not show) is computed, not written down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Program:
    """``body`` is an expression with slots for parameters {a} {b} {c} and the constant {k}."""

    key: str
    names: tuple[str, ...]
    params: tuple[tuple[str, ...], ...]
    body: str
    reference: Callable[..., Any]
    trials: tuple[tuple[Any, ...], ...]
    constant: bool = False


_PAIRS = (("a", "b"), ("x", "y"), ("m", "n"), ("p", "q"))
_NUMBER = (("a",), ("x",), ("n",), ("number",))
_TEXT = (("text",), ("s",), ("word",), ("t",))
_LIST = (("values",), ("items",), ("numbers",), ("xs",))
_TWO = ((3, 4), (10, 2), (7, 7), (0, 5))
_ONE = ((0,), (4,), (7,), (35,))
_WORDS = (("herd",), ("banana",), ("Llama",))
_LISTS = (([3, 1, 2],), ([5],), ([8, 8, 0, 4],))

PROGRAMS: tuple[Program, ...] = (
    Program(
        "area",
        ("area", "rect_area", "get_area", "surface"),
        (("a", "b"), ("w", "h"), ("width", "height"), ("x", "y")),
        "{a} * {b}",
        lambda a, b: a * b,
        _TWO,
    ),
    Program(
        "perimeter",
        ("perimeter", "around", "border", "get_perimeter"),
        (("a", "b"), ("w", "h"), ("width", "height"), ("x", "y")),
        "2 * ({a} + {b})",
        lambda a, b: 2 * (a + b),
        _TWO,
    ),
    Program("square", ("square", "squared", "sq", "power2"), _NUMBER, "{a} * {a}", lambda a: a * a, _ONE),
    Program(
        "cube", ("cube", "cubed", "power3", "get_cube"), _NUMBER, "{a} * {a} * {a}", lambda a: a**3, _ONE
    ),
    Program("add", ("add", "total", "plus", "sum_of"), _PAIRS, "{a} + {b}", lambda a, b: a + b, _TWO),
    Program(
        "difference", ("difference", "minus", "diff", "sub"), _PAIRS, "{a} - {b}", lambda a, b: a - b, _TWO
    ),
    Program(
        "mean",
        ("mean", "average", "middle", "avg"),
        _PAIRS,
        "({a} + {b}) / 2",
        lambda a, b: (a + b) / 2,
        _TWO,
    ),
    Program("larger", ("larger", "biggest", "maximum", "top"), _PAIRS, "max({a}, {b})", max, _TWO),
    Program("smaller", ("smaller", "smallest", "minimum", "least"), _PAIRS, "min({a}, {b})", min, _TWO),
    Program(
        "even",
        ("is_even", "even", "check_even", "even_number"),
        _NUMBER,
        "{a} % 2 == 0",
        lambda a: a % 2 == 0,
        _ONE,
    ),
    Program(
        "odd",
        ("is_odd", "odd", "check_odd", "odd_number"),
        _NUMBER,
        "{a} % 2 == 1",
        lambda a: a % 2 == 1,
        _ONE,
    ),
    Program(
        "plus_k",
        ("add_to", "increase", "shift", "more"),
        _NUMBER,
        "{a} + {k}",
        lambda a, k: a + k,
        _ONE,
        True,
    ),
    Program(
        "times_k",
        ("multiply", "scale", "times", "grow"),
        _NUMBER,
        "{a} * {k}",
        lambda a, k: a * k,
        _ONE,
        True,
    ),
    Program(
        "minus_k",
        ("reduce", "lower_by", "less", "take"),
        _NUMBER,
        "{a} - {k}",
        lambda a, k: a - k,
        _ONE,
        True,
    ),
    Program(
        "divisible_k",
        ("divisible", "divides", "is_multiple", "fits"),
        _NUMBER,
        "{a} % {k} == 0",
        lambda a, k: a % k == 0,
        _ONE,
        True,
    ),
    Program(
        "above_k",
        ("above", "is_greater", "is_big", "over"),
        _NUMBER,
        "{a} > {k}",
        lambda a, k: a > k,
        _ONE,
        True,
    ),
    Program(
        "remainder", ("remainder", "rest", "mod", "left_over"), _PAIRS, "{a} % {b}", lambda a, b: a % b, _TWO
    ),
    Program("length", ("length", "size", "count", "how_long"), _TEXT, "len({a})", len, _WORDS),
    Program(
        "reverse", ("reverse", "backwards", "flip", "mirror"), _TEXT, "{a}[::-1]", lambda s: s[::-1], _WORDS
    ),
    Program("upper", ("upper", "shout", "capitals", "loud"), _TEXT, "{a}.upper()", str.upper, _WORDS),
    Program("lower", ("lower", "quiet", "small", "to_lower"), _TEXT, "{a}.lower()", str.lower, _WORDS),
    Program("first", ("first", "head", "start", "get_first"), _LIST, "{a}[0]", lambda v: v[0], _LISTS),
    Program("last", ("last", "tail", "end", "get_last"), _LIST, "{a}[-1]", lambda v: v[-1], _LISTS),
    Program("sum", ("total", "sum_all", "add_all", "get_sum"), _LIST, "sum({a})", sum, _LISTS),
    Program("largest", ("largest", "highest", "max_of", "peak"), _LIST, "max({a})", max, _LISTS),
    Program(
        "volume",
        ("volume", "box", "get_volume", "space"),
        (("a", "b", "c"), ("x", "y", "z"), ("w", "h", "d")),
        "{a} * {b} * {c}",
        lambda a, b, c: a * b * c,
        ((2, 3, 4), (5, 1, 7), (0, 2, 9)),
    ),
)


def slots(program: Program, params: tuple[str, ...], k: int) -> dict[str, str]:
    """What fills {a} {b} {c} {k} in a body or a description."""
    return {**dict(zip("abc", params, strict=False)), "k": str(k)}


def check(program: Program, name: str, k: int) -> str:
    """The hidden check: assert statements, one a trial, with values from the reference."""
    extra = (k,) if program.constant else ()
    rows = []
    for trial in (*program.trials, *(((k,), (k + 1,), (3 * k,)) if program.constant else ())):
        arguments = ", ".join(repr(value) for value in trial)
        rows.append(f"assert {name}({arguments}) == {program.reference(*trial, *extra)!r}")
    return "\n".join(rows)
