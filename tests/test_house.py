"""The structure of the code base: the map is true, files are small, names mean one thing, imports have no circles."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from vulture import Vulture

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "herd"
ROOMS = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))
MODULES = sorted(SOURCE.rglob("*.py"))


def test_the_map_names_every_room_and_only_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"^\*\*`(\w+)/`\*\*", text, re.MULTILINE))) == ROOMS
    for name in re.findall(r"`(\w+/\w+\.py)`", text):
        assert (SOURCE / name).exists(), f"architecture.md names {name}, which does not exist"


def test_every_module_has_a_docstring_and_at_most_400_lines_of_code():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(('"""', 'r"""')), f"{path} has no docstring"
        assert code_lines(text) <= 400, f"{path} is too long: split it"


def test_a_public_class_name_is_defined_in_one_room_only():
    rooms = defaultdict(set)
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                rooms[node.name].add(path.relative_to(SOURCE).parts[0])
    twice = {name: sorted(where) for name, where in rooms.items() if len(where) > 1}
    assert twice == {}


def test_no_files_import_each_other_in_a_circle():
    graph = {path: set(imported_modules(path)) for path in MODULES}
    assert [" -> ".join(circle) for circle in circles(graph)] == []


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every docstring, those of constants too."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", inspect.cleandoc(node.value.value)


def test_examples_in_docstrings_are_python():
    n_examples = 0
    for where, text in docstrings():
        for block in re.findall(r"::\n\n((?: {4}.*\n?|\n)+)", text):
            example = textwrap.dedent(block)
            if is_python(example.splitlines()[0]):  # not a table of files
                n_examples += 1
                assert is_python(example), f"{where}: its example is not Python"
    assert n_examples >= 3


def test_docstrings_refer_to_names_that_exist():
    """References like `module.name`, where the module or the room is one of these."""
    names = defaultdict(set)
    for path in MODULES:
        module = path.parent.name if path.stem == "__init__" else path.stem
        names[path.parent.name].add(path.stem)
        names[path.parents[1].name].add(path.parent.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names[module].add(node.name)
            elif isinstance(node, ast.alias):
                names[module].add(node.asname or node.name.rpartition(".")[2])
            elif isinstance(node, ast.Name):
                names[module].add(node.id)
    for where, text in docstrings():
        for module, name in re.findall(r"(?<!`)`(?:\w+\.)*(\w+)\.(\w+)`(?!`)", text):
            is_file = name in ("css", "json", "model", "py", "yaml")
            assert is_file or module not in names or name in names[module], f"{where}: {module}.{name}"


def is_python(text: str) -> bool:
    try:
        compile(text, "example", "exec")
    except SyntaxError:
        return False
    return True


def test_no_summary_leaves_a_word_or_two_for_a_second_line():
    for where, text in docstrings():
        summary = text.partition("\n\n")[0].split("\n")
        assert len(summary) != 2 or len(summary[1].split()) > 2, f"{where}: {summary[1]}"


USED_FROM_OUTSIDE = {
    "readinto": "io.BufferedReader calls it",
    "extra_repr": "torch calls it to print a layer",
    **dict.fromkeys(
        (
            "set_up_storage_writer set_up_storage_reader prepare_local_plan prepare_global_plan "
            "validate_checkpoint_id write_data read_data read_metadata"
        ).split(),
        "torch.distributed.checkpoint calls it",
    ),
    "lark": "a user's grammar: herd.Constraint.lark",
    **dict.fromkeys(
        ("to_json", "assistant_spans", "trained_tokens", "read_sentencepiece"),
        "for chat formats of other models",
    ),
}
"""Public names that users or another library's protocol use, with the reason."""


def test_every_name_is_used():
    vulture = Vulture(
        ignore_decorators=[
            "@*.command*", "@*.callback*", "@*_validator*", "@register*", "@router.*", "@*.listens_for*"
        ]
    )  # fmt: skip
    vulture.scavenge([str(SOURCE), str(ROOT / "bench")])
    tables = {
        node.value
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    unused = [
        f"{Path(item.filename).relative_to(ROOT)}:{item.first_lineno} {item.typ} {item.name}"
        for item in vulture.get_unused_code(min_confidence=60)
        if item.typ in ("class", "function", "method", "property", "import")
        and Path(item.filename).is_relative_to(SOURCE)
        and not item.name.startswith("__")
        and item.name not in tables | USED_FROM_OUTSIDE.keys()
    ]
    assert unused == []
    assert len(USED_FROM_OUTSIDE) <= 25


def code_lines(text: str) -> int:
    """Count the lines of Python that hold code: no blank lines, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def imported_modules(path: Path) -> list[Path]:
    """Return the files of the package that ``path`` imports, at module level or inside a function.

    Imports for type checkers only and a package's own ``__init__`` (which names what it exports) do not count.
    """
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0 or node in typing_only:
            continue
        base = path.parents[node.level - 1]
        base = base.joinpath(*node.module.split(".")) if node.module else base
        for name in node.names:
            for target in (base / f"{name.name}.py", base.with_suffix(".py")):
                if target.is_file():
                    found.append(target)
                    break
    return found


def circles(graph: dict[Path, set[Path]]) -> list[list[str]]:
    """Return one circle of imports for every file from which a path leads back to itself."""
    found = []
    for start in graph:
        trail: dict[Path, Path] = {}
        queue = [start]
        while queue:
            here = queue.pop()
            for target in graph[here]:
                if target not in trail:
                    trail[target] = here
                    queue.append(target)
        if start in trail:
            steps, here = [start], trail[start]
            while here != start:
                steps.append(here)
                here = trail[here]
            found.append([str(step.relative_to(SOURCE)) for step in [start, *reversed(steps[1:]), start]])
    return found


@pytest.mark.parametrize(
    "text, count",
    [
        ('"""Doc."""\n\nx = 1  # one\n# two\n', 1),
        ("def f():\n    '''Doc\n    more.'''\n    return '''a\n    b'''\n", 3),
    ],
)
def test_code_lines_leave_out_blanks_comments_and_docstrings(text, count):
    assert code_lines(text) == count
