"""The corpus every machine already has: Python's standard library and the project's own parallel sentences.

Real code and real English, on the disk since Python came: nothing to download and nothing to license. Three kinds of
documents come of it:

- ``code``: every module's source, except test suites, bundled wheels and generated character tables;
- ``text``: long documentation strings, dedented, as English prose of their own; they carry their file's name before the
  ``#``, so that they are always split together with it; and the language reference that ``help()`` reads
  (``pydoc_data/topics.py``), one document a topic;
- ``parallel``: original sentences in the eight languages of Llama 3.1 and Japanese, in blocks of lines. A block has the
  same source name in every language, so that no sentence is trained in one language and held out in another.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from ..errors import DataError
from .sources import Document

SKIPPED_FOLDERS = frozenset(
    (
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "_bundled",
        "lib-dynload",
        "__pycache__",
    )
)
MIN_DOCSTRING_CHARS = 200
MIN_LETTERS = 0.6
"""Share of letters and spaces above which a documentation string is prose, not a table or a session."""

BLOCK_LINES = 4
LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th", "ja")


def read_builtin() -> Iterator[Document]:
    """The default corpus, always in the same order. DataError where Python came without its sources.

    The sentences come first: who reads only the beginning of the corpus still has all languages.
    """
    yield from read_parallel()
    yield from read_stdlib(Path(sysconfig.get_paths()["stdlib"]))


def read_stdlib(root: Path) -> Iterator[Document]:
    """Code and documentation strings of the library under ``root``."""
    files = sorted(_modules(root))
    if not files:
        raise DataError(
            f"{root}: this Python came without its library's sources; give your own text with --text"
        )
    for file in files:
        source = file.relative_to(root).as_posix()
        try:
            text = file.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the library's own code: nothing the user could mend
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a few old modules are not UTF-8; they are not the user's, nothing is lost
        if _is_table(text, source):
            continue
        if source == "pydoc_data/topics.py":
            yield from _topics(tree)
            continue
        yield Document(text, f"stdlib/{source}", "code", "python")
        for name, docstring in docstrings(tree):
            yield Document(docstring, f"stdlib/{source}#{name}", "text", "en")


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(qualified name, text) of every documentation string that is long and mostly prose, in source order."""
    for name, node in _definitions(tree, ""):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_DOCSTRING_CHARS and letters(text) >= MIN_LETTERS:
            yield name or "module", text + "\n"


def letters(text: str) -> float:
    """Share of the characters that are letters or single spaces between them."""
    return sum(c.isalpha() or c == " " for c in text) / len(text) - text.count("  ") / len(text)


def read_parallel() -> Iterator[Document]:
    """Blocks of `BLOCK_LINES` sentences, language by language; every language has the same number of lines."""
    lines = {lang: parallel_lines(lang) for lang in LANGUAGES}
    counts = {lang: len(of) for lang, of in lines.items()}
    if len(set(counts.values())) != 1:
        raise DataError(f"parallel sentences are not aligned: {counts} lines; reinstall the package")
    for lang in LANGUAGES:
        for start in range(0, counts[lang], BLOCK_LINES):
            block = lines[lang][start : start + BLOCK_LINES]
            source = f"parallel/lines-{start + 1:03d}-{start + len(block):03d}#{lang}"
            yield Document("\n".join(block) + "\n", source, "parallel", lang)


def parallel_lines(lang: str) -> list[str]:
    """The project's sentences in one language, line i of each language saying the same."""
    file = resources.files(__package__).joinpath("parallel", f"{lang}.txt")
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{file}: missing from the installation; reinstall the package") from None


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _is_table(text: str, source: str) -> bool:
    """Character maps and build settings: machine-made, nothing to learn from."""
    return "gencodec.py" in text[:500] or source.startswith("_sysconfigdata") or not text.strip()


def _topics(tree: ast.Module) -> Iterator[Document]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and isinstance(value, ast.Constant)
                    and isinstance(value.value, str)
                ):
                    yield Document(value.value, f"stdlib/pydoc_data/topics/{key.value!s}", "text", "en")


Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, Definition]]:
    """The module, its classes and functions, and their methods; the insides of functions are not searched."""
    if isinstance(node, ast.Module):
        yield "", node
    for child in [*getattr(node, "body", []), *getattr(node, "orelse", []), *getattr(node, "handlers", [])]:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            full = f"{name}.{child.name}" if name else child.name
            yield full, child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, full)
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(child, name)
