"""The wordings of questions and replies: one YAML file per language, train and test kept apart.

A line is a pattern: ``[What is|How much is] {a} plus {b}?`` stands for two wordings, with alternatives in
square brackets and slots in braces. Each topic has a ``train`` and a ``test`` list with no wording in common,
and replies. First a line is drawn, then its alternatives, so a line with many alternatives is not more
frequent.

The files follow two rules because of the tokenizer. Numbers and quoted words are always between characters
that are not letters or digits (a space, a quote, a bracket), and a quoted word always follows a space and a
quote. Llama's pre-tokenizer then splits the word into the same tokens in the question, the call, the result
and the answer, and one attention head can copy it. Tool use is mostly such copying.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...package_yaml import package_yaml

LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th")

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")


def expand(pattern: str) -> tuple[str, ...]:
    """Return all wordings of one pattern: ``[a|b] c`` -> ``("a c", "b c")``. Alternatives do not nest."""
    parts = _ALTERNATIVES.split(pattern)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return tuple(" ".join("".join(chosen).split()) for chosen in itertools.product(*choices))


@dataclass(frozen=True)
class Topic:
    """A topic to ask about: wordings by split (a tuple of lines, each a tuple of expansions) and replies."""

    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]
    replies: tuple[str, ...]

    def lines(self, split: str) -> tuple[tuple[str, ...], ...]:
        return self.train if split == "train" else self.test


@dataclass(frozen=True)
class Wordings:
    """The texts of one language: topics by name, and the words that fill the slots."""

    lang: str
    topics: dict[str, Topic]
    names: dict[str, tuple[str, ...]]
    things: tuple[str, ...]
    words: tuple[str, ...]
    weekdays: tuple[str, ...]
    programs: dict[str, str]


def _lines(block: str) -> tuple[tuple[str, ...], ...]:
    return tuple(expand(line) for line in block.splitlines() if line.strip())


def _topic(entry: dict[str, str]) -> Topic:
    replies = tuple(line.strip() for line in entry["reply"].splitlines() if line.strip())
    return Topic(_lines(entry["train"]), _lines(entry["test"]), replies)


@cache
def load_wordings(lang: str) -> Wordings:
    """Return the wordings of ``lang`` (one of ``LANGUAGES``), read once."""
    data: dict[str, Any] = package_yaml(__name__, f"{lang}.yaml")
    return Wordings(
        lang=lang,
        topics={name: _topic(entry) for name, entry in data["topics"].items()},
        names={split: tuple(names.split()) for split, names in data["names"].items()},
        things=tuple(thing.strip() for thing in data["things"].split(",")),
        words=tuple(data["words"].split()),
        weekdays=tuple(data["weekdays"].split()),
        programs=dict(data["programs"]),
    )
