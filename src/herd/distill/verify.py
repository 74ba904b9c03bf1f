"""Verify a teacher's answers by running them, by solving the question, by a schema or by agreement.

The fields of a prompt decide: ``tests`` (asserts for the program in the answer), ``expression`` (arithmetic
whose value the answer must state), ``answer`` (a text that it must state), ``schema`` (JSON Schema of the
whole answer). A prompt without any of them is answered several times, and an answer is right if it says the
same as most others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.scoring import states
from ..errors import DataError, ToolError
from ..evals.tasks.json_schema import violation
from ..text.fenced import python_program
from ..tools import Sandbox, call_tool

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CONCLUSION = re.compile(r"(?:answer|result|total)\b[^.\n]*?(?:is|:|=)\s*(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Verification:
    """A verdict on an answer: accepted or not, the method, and the reason."""

    accepted: bool
    method: str
    why: str = ""


def method_of(prompt: Mapping[str, Any]) -> str:
    """Return the method that verifies the answers to a prompt."""
    fields = {"tests": "execution", "expression": "solver", "answer": "solver", "schema": "schema"}
    return next((method for field, method in fields.items() if field in prompt), "agreement")


def verify(
    prompt: Mapping[str, Any], answers: Sequence[str], sandbox: Sandbox, least: float
) -> list[Verification]:
    """Verify all answers to one prompt. ``least`` is the fraction of samples that must agree."""
    method = method_of(prompt)
    if method == "agreement":
        return _agreement(answers, least)
    check = {"execution": _execution, "solver": _solver, "schema": _schema}[method]
    return [Verification(not why, method, why) for why in (check(prompt, a, sandbox) for a in answers)]


def _execution(prompt: Mapping[str, Any], answer: str, sandbox: Sandbox) -> str:
    program = python_program(answer)
    if not program.strip():
        return "no program"
    result = sandbox.run(f"{program}\n\n{prompt['tests']}\nprint('all tests passed')")
    if result.ok and result.stdout.rstrip().endswith("all tests passed"):
        return ""
    return (result.stderr.strip().splitlines() or [result.reason or "a test failed"])[-1]


def wanted_answer(prompt: Mapping[str, Any]) -> str:
    """Return what an answer must state. Raises `DataError` for an expression that has no value."""
    if "answer" in prompt:
        return str(prompt["answer"])
    try:
        return str(call_tool("calculator", {"expression": str(prompt["expression"])}))
    except ToolError as error:
        raise DataError(f"expression {prompt['expression']!r}: {error}") from error


def _solver(prompt: Mapping[str, Any], answer: str, sandbox: Sandbox) -> str:
    wanted = wanted_answer(prompt)
    return "" if states(_concluded(answer), wanted) else f"does not conclude with {wanted}"


def _schema(prompt: Mapping[str, Any], answer: str, sandbox: Sandbox) -> str:
    text = answer.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "not JSON"
    return violation(value, prompt["schema"])


def _agreement(answers: Sequence[str], least: float) -> list[Verification]:
    keys = [_key(answer) for answer in answers]
    counts = Counter(key for key in keys if key)
    most = counts.most_common(2)
    best = most[0][0] if most and most[0][1] > 1 and most[0][1] / len(answers) >= least else None
    if len(most) > 1 and most[1][1] == most[0][1]:
        best = None
    out = []
    for key in keys:
        why = "" if key == best and best else "too few agree" if best is None else "most answers differ"
        out.append(Verification(not why, "agreement", why))
    return out


def _key(answer: str) -> str:
    """Return the key of an answer: its last number, or its last sentence without case and punctuation."""
    conclusion = _concluded(answer)
    numbers = _NUMBER.findall(conclusion)
    if numbers:
        return str(float(numbers[-1].replace(",", "")))
    return " ".join(re.findall(r"\w+", conclusion.lower()))


def _concluded(answer: str) -> str:
    """Return the part of an answer that concludes: after "the answer is", or its last line."""
    found = _CONCLUSION.findall(answer)
    lines = [line for line in answer.strip().splitlines() if line.strip()]
    return found[-1] if found else lines[-1] if lines else ""
