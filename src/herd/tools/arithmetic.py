"""The calculator: evaluates arithmetic from its syntax tree and never runs it as code.

It knows numbers, ``+ - * / // % **``, parentheses and signs. It computes exactly, with fractions, so ``84 /
2`` is ``42``. Results that are not integers are printed with ten significant digits. The size of an
intermediate result is bounded *before* it is computed, so ``9**9**9`` is an error and does not run for hours.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

from ..errors import ToolError

MAX_CHARS = 1000
MAX_BITS = 10_000
"""Larger numerators and denominators (about 3,000 digits) are refused."""
MAX_DEPTH = 100
SIGNIFICANT_DIGITS = 10
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class _Refused(Exception):
    """The reason why an expression has no value."""


def calculator(expression: str) -> str:
    """Return the value of an arithmetic expression as text: ``"816"`` for ``"48*17"``.

    Raises `ToolError` with one line if the text is not arithmetic, the value is too large, or there is no
    value.
    """
    if not isinstance(expression, str):
        raise ToolError(f"calculator: expression is {type(expression).__name__}, not text such as 2*(3+4)")
    if len(expression) > MAX_CHARS:
        raise ToolError(f"calculator: {len(expression)} characters; give at most {MAX_CHARS}")
    source = expression.strip().replace("^", "**").replace("×", "*").replace("÷", "/").replace("−", "-")
    try:
        return _number_text(_value(ast.parse(source, mode="eval").body, 0))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        reason = "is not arithmetic; give an expression like 2*(3+4)"
    except _Refused as error:
        reason = str(error)
    shown = expression if len(expression) <= 60 else expression[:57] + "..."
    raise ToolError(f"calculator: {shown!r} {reason}")


def _number_text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    context = Context(prec=SIGNIFICANT_DIGITS, rounding=ROUND_HALF_EVEN)
    decimal = context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize()
    text = format(decimal, "f")
    return text if len(text) <= 25 else format(decimal, "e")


def _value(node: ast.expr, depth: int) -> Fraction:
    if depth > MAX_DEPTH:
        raise _Refused(f"is nested deeper than {MAX_DEPTH}; simplify it")
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            if not math.isfinite(number):
                raise _Refused("is too large; use smaller numbers")
            return _bounded(Fraction(repr(number)))  # 0.1 means a tenth, not the nearest binary fraction
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, depth + 1)
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, depth + 1)
        case ast.BinOp(op=ast.Pow()):
            return _bounded(_power(_value(node.left, depth + 1), _value(node.right, depth + 1)))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            try:
                left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
                combined = _OPERATORS[type(node.op)](left, right)
            except ZeroDivisionError:
                raise _Refused("divides by zero") from None
            return _bounded(Fraction(combined))
    raise _Refused("is not arithmetic; use numbers, + - * / // % ** and parentheses")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        if base < 0:
            raise _Refused("has no real value")
        try:
            return Fraction(repr(float(base) ** float(exponent)))
        except (OverflowError, ZeroDivisionError):
            raise _Refused("is too large; use smaller numbers") from None
    if base == 0 and exponent < 0:
        raise _Refused("divides by zero")
    size = _n_bits(base)
    if base not in (-1, 0, 1) and size * abs(exponent.numerator) > MAX_BITS + size:
        raise _Refused("is too large; use a smaller exponent")
    return base**exponent.numerator


def _bounded(value: Fraction) -> Fraction:
    if _n_bits(value) > MAX_BITS:
        raise _Refused("is too large; use smaller numbers")
    return value


def _n_bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
