"""Score continuations by log-likelihood, computing every shared beginning once.

A benchmark repeats the same five worked examples a thousand times, and each question once per choice. Here
items are sorted, so that items with a common beginning (the head) are neighbours. The head is a sequence of
the paged cache. The next head reuses the tokens that it shares with the last one. Every item is a small tree
with a trunk (the question) and branches (the choices): a fork of the head reads the trunk, and forks of the
trunk read the branches, many items per forward. So an item costs its own tokens, not four times its whole
prompt (sharing prefixes: Hydragen, arXiv 2402.05099; trees: SpecInfer, arXiv 2305.09781). Nothing is
approximated: the sums are the same in another order.

Shapes: N tokens of one forward, P scored positions, D model dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ContextError, EngineError
from ..kernels.page_layout import BYTES, PAGE
from ..llama.model import LlamaLM
from .cache import Cached, PagedCache
from .memory import LOGIT_BYTES, PREFILL_TOKENS, nbytes
from .runner import ModelRunner

SLACK_TOKENS = 256
"""Most tokens that a pack may compute again because one more item shortens its common head."""


_Part = tuple[Cached, Sequence[int]]
"""A sequence of the cache, and the tokens to feed to it."""


class Pair(NamedTuple):
    """The token ids of a context and of its continuation, at least one each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Scored(NamedTuple):
    """The log-probability of a continuation in nats, and whether greedy decoding would generate it."""

    nats: float
    greedy: bool


class Scorer:
    """A scorer of ``model``. It keeps the last head for the next call."""

    def __init__(self, model: LlamaLM) -> None:
        self.model, self.context = model, model.config.max_context
        self._longest = 0
        self._room_for(PAGE)

    def check(self, items: Sequence[Sequence[Pair]]) -> None:
        """Raise EngineError for an empty part or an unknown token, and ContextError for a pair too long."""
        vocab = self.model.config.vocab_size
        for item in items:
            for context, continuation in item:
                if not context or not continuation:
                    raise EngineError("a context and its continuation need at least one token each")
                n = len(context) + len(continuation) - 1  # the last token is only predicted
                if n > self.context:
                    raise ContextError(
                        f"prompt and continuation have {n} tokens, the context has {self.context}: "
                        "use a model with a longer context"
                    )
                highest = max(max(context), max(continuation))
                if highest >= vocab or min(min(context), min(continuation)) < 0:
                    raise EngineError(f"token {highest} is outside the model's vocabulary of {vocab}")

    @torch.inference_mode()
    def score(self, items: Sequence[Sequence[Pair]]) -> Iterator[tuple[int, list[Scored]]]:
        """Yield the index of each item and a `Scored` for each of its pairs. Call `check` before."""
        trees = sorted(
            (_Tree.of(number, item) for number, item in enumerate(items)), key=lambda tree: tree.trunk
        )
        self._room_for(max((tree.n_longest for tree in trees), default=0))
        while trees:
            n_head, n_trees = _pack(trees)
            pack, trees = trees[:n_trees], trees[n_trees:]
            self._go_to(pack[0].trunk[:n_head])
            yield from self._run(pack, n_head)

    def _room_for(self, tokens: int) -> None:
        """Make room in the cache for a head, a trunk and a branch of ``tokens`` each, and for a pack."""
        if tokens <= self._longest:
            return
        config, kind = self.model.config, "bf16" if self.model.dtype == torch.bfloat16 else "fp32"
        room = nbytes(config, 3, tokens, BYTES[kind]) + nbytes(config, 4, PREFILL_TOKENS, BYTES[kind])
        self._longest, self._cache = tokens, PagedCache(config, kind, room, tokens, self.model.device)
        self._runner = ModelRunner(self.model, self._cache)
        self._head, self._ids = self._cache.open(), list[int]()

    def _go_to(self, ids: Sequence[int]) -> None:
        """Make ``ids`` the head, computing only the tokens that it does not share with the last head."""
        kept = _common(self._ids, ids)
        self._cache.truncate(self._head, kept)
        self._ids = list(ids[:kept])
        for start in range(kept, len(ids), PREFILL_TOKENS):
            part = list(ids[start : start + PREFILL_TOKENS])
            self._feed([(self._head, part)])
            self._ids += part

    def _run(self, pack: Sequence[_Tree], n_head: int) -> Iterator[tuple[int, list[Scored]]]:
        trunks = [(self._cache.fork(self._head), tree.trunk[n_head:]) for tree in pack]
        hidden = [self._feed(trunks)]
        pairs = zip(trunks, pack, strict=True)
        branches = [(trunk, ids) for (trunk, _), tree in pairs for ids in tree.branches if ids]
        for group in _groups(branches):
            twins = [(self._cache.fork(trunk), ids) for trunk, ids in group]
            hidden.append(self._feed(twins))
            self._close(twins)
        self._close(trunks)
        asked, trunk_at, branch_at = list[tuple[int, int]](), 0, sum(len(ids) for _, ids in trunks)
        for tree in pack:
            asked += tree.asked(trunk_at - n_head, branch_at - len(tree.trunk))
            trunk_at += len(tree.trunk) - n_head
            branch_at += sum(map(len, tree.branches))
        logp = iter(_log_probs(self.model, torch.cat(hidden), asked))
        for tree in pack:
            out = []
            for _, continuation in tree.pairs:
                some = [next(logp) for _ in continuation]
                out.append(Scored(sum(x for x, _ in some), all(best for _, best in some)))
            yield tree.number, out

    def _feed(self, parts: Sequence[_Part]) -> Tensor:
        """Add these tokens to the sequences and return their hidden states (N, D)."""
        parts = [(cached, ids) for cached, ids in parts if ids]
        if not parts:
            return torch.empty(0, self.model.config.dim, dtype=self.model.dtype, device=self.model.device)
        for cached, ids in parts:
            self._cache.grow(cached, cached.length + len(ids))
        return self._runner(
            [(cached, len(ids)) for cached, ids in parts], [i for _, ids in parts for i in ids]
        )

    def _close(self, parts: Sequence[_Part]) -> None:
        for cached, _ in parts:
            self._cache.close(cached)


@dataclass(frozen=True)
class _Tree:
    """An item: ``trunk`` is the common beginning of all its inputs, ``branches`` are their remainders."""

    number: int
    pairs: Sequence[Pair]
    trunk: list[int]
    branches: list[list[int]]

    @classmethod
    def of(cls, number: int, pairs: Sequence[Pair]) -> _Tree:
        # the last token is only predicted
        inputs = [[*pair.context, *pair.continuation[:-1]] for pair in pairs]
        n = min(_common(inputs[0], other) for other in inputs)
        return cls(number, pairs, inputs[0][:n], [ids[n:] for ids in inputs])

    @property
    def n_shareable(self) -> int:
        """Number of tokens that may come from the cache. The first scored position must be computed here."""
        return max(0, min(len(self.trunk), *(len(pair.context) for pair in self.pairs)) - 1)

    @property
    def n_longest(self) -> int:
        """Number of tokens of its longest input."""
        return len(self.trunk) + max(map(len, self.branches))

    @property
    def cost(self) -> int:
        """Its part of `PREFILL_TOKENS` without a shared head."""
        return _cost(self.trunk) + sum(_cost(branch) for branch in self.branches if branch)

    def asked(self, trunk_at: int, branch_at: int) -> Iterator[tuple[int, int]]:
        """Yield the row of the hidden state and the id of every token of every continuation.

        Position p of the trunk is in row ``trunk_at + p``, and of the first branch in row ``branch_at + p``.
        """
        for pair, branch in zip(self.pairs, self.branches, strict=True):
            for position, token in enumerate(pair.continuation, len(pair.context) - 1):
                yield (trunk_at if position < len(self.trunk) else branch_at) + position, token
            branch_at += len(branch)


def _cost(ids: Sequence[int]) -> int:
    """Return a sequence's part of `PREFILL_TOKENS`: its tokens, and a page that it may have to copy."""
    return len(ids) + PAGE


def _groups(branches: Sequence[_Part]) -> Iterator[Sequence[_Part]]:
    """Yield the branches in groups of at most `PREFILL_TOKENS`. A single branch may be longer."""
    start, taken = 0, 0
    for at, (_, ids) in enumerate(branches):
        if at > start and taken + _cost(ids) > PREFILL_TOKENS:
            yield branches[start:at]
            start, taken = at, 0
        taken += _cost(ids)
    if branches:
        yield branches[start:]


def _pack(trees: Sequence[_Tree]) -> tuple[int, int]:
    """Return the length of the common head and the number of trees of the next pack of sorted ``trees``."""
    n_head = trees[0].n_shareable
    cost = trees[0].cost  # includes the head, which is subtracted in the comparison
    for n, tree in enumerate(trees[1:], 1):
        shared = min(n_head, tree.n_shareable, _common(trees[0].trunk, tree.trunk))
        cost += tree.cost
        if (n_head - shared) * n > SLACK_TOKENS or cost - (n + 1) * shared > PREFILL_TOKENS:
            return n_head, n
        n_head = shared
    return n_head, len(trees)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common beginning of two sequences."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is fast: bisect instead of walking
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _log_probs(
    model: LlamaLM, hidden_ND: Tensor, asked: Sequence[tuple[int, int]]
) -> list[tuple[float, bool]]:
    """Return log p and whether the token is the most likely, for every (position, token)."""
    positions = sorted({position for position, _ in asked})
    row_of = {position: row for row, position in enumerate(positions)}
    by_row: list[list[int]] = [[] for _ in positions]
    for number, (position, _) in enumerate(asked):
        by_row[row_of[position]].append(number)
    out: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
    step = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    for start in range(0, len(positions), step):
        some = positions[start : start + step]
        logits_PV = model.lm_head(hidden_ND[some]).float()
        total_P = logits_PV.logsumexp(-1)
        numbers = [number for row in range(start, start + len(some)) for number in by_row[row]]
        rows = torch.tensor([row_of[asked[n][0]] - start for n in numbers], device=logits_PV.device)
        tokens = torch.tensor([asked[n][1] for n in numbers], device=logits_PV.device)
        nats = (logits_PV[rows, tokens] - total_P[rows]).tolist()
        best = (logits_PV.argmax(-1)[rows] == tokens).tolist()
        for number, pair in zip(numbers, zip(nats, best, strict=True), strict=True):
            out[number] = pair
    return out
