"""Read YAML 1.2 with the line of every key, and write it.

PyYAML reads YAML 1.1, in which ``0100`` is 64, ``1:30`` is 90, ``no`` is false and ``3e-4`` is text. Here
scalars are those of YAML 1.2's core schema, and numbers may have underscores (``1_000_000``).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import RecipeError

KeyPath = tuple[str | int, ...]


MAX_DIGITS = 100
"""Most digits of an integer: enough for any number of a recipe, and few enough to print it."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader without the scalars of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML changes it in place)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """Return an integer in decimal, hexadecimal (0x) or octal notation (0o)."""
        text = node.value.replace("_", "")
        if len(text) > MAX_DIGITS:
            raise ValueError("too many digits")
        return int(text, 10 if text.lstrip("+-").isdecimal() else 0)


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, which quotes text that is a number or a truth value in YAML 1.1 or 1.2."""


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
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _first_characters
        )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)


_TAGS = (*_RESOLVERS, "str", "seq", "map")
MAX_ENTRIES = 100_000
"""Most keys and entries of a text. Nested aliases can multiply a few lines to billions of them."""


class _Mistake(yaml.MarkedYAMLError):
    """A mistake in a text that is YAML, with its place."""

    def __init__(self, node: yaml.Node, problem: str) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)


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
        if node is None:
            return None, lines
        _mark(node, (), (), lines, loader)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise RecipeError(
            f"{where}:{line}: {'' if isinstance(error, _Mistake) else 'not YAML: '}{error.problem}"
        ) from error
    except RecursionError as error:
        raise RecipeError(f"{where}:1: not YAML: it is nested too deeply") from error
    finally:
        loader.dispose()


def write_yaml(data: Any) -> str:
    """Return the YAML text of plain data. `read_yaml` gives the same data back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dotted(at: KeyPath) -> str:
    """Return the name of a key in messages, e.g. ``train.steps``."""
    return ".".join(str(part) for part in at)


def _mark(
    node: yaml.Node, at: KeyPath, around: tuple[yaml.Node, ...], lines: dict[KeyPath, int], loader: _Loader
) -> None:
    """Record the line of every key, and check what constructing the data does not.

    A key that is given twice is an error, not a silent choice.
    """
    if node in around:
        raise _Mistake(node, f"{dotted(at)}: an alias refers to a part that contains it; write it out")
    if len(lines) > MAX_ENTRIES:
        raise _Mistake(node, f"more than {MAX_ENTRIES:,} entries, aliases included")
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
        raise _Mistake(node, f"the tag {node.tag} is not one of {', '.join(_TAGS)}")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Mistake(key, "a key must be text")
            inner = (*at, key.value)
            if inner in lines:
                raise _Mistake(key, f"{dotted(inner)} is given twice")
            lines[inner] = key.start_mark.line + 1
            _mark(value, inner, (*around, node), lines, loader)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _mark(value, (*at, index), (*around, node), lines, loader)
    else:
        try:
            loader.construct_object(node)
        except (ValueError, KeyError, IndexError) as error:  # an explicit tag, or too many digits
            raise _Mistake(node, f"{dotted(at)}: {node.value[:40]!r} cannot be read as {node.tag}") from error
