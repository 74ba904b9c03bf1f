"""Small Python functions that dialogs ask for, listed in ``programs.yaml``, and the hidden check of each.

A question asks for ``area(w, h): the area of a rectangle``. The model must copy the names of the function and
its parameters from the question, and know the formula. The hidden check (a few asserts on inputs that the
question does not show) is computed from the body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...package_yaml import package_yaml


@dataclass(frozen=True)
class Program:
    """A function to ask for. ``body`` is an expression of its parameters {a} {b} {c} and a constant {k}."""

    key: str
    names: tuple[str, ...]
    params: tuple[tuple[str, ...], ...]
    body: str
    trials: tuple[tuple[Any, ...], ...]

    @property
    def constant(self) -> bool:
        """Whether the body has a constant. It is drawn for each dialog."""
        return "{k}" in self.body

    def value(self, arguments: tuple[Any, ...], k: int) -> Any:
        """Return the function's value for ``arguments``. `eval` is safe, because Herd wrote the bodies."""
        body = self.body.format(a="a", b="b", c="c", k="k")
        return eval(body, {}, {**dict(zip("abc", arguments, strict=False)), "k": k})


def _read() -> tuple[Program, ...]:
    data = package_yaml(__package__, "programs.yaml")
    params = {name: tuple(tuple(one.split()) for one in sets) for name, sets in data["params"].items()}
    trials = {name: tuple(map(tuple, rows)) for name, rows in data["trials"].items()}
    return tuple(
        Program(
            row["key"], tuple(row["names"].split()), params[row["params"]], row["body"], trials[row["trials"]]
        )
        for row in data["programs"]
    )


PROGRAMS = _read()


def hidden_check(program: Program, name: str, k: int) -> str:
    """Return the assert statements that a right program called ``name`` passes, one per trial."""
    edges = ((k,), (k + 1,), (3 * k,)) if program.constant else ()
    rows = []
    for trial in (*program.trials, *edges):
        arguments = ", ".join(repr(value) for value in trial)
        rows.append(f"assert {name}({arguments}) == {program.value(trial, k)!r}")
    return "\n".join(rows)
