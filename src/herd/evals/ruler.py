"""Long texts with something to find in them, as long as wanted: needles, chains, frequent words, questions.

A text is made of lines. Those that carry the answer are put at their places, and lines that carry nothing fill it up to
the length, counted in the tokens of the model that will read it. Facts are worded as `herd.data.needle` words them,
names and codes are its test split, which training never hides; everything is a pure function of the seed.

=============  ====================================================================================================
single         one name with a code; asked for it
multikey       four names with codes; asked for one
multivalue     one name with four codes; asked for all of them
multiquery     four names with codes; asked for all of them
distractors    nothing but names with codes; asked for one
variables      A = 4711, B = A, ... scattered over the text; asked which variables have the value
common_words   a list of words, ten of them ten times as often; asked for these ten
frequent_words made-up words whose counts fall off by a power law; asked for the three most frequent
questions      a question among paragraphs of which one holds the answer
=============  ====================================================================================================

Source: Hsieh et al., "RULER", arXiv 2404.06654, section 3 and appendix B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from ..data.needle import WORDS, draw_codes, draw_names
from ..data.shuffle import generator, key
from ..errors import DataError

Count = Callable[[str], int]
FACT = "The secret code for {name} is {code}."
CALM = (
    "The road goes on along the shore.", "Clouds drift over the fields and the hours pass.", "Dust settles on shelves.",
    "The clock on the wall ticks as it always has.", "Grass grows between the stones.", "A door is open somewhere.",
    "The kettle is warm and the windows are clear.", "Boats lie side by side and the water is flat.",
    "It was neither early nor late.", "Nothing stirs in the yard.", "The path turns left and then right.",
    "Somebody hums a tune in another room.", "The lamps are lit at the same time.", "Leaves fall and are swept up.",
)  # fmt: skip
"""Lines that say nothing, where there is no other text to hide things in."""
_SYLLABLES = [consonant + vowel for consonant in "bdklmnr" for vowel in "aeiou"]


@dataclass(frozen=True)
class LongQuestion:
    """A text with its question. ``begun``: how the answer begins, which a base model is given as well; ``expected``:
    what the answer must hold, all of it, or (``any_of``) one of them. ``n_tokens`` of text and question."""

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
    """A paragraph with a question that it answers."""

    text: str
    question: str
    answers: tuple[str, ...]


def share_found(found: LongQuestion, answer: str) -> float:
    """Share of what was expected that the answer holds; capitals do not matter, and a number must stand alone."""
    hits = [_holds(answer, one) for one in found.expected]
    return float(any(hits)) if found.any_of else sum(hits) / len(hits)


def _holds(answer: str, expected: str) -> bool:
    pattern = rf"(?<![^\W_]){re.escape(expected)}(?![^\W_])"
    return re.search(pattern, answer, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Maker:
    """Makes texts with one way of counting tokens and one supply of lines to hide things in."""

    count: Count
    lines: Sequence[str] = CALM
    passages: Sequence[Passage] = ()

    def make(self, kind: str, length: int, depth: float, seed: int) -> LongQuestion:
        """At most ``length`` tokens, question and ``begun`` included, and hardly fewer. ``depth``: where the first
        thing asked for stands, 0 = at the beginning. DataError for an unknown kind or a length that does not hold it.
        """
        if kind not in KINDS:
            raise DataError(f"unknown kind of long text {kind!r}: there are {', '.join(KINDS)}")
        random = generator(seed, key(length, int(depth * 1e6), list(KINDS).index(kind)), 7)
        return KINDS[kind](self, length, depth, random)

    def hide(
        self, length: int, depth: float, random: np.random.Generator, facts: Sequence[str], filler: Iterator[str],
        question: str, begun: str,
    ) -> tuple[str, int]:  # fmt: skip
        """Lines of ``filler`` with the facts among them (the first at ``depth``), and the tokens of everything."""
        used = self.count(f"\n\n{question}\n{begun}") + sum(self.count(f"{fact}\n") for fact in facts)
        if used > length:
            raise DataError(
                f"a text of {length} tokens does not hold this question; at least {used} are needed"
            )
        lines: list[str] = []
        for line in filler:
            cost = self.count(f"{line}\n")
            if used + cost > length:
                break
            lines.append(line)
            used += cost
        places = [depth, *sorted(random.random(len(facts) - 1).tolist())] if facts else []
        for place, fact in sorted(zip(places, facts, strict=True), key=lambda pair: -pair[0]):
            lines.insert(round(place * len(lines)), fact)
        return "\n".join(lines), used

    def filler(self, random: np.random.Generator) -> Iterator[str]:
        """The lines from a random one on, round and round."""
        start = int(random.integers(len(self.lines)))
        return cycle([*self.lines[start:], *self.lines[:start]])


def _needles(
    asked: int, names: int, values: int
) -> Callable[[Maker, int, float, np.random.Generator], LongQuestion]:
    """``names`` names with ``values`` codes each; the first ``asked`` are asked for."""

    def make(maker: Maker, length: int, depth: float, random: np.random.Generator) -> LongQuestion:
        called, codes = draw_names(random, "test", names), draw_codes(random, "test", names * values)
        facts = [FACT.format(name=called[i // values], code=code) for i, code in enumerate(codes)]
        return _ask(
            maker, length, depth, random, facts, called[:asked], codes[: asked * values], maker.filler(random)
        )

    return make


def _distractors(maker: Maker, length: int, depth: float, random: np.random.Generator) -> LongQuestion:
    """Every line is a name with a code; names have three words, so that there are enough of them."""
    first, second = WORDS["test"]
    (code, *codes), name = draw_codes(random, "test", 1000), draw_names(random, "test", 1)

    def others() -> Iterator[str]:
        while True:
            a, b, c = random.integers(len(first)), random.integers(len(first)), random.integers(len(second))
            if a != b:
                yield FACT.format(
                    name=f"{first[a]} {first[b]} {second[c]}", code=codes[random.integers(len(codes))]
                )

    fact = FACT.format(name=name[0], code=code)
    return _ask(maker, length, depth, random, [fact], name, [code], others())


def _ask(
    maker: Maker, length: int, depth: float, random: np.random.Generator, facts: Sequence[str], names: Sequence[str],
    codes: Sequence[str], filler: Iterator[str],
) -> LongQuestion:  # fmt: skip
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    are, codes_ = ("are", "codes") if len(codes) > 1 else ("is", "code")
    question = f"Question: What {are} the secret {codes_} for {listed}?"
    begun = f"Answer: The secret {codes_} for {listed} {are}"
    text, used = maker.hide(length, depth, random, facts, filler, question, begun)
    return LongQuestion(text, question, begun, tuple(codes), used)


def _variables(
    maker: Maker, length: int, depth: float, random: np.random.Generator, hops: int = 4
) -> LongQuestion:
    """One chain of assignments in its order; another, with another value, leads astray."""
    letters = list("ABCDEFGHJKLMNPQRSTUVWXYZ")
    names: list[str] = []
    while len(names) < 2 * (hops + 1):
        name = "".join(random.choice(letters, 5))
        names += [name] if name not in names else []
    right, wrong = names[: hops + 1], names[hops + 1 :]
    value, other = draw_codes(random, "test", 2)
    chains = [[f"VAR {a} = {b}" for a, b in zip(chain, [start, *(f"VAR {n}" for n in chain)], strict=False)]
              for chain, start in ((right, value), (wrong, other))]  # fmt: skip
    question = f"Which variables have the value {value} by the assignments above, directly or through others?"
    begun = f"The variables with the value {value} are"
    # each chain in its order: places are drawn and sorted; the first assignment stands at the depth asked for
    text, used = maker.hide(length, depth, random, [], maker.filler(random), question, begun)
    lines = text.split("\n")
    for number, chain in enumerate(chains):
        used += sum(maker.count(f"{line}\n") for line in chain)
        start = depth if number == 0 else 0.0
        places = sorted([start, *(start + (1 - start) * random.random(hops)).tolist()], reverse=True)
        at = len(lines)
        for place, line in zip(places, reversed(chain), strict=True):
            at = min(at, round(place * len(lines)))
            lines.insert(at, line)
    while used > length and len(lines) > 2 * (hops + 1):
        at = next(i for i in range(len(lines) - 1, -1, -1) if not lines[i].startswith("VAR "))
        used -= maker.count(f"{lines.pop(at)}\n")
    if used > length:
        raise DataError(
            f"a text of {length} tokens does not hold the assignments; at least {used} are needed"
        )
    return LongQuestion("\n".join(lines), question, begun, tuple(right), used)


def _words(random: np.random.Generator, n: int) -> list[str]:
    """Different made-up words of three syllables."""
    size = len(_SYLLABLES)
    picked = random.choice(size**3, n, replace=False)
    return ["".join(_SYLLABLES[int(p) // size**k % size] for k in range(3)) for p in picked]


def _common_words(
    maker: Maker, length: int, depth: float, random: np.random.Generator, common: int = 10
) -> LongQuestion:
    """Ten words thirty times each among others three times each (fewer where the text is short), shuffled."""
    question = f"Which {common} words are the most frequent in the list above?"
    begun = f"The {common} most frequent words are"
    room = length - maker.count(f"\n\n{question}\n{begun}") - 8
    words = _words(random, 6000)
    cost = np.array([maker.count(f" {word}") for word in words]) + 2.0  # number and comma
    often = 30
    while often > 5 and often * cost[:common].sum() > room / 2:
        often -= 5
    rare = max(1, often // 10)
    left = room - often * cost[:common].sum()
    if left < rare * cost[common]:
        raise DataError(f"a text of {length} tokens does not hold {common} common words; take a longer one")
    others = int((np.cumsum(rare * cost[common:]) <= left).sum())
    listed = random.permutation([*words[:common] * often, *words[common : common + others] * rare]).tolist()
    lines = [" ".join(listed[i : i + 12]) for i in range(0, len(listed), 12)]
    text, used = maker.hide(length, depth, random, [], iter(lines), question, begun)
    return LongQuestion(text, question, begun, tuple(words[:common]), used)


def _frequent_words(
    maker: Maker, length: int, depth: float, random: np.random.Generator, asked: int = 3
) -> LongQuestion:
    """The r-th of the words has a share of r^-2: each clearly rarer than the one before."""
    question = f"Which {asked} made-up words are the most frequent in the text above?"
    begun = f"The {asked} most frequent words are"
    words = _words(random, 200)
    shares = np.arange(1, len(words) + 1) ** -2.0

    def lines() -> Iterator[str]:
        while True:
            yield " ".join(words[int(i)] for i in random.choice(len(words), 12, p=shares / shares.sum()))

    text, used = maker.hide(length, depth, random, [], lines(), question, begun)
    return LongQuestion(text, question, begun, tuple(words[:asked]), used)


def _questions(maker: Maker, length: int, depth: float, random: np.random.Generator) -> LongQuestion:
    """The paragraph that answers at its depth among paragraphs of other questions, as many as there is room for."""
    if len(maker.passages) < 2:
        raise DataError(
            "long texts with questions need paragraphs to ask about: put squad/validation.jsonl into --data"
        )
    order = random.permutation(len(maker.passages)).tolist()
    asked = maker.passages[order[0]]
    others = dict.fromkeys(maker.passages[i].text for i in order[1:] if maker.passages[i].text != asked.text)
    question = f"Answer by the text above, in a few words only: {asked.question}"
    text, used = maker.hide(length, depth, random, [asked.text], iter(others), question, "Answer:")
    return LongQuestion(text, question, "Answer:", asked.answers, used, any_of=True)


KINDS: dict[str, Callable[[Maker, int, float, np.random.Generator], LongQuestion]] = {
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
