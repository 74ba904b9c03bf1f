"""Needles: a fact hidden in long real text and asked for at its end, for training long contexts and for testing them.

A document is real text of the corpus with several short facts on lines of their own, "The secret code for amber falcon
is 4821.", and a question at the end about one of them. Whoever answers right has looked across the whole distance: the
code stands nowhere else, and the other facts make it useless to copy just any code. Llama 3 moves on to the next
context length only when it solves these perfectly (paper section 3.4.2).

Training needles and test needles are disjoint: names are made from different words, codes are different numbers, and
the caller takes the filler from another split. Everything is a pure function of the seed.

Sources: G. Kamradt, "Needle in a haystack" (2023); RULER, arXiv 2404.06654, section 3 (several keys and values).
Shapes: B rows, T = context, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from ..errors import DataError
from .batch import IGNORE, Batch
from .shards import Shards
from .shuffle import generator, key
from .stream import as_batch, check_range

WORDS = {
    "train": (
        ("amber", "bitter", "calm", "distant", "early", "faded", "gentle", "hollow", "ivory", "jolly", "kind", "little",
         "modern", "narrow", "olive", "proud", "quiet", "rapid", "silver", "tender", "upper", "velvet", "winter"),
        ("anchor", "bridge", "castle", "dragon", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle",
         "lantern", "meadow", "needle", "orchard", "planet", "quarry", "river", "shadow", "temple", "valley", "window"),
    ),
    "test": (
        ("ancient", "brave", "copper", "dusty", "endless", "frozen", "golden", "humble", "lonely", "mighty",
         "purple", "rusty"),
        ("beacon", "candle", "desert", "falcon", "glacier", "hammer", "mirror", "ocean", "pencil",
         "rocket", "spider", "tower"),
    ),
}  # fmt: skip
"""(first words, second words) of names; no word stands in both splits."""

FIRST_CODE, LAST_CODE, TEST_EVERY = 1000, 9999, 5
"""Codes have four digits; every fifth number is kept for testing."""

STYLES: tuple[tuple[str, str], ...] = (
    ("The secret code for {name} is{code}.\n",
     "Question: What is the secret code for {name}?\nAnswer: The secret code for {name} is"),
    ("# code({name}) ={code}\n", ">>> code({name})\n# code({name}) ="),
    ("Remember this: {name} has the number{code}.\n", "Which number has {name}? Remember this: {name} has the number"),
    ("{name}:{code}\n", "Look up {name}.\n{name}:"),
)  # fmt: skip
"""(fact, question) pairs. A question ends just before its code, repeating the fact's words before it."""


class TextTokenizer(Protocol):
    """What needles need of a tokenizer."""

    n_ranks: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, id: int) -> bytes: ...


Filler = Callable[[np.random.Generator, int], np.ndarray]
"""(random generator, n) -> n ordinary tokens of running text."""


@dataclass(frozen=True)
class Question:
    """A name and its code; ``ids_N[start:stop]`` of the needle are the tokens of the code in the answer."""

    name: str
    code: str
    start: int
    stop: int


@dataclass(frozen=True)
class Needle:
    """A whole document: text, facts, question and answer.

    ``ids_N``: int64, begins with ``<|begin_of_text|>``. A test has one question: feed `prompt`, expect `answer`.
    ``depth``: where the asked fact stands, 0 = at the beginning, 1 = right before the question.
    """

    ids_N: np.ndarray
    questions: tuple[Question, ...]
    depth: float
    style: int

    @property
    def prompt(self) -> list[int]:
        """Ids up to the last answer."""
        return self.ids_N[: self.questions[-1].start].tolist()

    @property
    def answer_ids(self) -> list[int]:
        """Ids of the last answer's code, with its leading space."""
        return self.ids_N[self.questions[-1].start : self.questions[-1].stop].tolist()

    @property
    def answer(self) -> str:
        """The code that the last question asks for, four digits."""
        return self.questions[-1].code


class NeedleMaker:
    """Makes needles with one tokenizer and one source of running text; both are looked at once."""

    def __init__(
        self, tokenizer: TextTokenizer, filler: Shards | Sequence[int] | np.ndarray | Filler
    ) -> None:
        self.tokenizer = tokenizer
        self.filler: Filler = filler if callable(filler) else filler_from(filler, tokenizer)

    @cached_property
    def line_end_V(self) -> np.ndarray:
        """Which ordinary tokens end a line: facts are put in after these only."""
        tokenizer = self.tokenizer
        return np.array([tokenizer.token_bytes(i).endswith(b"\n") for i in range(tokenizer.n_ranks)])

    def make(
        self,
        length: int,
        depth: float,
        seed: int,
        *,
        split: str = "train",
        n_facts: int = 4,
        n_questions: int = 1,
        style: int | None = None,
    ) -> Needle:
        """A document of exactly ``length`` tokens (question and answer included).

        ``depth`` is that of the fact asked last; the others stand anywhere. ``style`` indexes `STYLES`, None draws one.
        DataError where the length does not hold the facts and questions.
        """
        if split not in WORDS:
            raise DataError(f"needle: split {split!r}; choose train or test")
        if not 0.0 <= depth <= 1.0:
            raise DataError(f"needle: depth {depth} is not within 0..1")
        if not 1 <= n_questions <= n_facts:
            raise DataError(
                f"needle: {n_questions} questions about {n_facts} facts; ask between 1 and all of them"
            )
        random = generator(seed, key(length, int(depth * 1e6)), int(split == "test"))
        style = int(random.integers(len(STYLES))) if style is None else style
        names, codes = draw_names(random, split, n_facts), draw_codes(random, split, n_facts)
        fact, question = STYLES[style]
        encode = self.tokenizer.encode
        facts = [encode(fact.format(name=n, code=f" {c}")) for n, c in zip(names, codes, strict=True)]
        asked = [*random.permutation(np.arange(1, n_facts))[: n_questions - 1].tolist(), 0]
        heads = [encode("\n" + question.format(name=names[i])) for i in asked]
        tails = [encode(f" {codes[i]}") for i in asked]
        newline = encode("\n")
        n_tail = sum(map(len, heads)) + sum(map(len, tails)) + len(newline) * (len(asked) - 1)
        n_text = length - 1 - n_tail - sum(map(len, facts)) - n_facts * len(newline)
        if n_text < n_facts:
            raise DataError(f"needle: {length} tokens do not hold {n_facts} facts and {n_questions} questions; "
                            f"at least {length - n_text + n_facts} are needed")  # fmt: skip
        depths = [depth, *random.random(n_facts - 1).tolist()]
        body = self._hide(self.filler(random, n_text), facts, depths, newline)
        ids = [self.tokenizer.bos_id, *body]
        questions: list[Question] = []
        for which, head, tail in zip(asked, heads, tails, strict=True):
            if questions:
                ids += newline
            ids += head
            questions.append(Question(names[which], codes[which], len(ids), len(ids) + len(tail)))
            ids += tail
        return Needle(np.asarray(ids, dtype=np.int64), tuple(questions), depth, style)

    def _hide(
        self, text_N: np.ndarray, facts: list[list[int]], depths: Sequence[float], newline: list[int]
    ) -> list[int]:
        """The text with every fact put on a line of its own near its depth, one newline more before each."""
        ends_N = np.flatnonzero(self.line_end_V[text_N]) + 1
        places = []
        for number, depth in enumerate(depths):
            place = round(depth * len(text_N))
            # A line end within 5 % of the length is taken; otherwise the text is broken right there.
            near = ends_N[np.abs(ends_N - place).argmin()] if len(ends_N) else place
            places.append((int(near) if abs(near - place) <= len(text_N) // 20 else place, number))
        out: list[int] = []
        done = 0
        for place, number in sorted(places):
            out += text_N[done:place].tolist() + newline + facts[number]
            done = place
        return out + text_N[done:].tolist()


def make_needle(
    tokenizer: TextTokenizer,
    filler: Shards | Sequence[int] | np.ndarray | Filler,
    length: int,
    depth: float,
    seed: int,
    *,
    split: str = "test",
    n_facts: int = 4,
    style: int | None = None,
) -> Needle:
    """One needle with one question; see `NeedleMaker.make`. Many are made faster by one `NeedleMaker`."""
    return NeedleMaker(tokenizer, filler).make(length, depth, seed, split=split, n_facts=n_facts, style=style)


class RetrievalStream:
    """Synthetic retrieval documents as training rows: row p is a needle made of (seed, p), as long as the context.

    A row hides ``n_facts`` facts and asks for ``n_questions`` of them, so that a good part of the row's signal is
    retrieval. ``answers_only=True`` trains nothing but the codes; otherwise every token counts.
    """

    packed = False

    def __init__(
        self,
        maker: NeedleMaker,
        context: int,
        seed: int,
        *,
        n_facts: int = 8,
        n_questions: int = 6,
        answers_only: bool = False,
    ) -> None:
        self.maker, self.context, self.seed, self.answers_only = maker, context, seed, answers_only
        self.n_facts, self.n_questions = n_facts, n_questions
        self.n_rows = 1 << 40  # every position is a document of its own
        self.needle(0)  # refuses a context that is too short before training begins

    def needle(self, position: int) -> Needle:
        """The document of one row: ``context + 1`` tokens."""
        depth = float(generator(self.seed, position, 4).random())
        return self.maker.make(
            self.context + 1,
            depth,
            key(self.seed, position),
            split="train",
            n_facts=self.n_facts,
            n_questions=self.n_questions,
        )

    def batch(self, position: int, count: int) -> Batch:
        """Rows ``position`` up to ``position + count``."""
        check_range(position, count)
        needles = [self.needle(p) for p in range(position, position + count)]
        rows_BS = np.stack([needle.ids_N for needle in needles])
        targets_BT = rows_BS[:, 1:].copy()
        if self.answers_only:
            trained_BT = np.zeros_like(targets_BT, dtype=bool)
            for row, needle in enumerate(needles):
                for question in needle.questions:
                    trained_BT[row, question.start - 1 : question.stop - 1] = True
            targets_BT[~trained_BT] = IGNORE
        return as_batch(rows_BS[:, :-1], targets_BT)


def filler_from(source: Shards | Sequence[int] | np.ndarray, tokenizer: TextTokenizer) -> Filler:
    """Random windows of running text from shards or a token array, special tokens taken out."""
    if isinstance(source, Shards):
        total, read = source.n_tokens, source.tokens
    else:
        array_N = np.asarray(source, dtype=np.int64)
        total, read = len(array_N), lambda start, stop: array_N[start:stop]

    def window(random: np.random.Generator, n: int) -> np.ndarray:
        pieces: list[np.ndarray] = []
        have, tries = 0, 0
        start = int(random.integers(total))
        while have < n:
            stop = min(total, start + n - have + 16)
            piece_N = read(start, stop)
            piece_N = piece_N[piece_N < tokenizer.n_ranks][: n - have]
            pieces.append(piece_N)
            have += len(piece_N)
            start = stop % total
            tries += 1
            if tries > 1000 + n:
                raise DataError(f"needle: {total} tokens of filler hold hardly any text; give more")
        return np.concatenate(pieces)

    if total < 1:
        raise DataError("needle: no filler text; give a corpus")
    return window


def draw_names(random: np.random.Generator, split: str, n: int) -> list[str]:
    """``n`` different names of two words, e.g. "amber castle"."""
    first, second = WORDS[split]
    if n > len(first) * len(second):
        raise DataError(f"needle: {n} facts, there are only {len(first) * len(second)} names; hide fewer")
    picks = random.choice(len(first) * len(second), size=n, replace=False)
    return [f"{first[int(p) % len(first)]} {second[int(p) // len(first)]}" for p in picks]


def draw_codes(random: np.random.Generator, split: str, n: int) -> list[str]:
    """``n`` different codes of four digits, from the split's own numbers."""
    numbers = np.arange(FIRST_CODE, LAST_CODE + 1)
    own = numbers[(numbers % TEST_EVERY == 0) == (split == "test")]
    return [str(code) for code in random.choice(own, size=n, replace=False)]
