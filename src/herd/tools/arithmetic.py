"""The calculator: arithmetic read as a syntax tree, never run as code.

Only numbers, ``+ - * / // % **``, parentheses and signs exist. Everything is computed exactly, as fractions; division
that comes out even gives an integer, so that ``84 / 2`` is ``42``; other results are shown with ten significant digits.
The size of every intermediate result is bounded *before* it is computed, so that ``9**9**9`` is an error and not
an afternoon.
"""

from __future__ import annotations

import ast
import math
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

from ..errors import ToolError

MAX_CHARS = 1000
MAX_BITS = 10_000
"""Numerators and denominators larger than this (about 3,000 digits) are refused."""

MAX_DEPTH = 100
SIGNIFICANT_DIGITS = 10
Number = int | Fraction


def calculator(expression: str) -> str:
    """The value of an arithmetic expression as text: ``"48*17"`` gives ``"816"``, ``"1/3"`` gives ``"0.3333333333"``.

    Raises ToolError, one line, for anything that is not arithmetic, too large, or has no value.
    """
    if not isinstance(expression, str):
        raise ToolError(
            f"calculator: {type(expression).__name__} instead of text; give an expression like 2*(3+4)"
        )
    if len(expression) > MAX_CHARS:
        raise ToolError(f"calculator: {len(expression)} characters; give at most {MAX_CHARS}")
    source = expression.strip().replace("^", "**").replace("×", "*").replace("÷", "/").replace("−", "-")
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(
            f"calculator: {_short(expression)} is not arithmetic; give an expression like 2*(3+4)"
        ) from None
    return render_number(_value(tree.body, expression, 0))


def render_number(value: Number) -> str:
    """Integers exactly; anything else as a decimal of at most ten significant digits without trailing zeros."""
    if value == int(value):
        return str(int(value))
    fraction = Fraction(value)
    context = Context(prec=SIGNIFICANT_DIGITS, rounding=ROUND_HALF_EVEN)
    decimal = context.divide(Decimal(fraction.numerator), Decimal(fraction.denominator)).normalize()
    text = format(decimal, "f")
    return text if len(text) <= 25 else format(decimal, "e")


def _value(node: ast.expr, whole: str, depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise ToolError(f"calculator: {_short(whole)} is nested deeper than {MAX_DEPTH}; simplify it")
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
    ):
        if isinstance(node.value, int):
            return _bounded(node.value, whole)
        if not math.isfinite(node.value):
            raise ToolError(f"calculator: {_short(whole)} is too large; use smaller numbers")
        return _bounded(
            Fraction(repr(node.value)), whole
        )  # 0.1 means a tenth, not the nearest binary fraction
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, whole, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, whole, depth + 1), _value(node.right, whole, depth + 1)
        return _bounded(_combine(node.op, left, right, whole), whole)
    raise ToolError(
        f"calculator: {_short(whole)} is not arithmetic; use numbers, + - * / // % ** and parentheses"
    )


def _combine(op: ast.operator, left: Number, right: Number, whole: str) -> Number:
    if isinstance(op, ast.Add):
        return left + right
    if isinstance(op, ast.Sub):
        return left - right
    if isinstance(op, ast.Mult):
        return left * right
    if isinstance(op, ast.Pow):
        return _power(left, right, whole)
    if not isinstance(op, ast.Div | ast.FloorDiv | ast.Mod):
        raise ToolError(f"calculator: {_short(whole)} is not arithmetic; use + - * / // % **")
    if right == 0:
        raise ToolError(f"calculator: {_short(whole)} divides by zero")
    if isinstance(op, ast.FloorDiv):
        return left // right
    return left % right if isinstance(op, ast.Mod) else Fraction(left) / Fraction(right)


def _power(base: Number, exponent: Number, whole: str) -> Number:
    if exponent != int(exponent):
        if base < 0:
            raise ToolError(f"calculator: {_short(whole)} has no real value")
        try:
            return Fraction(repr(float(base) ** float(exponent)))
        except (OverflowError, ZeroDivisionError):
            raise ToolError(f"calculator: {_short(whole)} is too large; use smaller numbers") from None
    if base == 0 and exponent < 0:
        raise ToolError(f"calculator: {_short(whole)} divides by zero")
    size = max(Fraction(base).numerator.bit_length(), Fraction(base).denominator.bit_length())
    if base not in (-1, 0, 1) and size * abs(int(exponent)) > MAX_BITS + size:
        raise ToolError(f"calculator: {_short(whole)} is too large; use a smaller exponent")
    return Fraction(base) ** int(exponent)


def _bounded(value: Number, whole: str) -> Number:
    fraction = Fraction(value)
    if max(fraction.numerator.bit_length(), fraction.denominator.bit_length()) > MAX_BITS:
        raise ToolError(f"calculator: {_short(whole)} is too large; use smaller numbers")
    return fraction


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
