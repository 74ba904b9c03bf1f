"""Read the built-in corpus: Python's standard library and the project's own parallel sentences.

It is real code and real English that every machine already has. Nothing must be downloaded or licensed. Its
documents are of three kinds:

- ``code``: every module's source, except test suites, bundled wheels and generated character tables;
- ``text``: long docstrings, dedented, as English prose; their source names begin with their file's name
  before a ``#``, so that they are always in the file's split; and the language reference that ``help()``
  reads (``pydoc_data/topics.py``), one document per topic;
- ``parallel``: original sentences in the eight languages of Llama 3.1 and Japanese, in blocks of lines. A
  block has the same source name in every language, so that no sentence is trained in one language and held
  out in another.
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

_SKIPPED = "test tests idle_test lib2to3 site-packages dist-packages _bundled lib-dynload __pycache__"
SKIPPED_FOLDERS = frozenset(_SKIPPED.split())
MIN_DOCSTRING_CHARS = 200
MIN_LETTERS = 0.6
"""Smallest fraction of letters and spaces in a docstring of prose. Tables and sessions have less."""

BLOCK_LINES = 4
LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th", "ja")


def read_builtin() -> Iterator[Document]:
    """Yield the default corpus, always in the same order. Raises DataError without Python's sources.

    The sentences come first, so that even the beginning of the corpus has all languages.
    """
    yield from read_parallel()
    yield from read_stdlib(Path(sysconfig.get_paths()["stdlib"]))


def read_stdlib(root: Path) -> Iterator[Document]:
    """Yield the code and the docstrings of the standard library under ``root``."""
    files = sorted(_modules(root))
    if not files:
        raise DataError(f"{root}: this Python has no sources of its library; give your own text with --text")
    for file in files:
        source = file.relative_to(root).as_posix()
        try:
            text = file.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the standard library's own code
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # a few old modules are not UTF-8
        if _is_table(text, source):
            continue
        if source == "pydoc_data/topics.py":
            yield from _topics(tree)
            continue
        yield Document(text, f"stdlib/{source}", "code", "python")
        for name, docstring in docstrings(tree):
            yield Document(docstring, f"stdlib/{source}#{name}", "text", "en")


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the qualified name and text of every long docstring of mostly prose, in source order."""
    for name, node in _definitions(tree, ""):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_DOCSTRING_CHARS and letters(text) >= MIN_LETTERS:
            yield name or "module", text + "\n"


def letters(text: str) -> float:
    """Return the fraction of the characters that are letters or single spaces."""
    return sum(c.isalpha() or c == " " for c in text) / len(text) - text.count("  ") / len(text)


def read_parallel() -> Iterator[Document]:
    """Yield blocks of `BLOCK_LINES` sentences, language by language."""
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
    """Return the project's sentences in one language. Line i is the same sentence in every language."""
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
    """Return whether a module is a generated table (character map, build settings) and teaches nothing."""
    return "gencodec.py" in text[:500] or source.startswith("_sysconfigdata") or not text.strip()


def _topics(tree: ast.Module) -> Iterator[Document]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for entry in zip(node.keys, node.values, strict=True):
                match entry:
                    case ast.Constant(value=str(topic)), ast.Constant(value=str(text)):
                        yield Document(text, f"stdlib/pydoc_data/topics/{topic}", "text", "en")


Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, Definition]]:
    """Yield the module, its classes, functions and methods with their names, but no nested functions."""
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
