"""Make long texts with something to find in them: needles, chains, frequent words, questions.

A text consists of lines. The lines with the answer are put at their depths, and other lines fill the text up
to its length, counted in tokens of the model that reads it. Facts are worded as in `herd.data.needle`, with
names and codes of its test split, which is never used in training. Everything is determined by the seed.

- ``single``: one name with a code. The question asks for the code.
- ``multikey``: four names with codes. The question asks for one.
- ``multivalue``: one name with four codes. The question asks for all of them.
- ``multiquery``: four names with codes. The question asks for all of them.
- ``distractors``: nothing but names with codes. The question asks for one.
- ``variables``: A = 4711, B = A, ... scattered over the text. The question asks which variables have a value.
- ``common_words``: a list of words, ten of them ten times as frequent. The question asks for these ten.
- ``frequent_words``: made-up words whose counts follow a power law. The question asks for the top three.
- ``questions``: a question about one of many paragraphs.

Source: Hsieh et al., "RULER", arXiv 2404.06654, section 3 and appendix B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count as count_up
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..data.needle import WORDS, draw_codes, draw_names, two_word_names
from ..data.shuffle import generator, mixed_key
from ..errors import DataError
from .score import grouped

Count = Callable[[str], int]
Random = np.random.Generator
FACT = "The secret code for {name} is {code}."
CALM = tuple(Path(__file__).with_name("calm_lines.txt").read_text(encoding="utf-8").splitlines())
"""Lines without content, used to hide facts in if there is no other text."""
HOPS, N_COMMON, N_FREQUENT = 4, 10, 3
_SYLLABLES = [consonant + vowel for consonant in "bdklmnr" for vowel in "aeiou"]


@dataclass(frozen=True)
class LongQuestion:
    """A long text with a question about it.

    ``begun`` is the beginning of the answer, part of a base model's prompt. The answer must contain all of
    ``expected``, or one of them if ``any_of``. ``n_tokens`` counts text, question and beginning.
    """

    text: str
    question: str
    begun: str
    expected: tuple[str, ...]
    n_tokens: int
    any_of: bool = False

    @property
    def prompt(self) -> str:
        return f"{self.text}\n\n{self.question}\n{self.begun}"


@dataclass(frozen=True)
class Passage:
    """A paragraph and a question that it answers."""

    text: str
    question: str
    answers: tuple[str, ...]


def share_found(asked: LongQuestion, answer: str) -> float:
    """Return the fraction of the expected texts that occur in the answer as whole words, in any case."""
    hits = [
        re.search(rf"(?<![^\W_]){re.escape(one)}(?![^\W_])", answer, re.IGNORECASE) is not None
        for one in asked.expected
    ]
    return float(any(hits)) if asked.any_of else sum(hits) / len(hits)


def length_depth_grid(places: Sequence[tuple[int, float]], values: Sequence[float]) -> list[dict[str, Any]]:
    """Return the mean value for each (length, depth), for a heat map."""
    return [
        {"length": length, "depth": depth, "value": sum(some) / len(some)}
        for (length, depth), some in sorted(grouped(places, values).items())
    ]


@dataclass(frozen=True)
class Maker:
    """A maker of long texts, with a function that counts tokens and a supply of lines to hide facts in."""

    count: Count
    lines: Sequence[str] = CALM
    passages: Sequence[Passage] = ()

    def make(self, kind: str, length: int, depth: float, seed: int) -> LongQuestion:
        """Return a text that has, with its question, at most ``length`` tokens and hardly fewer.

        ``depth`` is the position of the first requested fact, from 0 (beginning) to 1 (end). Raises
        `DataError` if the kind is unknown or the length is too short.
        """
        if kind not in KINDS:
            raise DataError(f"unknown kind of long text {kind!r}: the kinds are {', '.join(KINDS)}")
        random = generator(seed, mixed_key(length, int(depth * 1e6), list(KINDS).index(kind)), 7)
        return KINDS[kind](self, length, depth, random)

    def hide(
        self,
        length: int,
        places: Sequence[float],
        facts: Sequence[str],
        filler: Iterator[str],
        asked: LongQuestion,
    ) -> LongQuestion:
        """Return ``asked`` with a text of ``filler`` lines that has the facts at their depths (0 to 1)."""
        used = self.count(f"\n\n{asked.question}\n{asked.begun}") + sum(
            self.count(f"{fact}\n") for fact in facts
        )
        if used > length:
            raise DataError(f"a text of {length} tokens is too short for this question, which needs {used}")
        lines: list[str] = []
        for line in filler:
            cost = self.count(f"{line}\n")
            if used + cost > length:
                break
            lines.append(line)
            used += cost
        for place, fact in sorted(zip(places, facts, strict=True), key=lambda pair: -pair[0]):
            lines.insert(round(place * len(lines)), fact)
        return replace(asked, text="\n".join(lines), n_tokens=used)

    def filler(self, random: Random) -> Iterator[str]:
        """Return an endless iterator over the lines, from a random line on."""
        start = int(random.integers(len(self.lines)))
        return cycle([*self.lines[start:], *self.lines[:start]])


Make = Callable[[Maker, int, float, Random], LongQuestion]


def _needles(asked: int, names: int, values: int) -> Make:
    """Return a kind with ``names`` names of ``values`` codes each.

    The question asks for the first ``asked``.
    """

    def make(maker: Maker, length: int, depth: float, random: Random) -> LongQuestion:
        called, codes = (
            draw_names(random, two_word_names("test"), names),
            draw_codes(random, "test", names * values),
        )
        facts = [FACT.format(name=called[i // values], code=code) for i, code in enumerate(codes)]
        question, filler = _codes_asked(called[:asked], codes[: asked * values]), maker.filler(random)
        places = [depth, *sorted(random.random(len(facts) - 1).tolist())]
        return maker.hide(length, places, facts, filler, question)

    return make


def _distractors(maker: Maker, length: int, depth: float, random: Random) -> LongQuestion:
    """Fill the text with names and codes. Names have three words, so that there are enough of them."""
    first, second = WORDS["test"]
    (code, *codes), [name] = draw_codes(random, "test", 1000), draw_names(random, two_word_names("test"), 1)

    def others() -> Iterator[str]:
        while True:
            a, b, c = random.integers(len(first)), random.integers(len(first)), random.integers(len(second))
            if a != b:
                other = f"{first[a]} {first[b]} {second[c]}"
                yield FACT.format(name=other, code=codes[random.integers(len(codes))])

    return maker.hide(
        length, [depth], [FACT.format(name=name, code=code)], others(), _codes_asked([name], [code])
    )


def _codes_asked(names: Sequence[str], codes: Sequence[str]) -> LongQuestion:
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    are, secret = ("are", "secret codes") if len(codes) > 1 else ("is", "secret code")
    question = f"Question: What {are} the {secret} for {listed}?"
    return LongQuestion("", question, f"Answer: The {secret} for {listed} {are}", tuple(codes), 0)


def _variables(maker: Maker, length: int, depth: float, random: Random) -> LongQuestion:
    """Scatter a chain of assignments in order, and a second chain with another value as a distractor."""
    letters = list("ABCDEFGHJKLMNPQRSTUVWXYZ")
    names: list[str] = []
    while len(names) < 2 * (HOPS + 1):
        name = "".join(random.choice(letters, 5))
        names += [name] if name not in names else []
    chains = (names[: HOPS + 1], names[HOPS + 1 :])
    values = draw_codes(random, "test", 2)
    question = (
        f"Which variables have the value {values[0]} by the assignments above, directly or through others?"
    )
    asked = LongQuestion("", question, f"The variables with the value {values[0]} are", tuple(chains[0]), 0)
    asked = maker.hide(length, [], [], maker.filler(random), asked)
    lines, used = asked.text.split("\n"), asked.n_tokens
    for chain, value, start in zip(chains, values, (depth, 0.0), strict=True):
        assigned = [
            f"VAR {chain[0]} = {value}",
            *(f"VAR {name} = VAR {other}" for other, name in pairwise(chain)),
        ]
        used += sum(maker.count(f"{line}\n") for line in assigned)
        places = sorted([start, *(start + (1 - start) * random.random(HOPS)).tolist()], reverse=True)
        at = len(lines)
        for place, line in zip(places, reversed(assigned), strict=True):
            at = min(at, round(place * len(lines)))
            lines.insert(at, line)
    while used > length and len(lines) > 2 * (HOPS + 1):
        at = next(i for i in range(len(lines) - 1, -1, -1) if not lines[i].startswith("VAR "))
        used -= maker.count(f"{lines.pop(at)}\n")
    if used > length:
        raise DataError(f"a text of {length} tokens is too short for the assignments: they need {used}")
    return replace(asked, text="\n".join(lines), n_tokens=used)


def _words(random: Random, n: int) -> list[str]:
    """Return ``n`` different made-up words of three syllables."""
    size = len(_SYLLABLES)
    picked = random.choice(size**3, n, replace=False)
    return ["".join(_SYLLABLES[int(p) // size**k % size] for k in range(3)) for p in picked]


def _common_words(maker: Maker, length: int, depth: float, random: Random) -> LongQuestion:
    """Shuffle ten words thirty times each and others three times each (fewer times in short texts)."""
    n = N_COMMON
    question, begun = (
        f"Which {n} words are the most frequent in the list above?",
        f"The {n} most frequent words are",
    )
    room = length - maker.count(f"\n\n{question}\n{begun}") - 8
    words = _words(random, 6000)
    cost = np.array([maker.count(f" {word}") for word in words]) + 2.0  # number and comma
    often = 30
    while often > 5 and often * cost[:n].sum() > room / 2:
        often -= 5
    rare = max(1, often // 10)
    left = room - often * cost[:n].sum()
    if left < rare * cost[n]:
        raise DataError(f"a text of {length} tokens is too short for {n} common words: use a longer one")
    others = int((np.cumsum(rare * cost[n:]) <= left).sum())
    listed = random.permutation([*words[:n] * often, *words[n : n + others] * rare]).tolist()
    lines = (" ".join(listed[i : i + 12]) for i in range(0, len(listed), 12))
    return maker.hide(length, [], [], lines, LongQuestion("", question, begun, tuple(words[:n]), 0))


def _frequent_words(maker: Maker, length: int, depth: float, random: Random) -> LongQuestion:
    """Draw words with frequencies proportional to r^-2 for rank r, so that ranks are clearly distinct."""
    n = N_FREQUENT
    question = f"Which {n} made-up words are the most frequent in the text above?"
    words = _words(random, 200)
    shares = np.arange(1, len(words) + 1) ** -2.0
    shares /= shares.sum()
    lines = (" ".join(words[int(i)] for i in random.choice(len(words), 12, p=shares)) for _ in count_up())
    asked = LongQuestion("", question, f"The {n} most frequent words are", tuple(words[:n]), 0)
    return maker.hide(length, [], [], lines, asked)


def _questions(maker: Maker, length: int, depth: float, random: Random) -> LongQuestion:
    """Put the paragraph with the answer at its depth among paragraphs of other questions."""
    if len(maker.passages) < 2:
        raise DataError(
            "long texts with questions need paragraphs: put squad/validation.jsonl into the --data folder"
        )
    order = random.permutation(len(maker.passages)).tolist()
    asked = maker.passages[order[0]]
    others = dict.fromkeys(maker.passages[i].text for i in order[1:] if maker.passages[i].text != asked.text)
    question = f"Answer by the text above, in a few words only: {asked.question}"
    wanted = LongQuestion("", question, "Answer:", asked.answers, 0, any_of=True)
    return maker.hide(length, [depth], [asked.text], iter(others), wanted)


KINDS: dict[str, Make] = {
    "single": _needles(1, 1, 1),
    "multikey": _needles(1, 4, 1),
    "multivalue": _needles(1, 1, 4),
    "multiquery": _needles(4, 4, 1),
    "distractors": _distractors,
    "variables": _variables,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
    "questions": _questions,
}
