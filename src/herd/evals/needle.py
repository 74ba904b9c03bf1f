"""Needle in a haystack: can the model read a fact anywhere in its context?

Long real text with a few facts in it and a question about one at its end (`herd.data.needle`); names, numbers and text
are held out from training. Right is the exact code, greedily decoded. Accuracy by length and by depth shows where a
context extension really holds, and gates it. Source: RULER, arXiv 2404.06654.
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
from .score import Score, share, shares_by

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CODE = re.compile(r"\s*(\d+)")


def needle(
    model: LlamaLM,
    tokenizer: Tokenizer,
    filler: Shards | Sequence[int] | Filler,
    lengths: Sequence[int],
    *,
    n: int = 20,
    depths: Sequence[float] = DEPTHS,
    n_facts: int = 4,
    seed: int = 0,
    max_batch: int = 64,
) -> Score:
    """Share of codes found: ``n`` documents of each length (tokens, question and answer included), depths in turn.

    ``filler``: held-out text; ``n_facts`` stand in each, one is asked for. Detail: ``by_length``, ``by_depth``, grid.
    Raises DataError for a length beyond the model's context or too short for the facts.
    """
    longest = model.config.max_context
    if any(length > longest for length in lengths):
        raise DataError(
            f"needle lengths {[n for n in lengths if n > longest]} are beyond the context of {longest}"
        )
    if n < 1 or not lengths or not depths:
        raise DataError(f"needle: n={n}, lengths={list(lengths)}, depths={list(depths)}: nothing to ask")
    maker = NeedleMaker(tokenizer, filler)
    items = [
        (length, depth, maker.make(length, depth, seed + i, split="test", n_facts=n_facts))
        for length in lengths
        for i, depth in zip(range(n), cycle(depths), strict=False)
    ]
    hits = _found(Engine(model, tokenizer, max_batch=max_batch), [item for _, _, item in items])
    by_place: dict[tuple[int, float], list[bool]] = {}
    for (length, depth, _), hit in zip(items, hits, strict=True):
        by_place.setdefault((length, depth), []).append(hit)
    detail: dict[str, Any] = {
        "by_length": shares_by((length for length, _, _ in items), hits),
        "by_depth": shares_by((depth for _, depth, _ in items), hits),
        "grid": [
            {"length": length, "depth": depth, "value": sum(some) / len(some)}
            for (length, depth), some in sorted(by_place.items())
        ],
    }
    return share("needle", hits, detail)


def _found(engine: Engine, needles: Sequence[Needle]) -> list[bool]:
    """Whether each answer begins with exactly the code; one token more than the code shows that it ends there."""
    requests = [Request(item.prompt, Sampling(max_tokens=len(item.answer_ids) + 1)) for item in needles]
    found = [_CODE.match(completion.text) for completion in engine.run(requests)]
    return [match is not None and match[1] == item.answer for match, item in zip(found, needles, strict=True)]
