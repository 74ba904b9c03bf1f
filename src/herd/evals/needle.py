"""Needle in a haystack: test whether a model can retrieve a fact from anywhere in its context.

Each document is long held-out text with a few facts in it and a question about one of them at the end
(`herd.data.needle`). An answer is right if greedy decoding generates exactly the requested code. Accuracy by
length and by depth shows how far a context extension works. Source: RULER, arXiv 2404.06654.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from ..data.needle import Filler, Needle, NeedleMaker
from ..data.shards import Shards
from ..engine.engine import Engine
from ..engine.request import Request, Sampling
from ..errors import DataError
from ..llama.model import LlamaLM
from ..text.tokenizer import Tokenizer
from .ruler import length_depth_grid
from .score import Score, share, shares_by

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
N_FACTS = 4
_CODE = re.compile(r"\s*(\d+)")


def needle(
    model: LlamaLM, tokenizer: Tokenizer, filler: Shards | Sequence[int] | Filler, lengths: Sequence[int], *,
    n: int = 20, seed: int = 0,
) -> Score:  # fmt: skip
    """Return the fraction of codes found in ``n`` documents of each length, at `DEPTHS` in turn.

    ``lengths`` are in tokens, including question and answer. ``filler`` is the held-out text. Each document
    has `N_FACTS` facts and a question about one of them. The detail has ``by_length``, ``by_depth`` and
    ``grid``. Raises `DataError` if a length exceeds the model's context or is too short for the facts.
    """
    longest = model.config.max_context
    if beyond := [length for length in lengths if length > longest]:
        raise DataError(f"needle lengths {beyond} are beyond the model's context of {longest} tokens")
    if n < 1 or not lengths:
        raise DataError(f"needle: n={n}, lengths={list(lengths)}: nothing to ask")
    maker = NeedleMaker(tokenizer, filler)
    places = [
        (length, depth, i) for length in lengths for i, depth in zip(range(n), cycle(DEPTHS), strict=False)
    ]
    items = [
        maker.make(length, depth, seed + i, split="test", n_facts=N_FACTS) for length, depth, i in places
    ]
    hits = _found(Engine(model, tokenizer, max_batch=64), items)
    detail: dict[str, Any] = {
        "by_length": shares_by((length for length, _, _ in places), hits),
        "by_depth": shares_by((depth for _, depth, _ in places), hits),
        "grid": length_depth_grid([(length, depth) for length, depth, _ in places], [*map(float, hits)]),
    }
    return share("needle", hits, detail)


def _found(engine: Engine, needles: Sequence[Needle]) -> list[bool]:
    """Return whether each answer begins with exactly the code.

    One more token shows that the code ends there.
    """
    requests = [Request(item.prompt, Sampling(max_tokens=len(item.answer_ids) + 1)) for item in needles]
    found = [_CODE.match(completion.text) for completion in engine.run(requests)]
    return [match is not None and match[1] == item.answer for match, item in zip(found, needles, strict=True)]
