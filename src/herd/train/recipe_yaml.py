"""Read YAML 1.2 with the line of every key.

PyYAML reads YAML 1.1, in which ``0100`` is 64, ``1:30`` is 90, ``no`` is false and ``3e-4`` is text. Here
scalars are those of YAML 1.2's core schema, and numbers may have underscores (``1_000_000``).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import RecipeError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's loader without the scalars of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML changes it in place)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """Return an integer in decimal, hexadecimal (0x) or octal notation (0o)."""
        text = node.value.replace("_", "")
        return int(text, 10 if text.lstrip("+-").isdecimal() else 0)


_RESOLVERS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "merge": (r"<<", "<"),
}
for _name, (_pattern, _first) in _RESOLVERS.items():
    _first_characters = [*_first, *([""] if _name == "null" else [])]
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _first_characters
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)


def read_yaml(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the data of a YAML text, and the line of each key and entry.

    Raises `RecipeError` that begins with ``where`` and the line: for text that is not YAML, a key that is
    given twice, and an alias that refers to a part that contains it.
    """
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{where}:{line}: not YAML: the character U+{error.character:04X}") from error
    try:
        node = loader.get_single_node()
        _mark(node, (), (), lines, where)
        return (loader.construct_document(node) if node is not None else None), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise RecipeError(f"{where}:{line}: not YAML: {error.problem}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}:1: not YAML: it is nested too deeply") from error
    finally:
        loader.dispose()


def dotted(at: KeyPath) -> str:
    """Return the name of a key in messages, e.g. ``train.steps``."""
    return ".".join(str(part) for part in at)


def _mark(node: Any, at: KeyPath, around: tuple[Any, ...], lines: dict[KeyPath, int], where: str) -> None:
    """Record the line of every key. A key that is given twice is an error, not a silent choice."""
    if node in around:
        line = node.start_mark.line + 1
        raise RecipeError(
            f"{where}:{line}: {dotted(at)}: an alias refers to a part that contains it; write it out"
        )
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*at, key.value)
            if inner in lines:
                raise RecipeError(f"{where}:{key.start_mark.line + 1}: {dotted(inner)} is given twice")
            lines[inner] = key.start_mark.line + 1
            _mark(value, inner, (*around, node), lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _mark(value, (*at, index), (*around, node), lines, where)
