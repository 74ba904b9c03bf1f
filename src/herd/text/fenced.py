"""Fenced code blocks in text, and the Python program in a model's answer.

Fences follow CommonMark (spec 0.31, section 4.5), also within block quotes, with four liberties that models
need: an opening fence may be indented by any amount and may follow other words on its line
("Here: ```python"), a closing fence may end the last line of code, and it may lack the mark of the quote.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_OPENING = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)")
_OPENING_AFTER_WORDS = re.compile(r".*\S[ \t]*(?P<indent>)(?P<fence>`{3,})(?P<info>[ \t]*\w[^`]*)")
_QUOTE = re.compile(r"[ \t]*(?:(?:[-*+]|\d+[.)]) +)?(?:> ? {0,3})*> ?")
_LANGUAGE = re.compile(r"[\s{.]*([\w+#-]*)")
_PYTHON = ("", "python", "python3", "py", "py3", "ipython", "ipython3")
_START = re.compile(r"^(?:(?:async +)?def |class \w|@\w|import \w|from [\w.]+ import )", re.MULTILINE)
_DEF_IN_A_LINE = re.compile(r"\b(?:async +)?def +\w+ *\(")
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)
_LAST_WORD = re.compile(r"\n\w+\s*\Z")  # prose such as "Done", although it is valid Python
_MAX_SEGMENTS = 50  # stretches of unfenced code that are tried: an answer has a handful


@dataclass(frozen=True)
class FencedBlock:
    """A block of code between two fences.

    ``language`` is the first word of the info string in lower case, or "". ``code`` is without the
    indentation of the fence. ``closed`` is false if the text ends before the closing fence.
    """

    language: str
    code: str
    closed: bool


def fenced_blocks(text: str) -> list[FencedBlock]:
    """Return the fenced code blocks of a text in order. A block that is never closed lasts to the end."""
    blocks = []
    lines = deque(text.splitlines(keepends=True))
    while lines:
        line = lines.popleft()
        quote = _QUOTE.match(line)
        line = line[quote.end() if quote else 0 :].rstrip()
        opening = _OPENING.fullmatch(line) or _OPENING_AFTER_WORDS.fullmatch(line)
        if opening:
            depth = quote[0].count(">") if quote else 0
            code, closed = _content(lines, opening["fence"], len(opening["indent"]), depth)
            language = _LANGUAGE.match(opening["info"])
            blocks.append(FencedBlock(language[1].lower() if language else "", code, closed))
    return blocks


def python_program(text: str, name: str = "") -> str:
    """Return the Python program in a model's answer, ready to have tests appended.

    The program is the last piece of code that parses and defines the function ``name`` (any function, if
    ``name`` is empty), because a model may write a draft before the final version. Fenced blocks are searched
    first, then unfenced code between prose. Imports, helper functions and constants that this piece uses but
    another piece defines are put before it. A block under ``if __name__ == "__main__"`` is dropped, and
    imports from ``__future__`` come first. If no code defines ``name``, the program is the last piece with
    any function, else the first fenced block, else the whole text.
    """
    blocks = fenced_blocks(text)
    blocks = [block for block in blocks if block.language in _PYTHON] or blocks
    written = [b.code if b.closed else _longest_program(b.code) or b.code for b in blocks]
    for pieces in (written, list(_unfenced(text))):
        parsed = [piece for piece in map(_parse_dedented, pieces) if piece]
        for number in range(len(parsed) - 1, -1, -1):
            code, tree = parsed[number]
            if name in (names := defined_functions(code)) or (names and not name):
                others = [node for _, other in parsed[:number] + parsed[number + 1 :] for node in other.body]
                return _assemble(code, tree, others)
    if name:
        return python_program(text)
    return written[0] if written else text


def defined_functions(code: str) -> set[str]:
    """Return the names of the functions that a program defines at its top level."""
    tree = parse_python(code)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, functions)} if tree else set()


def parse_python(code: str) -> ast.Module | None:
    """Return the syntax tree of an untrusted program, or None if it is not valid Python."""
    try:
        return _parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def future_imports_first(code: str) -> str:
    """Move imports from ``__future__`` to the beginning, the only place where Python allows them."""
    return "".join(line.rstrip("\n") + "\n" for line in _FUTURE.findall(code)) + _FUTURE.sub("", code)


def _content(lines: deque[str], fence: str, indent: int, depth: int) -> tuple[str, bool]:
    """Consume lines up to the closing fence. Returns the code, and whether there was a closing fence.

    ``depth`` is the number of block quotes around the fence. The code ends where they end.
    """
    code: list[str] = []
    marks = re.compile(rf"(?:[ \t]*> ?){{{depth}}}")
    while lines and (quote := marks.match(lines[0])):
        line = lines.popleft()[quote.end() :]
        bare = line.strip()
        blanks = len(line) - len(line.lstrip(" \t"))
        # a deeper fence is part of the code, for example of a docstring
        if len(bare) >= len(fence) and set(bare) == {fence[0]} and blanks <= indent + 3:
            return "".join(code), True
        line = line[min(indent, blanks) :]
        if fence[0] == "`" and line.count("```") == 1 and bare.endswith("```") and bare != "```":
            return "".join([*code, line.rstrip()[:-3] + "\n"]), True
        code.append(line)
    if depth and lines and lines[0].strip() == fence:  # without the mark of the quote, as models write it
        lines.popleft()
        return "".join(code), True
    return "".join(code), False


def _unfenced(text: str) -> Iterator[str]:
    """Yield stretches of code, from a definition or an import to the last line that is valid Python."""
    position = 0
    for _ in range(_MAX_SEGMENTS):
        start = _START.search(text, position) or _DEF_IN_A_LINE.search(text, position)
        if not start:
            return
        code = _longest_program(text[start.start() :])
        position = start.start() + max(len(code), 1)
        if code:
            yield code


def _longest_program(text: str) -> str:
    """Return the longest beginning of a text that is valid Python and ends between top-level statements."""
    lines = text.splitlines(keepends=True)
    while lines:
        try:
            _parse(code := "".join(lines))
            return _LAST_WORD.sub("\n", code)
        except SyntaxError as error:
            end = min(error.lineno or len(lines), len(lines)) - 1
        except (ValueError, RecursionError, MemoryError):
            return ""
        while end and (lines[end][:1].isspace() or not lines[end].strip()):
            end -= 1
        lines = lines[:end]
    return ""


def _parse(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model's program may use invalid escapes, which only warn
        return ast.parse(code)


def _parse_dedented(code: str) -> tuple[str, ast.Module] | None:
    """Return the program, dedented if it parses only so, and its syntax tree. None if it does not parse."""
    for candidate in (code, textwrap.dedent(code)):
        if tree := parse_python(candidate):
            return candidate, tree
    return None


def _assemble(code: str, tree: ast.Module, others: Sequence[ast.stmt]) -> str:
    """Return ``code`` after the statements of ``others`` that define the names it uses and lacks."""
    body = [node for node in tree.body if not _is_main_guard(node)]
    definitions = {name: node for node in others for name in _bound(node)}  # the last one counts
    wanted = ["*", *(_used(body) - _bound_anywhere(body))]
    chosen = []
    while wanted:
        node = definitions.pop(wanted.pop(), None)
        if node and node not in chosen:
            chosen.append(node)
            wanted += _used([node]) - _bound_anywhere([node, *body])
    if chosen or len(body) < len(tree.body):
        try:
            code = ast.unparse(ast.Module([*(node for node in others if node in chosen), *body], []))
        except RecursionError:
            return code
    return future_imports_first(code)


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in _used([node.test])


def _used(nodes: Iterable[ast.AST]) -> set[str]:
    walked = (part for node in nodes for part in ast.walk(node))
    return {part.id for part in walked if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


def _bound_anywhere(nodes: Iterable[ast.AST]) -> set[str]:
    """Return every name that the nodes define at any depth: variables, parameters, functions, imports."""
    names = set()
    for part in (part for node in nodes for part in ast.walk(node)):
        if isinstance(part, ast.arg):
            names.add(part.arg)
        elif isinstance(part, ast.stmt):
            names |= _bound(part)
        elif isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
            names.add(part.id)
    return names


def _bound(node: ast.stmt) -> set[str]:
    """Return the names that one definition, import or assignment defines, and none for other statements."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Import() | ast.ImportFrom():
            return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        case ast.Assign() | ast.AnnAssign():
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return set()
