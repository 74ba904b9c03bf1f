"""Log-likelihoods of continuations, with every shared beginning computed once.

A benchmark repeats the same five worked examples a thousand times, and each question once a choice. Here prompts are
sorted, so that those with a common beginning stand side by side; the beginning's keys and values are computed once and
kept as a stack (`_Prefix`: going to the next beginning keeps what the two share). Behind it several items run as one
row of tokens, each a small tree: its trunk (the question) and its branches (the choices), and attention lets a token
see the prefix, its own trunk and its own branch. So an item costs its own tokens, not four times its whole prompt
(sharing prefixes: Hydragen, arXiv 2402.05099; trees in one row: SpecInfer, arXiv 2305.09781). Nothing is approximated:
the same sums in another order.

Shapes: N tokens of one pack, T tokens of an item, S cached tokens, P scored places, H query heads, G KV heads,
K head dim, D model dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import EngineError
from ..llama.attention import Attend, sdpa
from ..llama.model import LlamaLM

PACK_TOKENS = 2048
"""Tokens of one forward: enough to fill the matmuls, little enough memory for activations."""
SLACK_TOKENS = 256
"""An item joins a pack with a shorter common beginning while that makes the others compute at most so much again."""
LOGIT_BYTES = 64 << 20
"""fp32 logits alive at a time."""


class Pair(NamedTuple):
    """Ids of a context (at least one) and of a continuation (at least one)."""

    context: Sequence[int]
    continuation: Sequence[int]


class Scored(NamedTuple):
    """log p of the continuation in nats, and whether greedy decoding would write it."""

    nats: float
    greedy: bool


class Scorer:
    """Scores with ``model``, on its device and in its dtype. Keeps the last beginning, so calls may follow in parts."""

    def __init__(self, model: LlamaLM, max_context: int | None = None) -> None:
        self.model, self.context = model, max_context or model.config.max_context
        self._prefix = _Prefix(model)

    def check(self, items: Sequence[Sequence[Pair]]) -> None:
        """Raises EngineError where a pair is empty, too long for the context, or not of this vocabulary."""
        vocab = self.model.config.vocab_size
        for item in items:
            for context, continuation in item:
                if not context or not continuation:
                    raise EngineError("a continuation and what stands before it need at least one token each")
                n = len(context) + len(continuation) - 1  # the last token is only predicted
                if n > self.context:
                    raise EngineError(
                        f"prompt and continuation have {n} tokens, the context holds {self.context}: "
                        "use fewer shots or a model with a longer context"
                    )
                highest = max(max(context), max(continuation))
                if highest >= vocab or min(min(context), min(continuation)) < 0:
                    raise EngineError(f"token {highest} is outside the model's vocabulary of {vocab}")

    @torch.inference_mode()
    def score(self, items: Sequence[Sequence[Pair]]) -> Iterator[tuple[int, list[Scored]]]:
        """(number of the item, a `Scored` of each of its pairs), pack by pack; `check` is the caller's to call."""
        trees = sorted((_Tree.of(number, item) for number, item in enumerate(items)), key=lambda tree: tree.trunk)
        while trees:
            n_head, n_trees = _pack(trees)
            pack, trees = trees[:n_trees], trees[n_trees:]
            self._prefix.go_to(pack[0].trunk[:n_head])
            yield from self._run(pack, n_head)

    def _run(self, pack: Sequence[_Tree], n_head: int) -> Iterator[tuple[int, list[Scored]]]:
        tokens_N: list[int] = []
        positions_N: list[int] = []
        spans, masks = [], []
        for tree in pack:
            spans.append((len(tokens_N), tree.n_tokens(n_head)))
            tree.lay_out(n_head, tokens_N, positions_N)
            masks.append(tree.mask(n_head).to(self.model.device))
        attend = self._prefix.attend_trees(spans, masks)
        tokens_1N, positions_1N = (torch.tensor([x], device=self.model.device) for x in (tokens_N, positions_N))
        hidden_ND = self.model(tokens_1N, positions_1N, attend)[0]
        asked = [place for (start, _), tree in zip(spans, pack, strict=True) for place in tree.asked(n_head, start)]
        logp = _log_probs(self.model, hidden_ND, asked)
        at = 0
        for tree in pack:
            out = []
            for _, continuation in tree.pairs:
                some = logp[at : at + len(continuation)]
                out.append(Scored(sum(x for x, _ in some), all(best for _, best in some)))
                at += len(continuation)
            yield tree.number, out


@dataclass(frozen=True)
class _Tree:
    """An item: ``trunk`` is what all its inputs begin with, ``branches`` what follows in each."""

    number: int
    pairs: Sequence[Pair]
    trunk: list[int]
    branches: list[list[int]]

    @classmethod
    def of(cls, number: int, pairs: Sequence[Pair]) -> _Tree:
        inputs = [[*pair.context, *pair.continuation[:-1]] for pair in pairs]  # the last token is only predicted
        n = min(_common(inputs[0], other) for other in inputs)
        return cls(number, pairs, inputs[0][:n], [ids[n:] for ids in inputs])

    @property
    def n_shareable(self) -> int:
        """Tokens that may come from the cache: the first scored place must be computed here."""
        return max(0, min(len(self.trunk), *(len(pair.context) for pair in self.pairs)) - 1)

    def n_tokens(self, n_head: int) -> int:
        return len(self.trunk) - n_head + sum(map(len, self.branches))

    def lay_out(self, n_head: int, tokens_N: list[int], positions_N: list[int]) -> None:
        """Append trunk and branches; every branch's positions go on from the trunk's."""
        tokens_N += self.trunk[n_head:]
        positions_N += range(n_head, len(self.trunk))
        for branch in self.branches:
            tokens_N += branch
            positions_N += range(len(self.trunk), len(self.trunk) + len(branch))

    def mask(self, n_head: int) -> Tensor:
        """(T, n_head + T): who is seen. All see the prefix; own: the trunk before, and what is before in the branch."""
        T, n_trunk = self.n_tokens(n_head), len(self.trunk) - n_head
        branch_T = torch.zeros(T, dtype=torch.int64)
        at = n_trunk
        for number, branch in enumerate(self.branches, 1):
            branch_T[at : at + len(branch)] = number
            at += len(branch)
        own_TT = (branch_T[:, None] == branch_T) | (branch_T == 0)
        return torch.cat((torch.ones(T, n_head, dtype=torch.bool), own_TT & own_TT.new_ones(T, T).tril()), dim=1)

    def asked(self, n_head: int, start: int) -> Iterator[tuple[int, int]]:
        """(place in the pack, token to be predicted there), continuation after continuation."""
        at = start + len(self.trunk) - n_head
        for pair, branch in zip(self.pairs, self.branches, strict=True):
            for position, token in enumerate(pair.continuation, len(pair.context) - 1):
                beyond = position - len(self.trunk)
                yield (at + beyond if beyond >= 0 else start + position - n_head), token
            at += len(branch)


class _Prefix:
    """Keys and values (1, S, G, K) of one beginning, in every layer, with room behind it for an item's own."""

    def __init__(self, model: LlamaLM) -> None:
        self.model, self.ids = model, list[int]()
        config = model.config
        empty = torch.zeros(1, 0, config.n_kv_heads, config.head_dim, dtype=model.dtype, device=model.device)
        self._keys = [empty for _ in range(config.n_layers)]
        self._values = [empty for _ in range(config.n_layers)]

    def go_to(self, ids: Sequence[int]) -> None:
        """Make ``ids`` the beginning; only what the last one does not share with it is computed."""
        kept = _common(self.ids, ids)
        self.ids = self.ids[:kept]
        for start in range(kept, len(ids), PACK_TOKENS):
            part = list(ids[start : start + PACK_TOKENS])
            T = len(part)
            causal_TS = torch.ones(T, start + T, dtype=torch.bool, device=self.model.device).tril(start)
            positions_1T = torch.arange(start, start + T, device=self.model.device)[None]
            self.model(
                torch.tensor([part], device=self.model.device), positions_1T, self.attend_trees([(0, T)], [causal_TS])
            )
            self.ids += part

    def attend_trees(self, spans: Sequence[tuple[int, int]], masks: Sequence[Tensor]) -> Attend:
        """Attention of one row of items, each ``(start, T)`` of ``spans`` behind the prefix under its mask (T, S + T).

        An item's keys lie behind the prefix only while it is its turn, so nothing is copied but themselves.
        """
        S = len(self.ids)
        self._reserve(S + max(T for _, T in spans))

        def attend(layer: int, q_1NHK: Tensor, k_1NGK: Tensor, v_1NGK: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            out_1NHK = torch.empty_like(q_1NHK)
            for (start, T), mask_TS in zip(spans, masks, strict=True):
                own = slice(start, start + T)
                keys[:, S : S + T], values[:, S : S + T] = k_1NGK[:, own], v_1NGK[:, own]
                out_1NHK[:, own] = sdpa(q_1NHK[:, own], keys[:, : S + T], values[:, : S + T], mask=mask_TS)
            return out_1NHK

        return attend

    def _reserve(self, tokens: int) -> None:
        if tokens <= self._keys[0].shape[1]:
            return
        S = len(self.ids)
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(1, tokens + SLACK_TOKENS, *old.shape[2:])
                new[:, :S] = old[:, :S]
                tensors[layer] = new


def _pack(trees: Sequence[_Tree]) -> tuple[int, int]:
    """(tokens of the common beginning, trees) of the next pack from the front of the sorted ``trees``."""
    n_head = trees[0].n_shareable
    n_tokens = sum(map(len, trees[0].branches)) + len(trees[0].trunk)  # with the beginning, taken off when compared
    for n, tree in enumerate(trees[1:], 1):
        shared = min(n_head, tree.n_shareable, _common(trees[0].trunk, tree.trunk))
        n_tokens += tree.n_tokens(0)
        if (n_head - shared) * n > SLACK_TOKENS or n_tokens - (n + 1) * shared > PACK_TOKENS:
            return n_head, n
        n_head = shared
    return n_head, len(trees)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare fast: halve instead of walking
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _log_probs(model: LlamaLM, hidden_ND: Tensor, asked: Sequence[tuple[int, int]]) -> list[tuple[float, bool]]:
    """(log p of the token, whether it is the likeliest) of every (place, token); each place's logits exist once."""
    places = sorted({place for place, _ in asked})
    row_of = {place: row for row, place in enumerate(places)}
    by_row: list[list[int]] = [[] for _ in places]
    for number, (place, _) in enumerate(asked):
        by_row[row_of[place]].append(number)
    out: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
    step = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    for start in range(0, len(places), step):
        some = places[start : start + step]
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
