"""Make needles: long real text with hidden facts and questions at its end, to train and test long contexts.

A document is real text of the corpus with several short facts on lines of their own ("The secret code for
river is 4821.") and a question at the end about one of them. A right answer shows that the model
looked across the whole distance: the code is nowhere else in the text, and because of the other facts it does
not help to copy just any code. Llama 3 went to the next context length only when such tests were solved
perfectly (paper, section 3.4.2).

Training and test needles are disjoint: their names have different words, their codes are different numbers,
and the caller takes the running text ("filler") from another split. Everything depends only on the arguments,
the seed among them.

Sources: G. Kamradt, "Needle in a haystack" (2023); RULER, arXiv 2404.06654, section 3 (several keys and
values).

Shapes: B rows, T = context, N tokens, V vocabulary, S = T + 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol
from zlib import crc32

import numpy as np

from ..errors import DataError
from ..package_yaml import package_yaml
from .batch import IGNORE, Batch
from .shards import Shards
from .shuffle import generator, mixed_key
from .stream import as_batch, check_range

_TEXTS = package_yaml(__package__, "needle.yaml")
WORDS: dict[str, tuple[list[str], list[str]]] = {
    split: (words["first"].split(), words["second"].split()) for split, words in _TEXTS["names"].items()
}
"""(first words, second words) of two-word names, by split. No word is in both splits."""
MIN_WORDS = 48
"""Fewest one-token words of a split that make names. With fewer, names are two words of `WORDS`."""
TEST_WORDS = 4
"""One word in this many, by its hash, is a name of tests."""
STYLES: list[tuple[str, str]] = [(style["fact"], style["question"]) for style in _TEXTS["styles"]]
"""(fact, question) sentences."""

_WORD = re.compile(rb" [a-z]{3,}")
FIRST_CODE = 1000
"""Smallest code. All codes have four digits."""
LAST_CODE = 9999
"""Largest code."""
TEST_EVERY = 5
"""Multiples of this number are codes for tests, all others for training."""


class TextTokenizer(Protocol):
    """The part of a tokenizer that needles use."""

    @property
    def n_ordinary(self) -> int: ...

    @property
    def start_ids(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, id: int) -> bytes: ...


Filler = Callable[[np.random.Generator, int], np.ndarray]
"""(random generator, n) -> n ordinary tokens of running text."""


@dataclass(frozen=True)
class Question:
    """A question about a name. Its answer, the code, is ``ids_N[start:stop]`` of the needle."""

    name: str
    code: str
    start: int
    stop: int


@dataclass(frozen=True)
class Needle:
    """A whole document: text, facts, questions and answers.

    ``ids_N`` (int64) begin with ``<|begin_of_text|>``. A test has one question: give the model `prompt` and
    expect `answer`. ``depth`` is the relative position of the fact that the last question asks for: 0 = at
    the beginning, 1 = right before the questions.
    """

    ids_N: np.ndarray
    questions: tuple[Question, ...]
    depth: float
    style: int

    @property
    def prompt(self) -> list[int]:
        """The ids before the last answer."""
        return self.ids_N[: self.questions[-1].start].tolist()

    @property
    def answer_ids(self) -> list[int]:
        """The ids of the last answer, the code with its leading space."""
        return self.ids_N[self.questions[-1].start : self.questions[-1].stop].tolist()

    @property
    def answer(self) -> str:
        """The code that the last question asks for, four digits."""
        return self.questions[-1].code


class NeedleMaker:
    """A maker of needles for one tokenizer from one source of running text."""

    def __init__(
        self, tokenizer: TextTokenizer, filler: Shards | Sequence[int] | np.ndarray | Filler
    ) -> None:
        self.tokenizer = tokenizer
        self.filler: Filler = filler if callable(filler) else filler_from(filler, tokenizer)

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """Possible names by split."""
        return {split: name_list(self.tokenizer, split) for split in WORDS}

    @cached_property
    def line_end_V(self) -> np.ndarray:
        """Whether each ordinary token ends a line, (V,) bool. Facts are inserted after these tokens."""
        tokenizer = self.tokenizer
        return np.array([tokenizer.token_bytes(i).endswith(b"\n") for i in range(tokenizer.n_ordinary)])

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
        """Return a document of exactly ``length`` tokens, question and answer included.

        ``depth`` is the relative position of the fact that the last question asks for. The other facts have
        random positions. ``style`` is an index of `STYLES` (None: a random one). Raises DataError if the
        length is too short for the facts and questions.
        """
        if split not in WORDS:
            raise DataError(f"needle: split {split!r}; choose train or test")
        if not 0.0 <= depth <= 1.0:
            raise DataError(f"needle: depth {depth} is not within 0..1")
        if not 1 <= n_questions <= n_facts:
            raise DataError(f"needle: {n_questions} questions about {n_facts} facts; ask 1 to {n_facts}")
        random = generator(seed, mixed_key(length, int(depth * 1e6)), int(split == "test"))
        style = int(random.integers(len(STYLES))) if style is None else style
        names = draw_names(random, self.names[split], n_facts)
        codes = draw_codes(random, split, n_facts)
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
            asked_for, least = f"{n_facts} facts and {n_questions} questions", length - n_text + n_facts
            raise DataError(f"needle: {length} tokens are too few for {asked_for}; give at least {least}")
        depths = [depth, *random.random(n_facts - 1).tolist()]
        body = self._hide(self.filler(random, n_text), facts, depths, newline)
        ids = [*self.tokenizer.start_ids, *body]
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
        """Return the text with every fact inserted on a line of its own near its depth."""
        ends_N = np.flatnonzero(self.line_end_V[text_N]) + 1
        positions = []
        for number, depth in enumerate(depths):
            position = round(depth * len(text_N))
            # use a line end within 5 % of the length, or break the text at the exact position
            near = ends_N[np.abs(ends_N - position).argmin()] if len(ends_N) else position
            positions.append((int(near) if abs(near - position) <= len(text_N) // 20 else position, number))
        out: list[int] = []
        done = 0
        for position, number in sorted(positions):
            out += text_N[done:position].tolist() + newline + facts[number]
            done = position
        return out + text_N[done:].tolist()


class RetrievalStream:
    """Training rows of needles as long as the context. Row p depends only on (seed, p).

    A row hides ``n_facts`` facts and asks for all of them. Only the answers and their ends are trained.
    """

    packed = False

    def __init__(self, maker: NeedleMaker, context: int, seed: int, *, n_facts: int = 4) -> None:
        self.maker, self.context, self.seed, self.n_facts = maker, context, seed, n_facts
        self.n_rows = 1 << 40  # every position is a document of its own
        self.needle(0)  # raises DataError for a context that is too short, before training begins

    def needle(self, position: int) -> Needle:
        """Return the document of one row: ``context + 1`` tokens."""
        depth = float(generator(self.seed, position, 4).random())
        seed = mixed_key(self.seed, position)
        n_facts = self.n_facts
        return self.maker.make(self.context + 1, depth, seed, n_facts=n_facts, n_questions=n_facts)

    def batch(self, position: int, count: int) -> Batch:
        """Return rows ``position`` to ``position + count``."""
        check_range(position, count)
        needles = [self.needle(p) for p in range(position, position + count)]
        rows_BS = np.stack([needle.ids_N for needle in needles])
        answers_BS = np.zeros(rows_BS.shape, dtype=bool)
        for answers_S, needle in zip(answers_BS, needles, strict=True):
            for question in needle.questions:
                answers_S[question.start : question.stop + 1] = True  # and the line break: a code ends
        return as_batch(rows_BS[:, :-1], np.where(answers_BS[:, 1:], rows_BS[:, 1:], IGNORE))


def filler_from(source: Shards | Sequence[int] | np.ndarray, tokenizer: TextTokenizer) -> Filler:
    """Return a function that draws windows of ordinary tokens from shards or a token array."""
    if isinstance(source, Shards):
        total, read = source.n_tokens, source.tokens
    else:
        array_N = np.asarray(source, dtype=np.int64)
        total, read = len(array_N), lambda start, stop: array_N[start:stop]

    def window(random: np.random.Generator, n: int) -> np.ndarray:
        pieces: list[np.ndarray] = []
        have = tries = 0
        start = int(random.integers(total))
        while have < n:
            stop = min(total, start + n - have + 16)
            piece_N = read(start, stop)
            piece_N = piece_N[piece_N < tokenizer.n_ordinary][: n - have]
            pieces.append(piece_N)
            have += len(piece_N)
            start = stop % total
            tries += 1
            if tries > 1000 + n:
                raise DataError(f"needle: {total} tokens of filler have almost no ordinary text; give more")
        return np.concatenate(pieces)

    if total < 1:
        raise DataError("needle: no filler text; give a corpus")
    return window


def name_list(tokenizer: TextTokenizer, split: str) -> list[str]:
    """Return the possible names of a split. No word is in names of both splits.

    They are the words that are one token of the vocabulary, so that a small model can look for a name before
    it can compare several tokens. A vocabulary with few such words gives names of two words.
    """
    tokens = (tokenizer.token_bytes(id_) for id_ in range(tokenizer.n_ordinary))
    words = [token[1:].decode() for token in tokens if _WORD.fullmatch(token)]
    own = [word for word in words if (crc32(word.encode()) % TEST_WORDS == 0) == (split == "test")]
    if len(own) >= MIN_WORDS:
        return own
    return two_word_names(split)


def two_word_names(split: str) -> list[str]:
    """Return all names of two words of a split, e.g. "amber castle"."""
    first, second = WORDS[split]
    return [f"{one} {other}" for one in first for other in second]


def draw_names(random: np.random.Generator, names: Sequence[str], n: int) -> list[str]:
    """Draw ``n`` different names."""
    if n > len(names):
        raise DataError(f"needle: {n} facts, there are only {len(names)} names; hide fewer")
    return [names[int(pick)] for pick in random.choice(len(names), size=n, replace=False)]


def draw_codes(random: np.random.Generator, split: str, n: int) -> list[str]:
    """Draw ``n`` different codes of four digits from the split's own numbers."""
    numbers = np.arange(FIRST_CODE, LAST_CODE + 1)
    own = numbers[(numbers % TEST_EVERY == 0) == (split == "test")]
    return [str(code) for code in random.choice(own, size=n, replace=False)]
