"""Make rows of facts and questions about them, which teach a model to look up a value by its name.

Looking up is copying with a condition: of several values, the one behind the asked name. It is learned in
steps, each of which has the name further before its value:

- ``pairs``: key, value;
- ``apart``: key, one or two constant tokens, value;
- ``names``: a name of two tokens, one or two constant tokens, and a value of several tokens. Names of a row
  share their tokens, so that both must be compared;
- ``sentences``: the facts of needle tests in words (`herd.data.needle`), with training names and codes.

In a row, facts and questions alternate at random, and only the answers are trained. In half of the rows a
question mostly asks for one of the latest facts, by a power law of distances, in the others for any of them.
(Zoology, arXiv 2312.04927, trains recall with rows of this kind.)

Shapes: B rows, T = context, S = T + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from ..errors import DataError
from .batch import IGNORE
from .copying import draw_alphabet
from .needle import STYLES, TextTokenizer, draw_codes, draw_names, name_list
from .shuffle import generator, mixed_key
from .stream import EndlessRows

Level = Literal["pairs", "apart", "names", "sentences"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""Kinds of rows, the easiest first."""
MAX_FACTS = 12
"""Most facts of a row."""
MAX_APART = 2
"""Most constant tokens between a name and its value."""
NEW_FACT = 0.4
"""Probability that the next item of a row is a new fact and not a question."""


class Fact(NamedTuple):
    """Token ids of a fact and of the question for it: both are followed by ``value`` and ``end``."""

    statement: list[int]
    question: list[int]
    value: list[int]
    end: list[int]


class LookupStream(EndlessRows):
    """Endless rows of facts and questions. Row p depends only on (seed, p).

    The rows are of the given ``levels`` in equal parts. Random tokens are drawn as in `CopyStream`.
    """

    def __init__(
        self, tokenizer: TextTokenizer, context: int, seed: int, *, levels: Sequence[str] = LEVELS
    ) -> None:
        unknown = [level for level in levels if level not in LEVELS]
        if unknown or not levels:
            raise DataError(f"look-up rows: levels {unknown or 'missing'}; choose from {', '.join(LEVELS)}")
        if context < 32:
            raise DataError(f"look-up rows: context={context} is too short for facts; give 32 or more")
        self.tokenizer, self.context, self.seed = tokenizer, context, seed
        self.levels = tuple(levels)
        self.names = name_list(tokenizer, "train") if "sentences" in levels else []

    def _row(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        random = generator(self.seed, mixed_key(self.seed, position), 6)
        level = self.levels[int(random.integers(len(self.levels)))]
        if level == "sentences":
            facts = sentence_facts(random, self.tokenizer, self.names)
        else:
            facts = random_facts(random, level, draw_alphabet(random, self.tokenizer.n_ordinary))
        ids: list[int] = []
        trained: list[bool] = []
        known, near = 0, random.random() < 0.5
        while len(ids) <= self.context:
            if known < 2 or (known < len(facts) and random.random() < NEW_FACT):
                fact, asked = facts[known], False
                known += 1
            else:
                back = draw_distance(random, known) if near else int(random.integers(1, known + 1))
                fact, asked = facts[known - back], True
            before = fact.question if asked else fact.statement
            ids += before + fact.value + fact.end
            answer = len(fact.value) + min(1, len(fact.end))  # the end of the value is learned too
            trained += [False] * len(before) + [asked] * answer + [False] * (len(fact.end) - 1)
        ids_S, trained_S = np.asarray(ids[: self.context + 1]), np.asarray(trained[: self.context + 1])
        return ids_S[:-1], np.where(trained_S[1:], ids_S[1:], IGNORE)


def draw_distance(random: np.random.Generator, n: int) -> int:
    """Return 1..n, with probabilities in proportion to 1, 1/2, 1/3, ..."""
    weights_N = 1 / np.arange(1, n + 1)
    return 1 + int(random.choice(n, p=weights_N / weights_N.sum()))


def random_facts(random: np.random.Generator, level: str, n_ids: int) -> list[Fact]:
    """Return facts of the levels below ``sentences``, of random tokens below ``n_ids``."""
    ids = random.permutation(n_ids)[: 2 * MAX_FACTS + MAX_APART].tolist()
    first, second, constants = ids[:MAX_FACTS], ids[MAX_FACTS : 2 * MAX_FACTS], ids[2 * MAX_FACTS :]
    between = [] if level == "pairs" else constants[: draw_distance(random, MAX_APART)]
    if level != "names":
        names, values = [[key] for key in first], [[value] for value in second]
    else:
        pairs = random.permutation(16)[:MAX_FACTS].tolist()  # of 4 first and 4 second tokens
        names = [[first[pair // 4], first[4 + pair % 4]] for pair in pairs]
        size = int(random.integers(1, 5))
        values = random.choice(second[:10], (MAX_FACTS, size)).tolist()
    end = second[-1:] if level == "names" else []
    return [
        Fact(name + between, name + between, value, end) for name, value in zip(names, values, strict=True)
    ]


def sentence_facts(random: np.random.Generator, tokenizer: TextTokenizer, names: Sequence[str]) -> list[Fact]:
    """Return facts of one style of `STYLES`, in words. A fact and its question end with a line break."""
    statement, question = STYLES[int(random.integers(len(STYLES)))]
    named, codes = draw_names(random, names, MAX_FACTS), draw_codes(random, "train", MAX_FACTS)
    before, _, after = statement.partition("{code}")
    return [
        Fact(
            tokenizer.encode(before.format(name=name)),
            tokenizer.encode(question.format(name=name)),
            tokenizer.encode(f" {code}"),
            tokenizer.encode(after),
        )
        for name, code in zip(named, codes, strict=True)
    ]
