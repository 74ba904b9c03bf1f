"""The one generator: continuous batching of requests over a paged KV cache.

`submit` queues a request and gives its stream; every `step` is one forward over the next tokens of all active requests,
flattened into one row: a token each for those that decode, and a piece of their prompt for those that begin (Orca, Yu
et al., OSDI 2022; chunked prefill, Sarathi, arXiv 2308.16369). So a long prompt holds the others up by one piece at
most, and finished requests cost nothing. A stream pulls steps when it has nothing to give, so one request and fifty go
the same way. One thread drives an engine.

Prompts that begin alike share their pages. When pages run out, the latest request gives its own back and computes them
again later: attention gives each token the same bits in any company, so its answer does not change.

Shapes: N tokens of a step, D model dim, B rows whose next token is wanted, V vocab.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import EngineError
from ..llama.model import LlamaLM
from ..quant.linear import is_quantized
from ..text.tokenizer import Tokenizer
from .cache import Cached, PagedCache
from .pages import chain
from .request import Completion, Request
from .sampling import logprobs, sample
from .stream import Row, Stream

__all__ = ["Engine", "Stream"]

PREFILL_TOKENS = 2048
"""Most prompt tokens of one step: enough to fill the matmuls, little enough memory for activations."""
MIXED_TOKENS = 256
"""The same while others decode: what they wait for at most."""


class Engine:
    """Runs ``model``; ``tokenizer`` None gives ids without text and without stop tokens of its own.

    ``max_batch`` requests are worked on together; ``max_context`` defaults to the model's. ``cache_bytes`` bounds what
    they hold in the cache: others wait their turn (one alone always runs). ``kv`` is what keys and values are kept in:
    "fp32", "bf16", "int8", or "auto", which is what the model computes in, and bf16 where its weights are quantized.
    The model is used as it is, on its device and in its dtype.
    """

    def __init__(
        self,
        model: LlamaLM,
        tokenizer: Tokenizer | None,
        max_batch: int = 32,
        max_context: int | None = None,
        cache_bytes: int = 4 << 30,
        kv: str = "auto",
    ) -> None:
        config = model.config
        if max_batch < 1:
            raise EngineError(f"max_batch={max_batch} must be at least 1")
        if max_context is not None and not 2 <= max_context <= config.max_context:
            raise EngineError(f"max_context={max_context} must be between 2 and the model's {config.max_context}")
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise EngineError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: "
                "use the tokenizer the model was trained with"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.context = max_batch, max_context or config.max_context
        if kv == "auto":
            kv = "bf16" if model.dtype == torch.bfloat16 or is_quantized(model) else "fp32"
        self.cache = PagedCache(config, kv, cache_bytes, self.context, model.device)
        self.n_preempted = 0
        """How often a request had to give its pages back and begin again."""
        self._stop_ids = frozenset() if tokenizer is None else frozenset(tokenizer.stop_ids)
        self._submitted = 0
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []  # in the order of their submission

    @property
    def n_active(self) -> int:
        """Requests worked on now."""
        return len(self._rows)

    @property
    def n_waiting(self) -> int:
        """Requests not yet begun, or put back."""
        return len(self._waiting)

    def submit(self, request: Request) -> Stream:
        """Queue a request; computing begins with the next `step`. Raises EngineError if it cannot be served."""
        request.validate(self.model.config.vocab_size, self.context)
        if self.tokenizer is None and request.sampling.stop:
            raise EngineError("stop strings need a tokenizer, and this engine has none")
        stream = Stream(self, request)
        self._waiting.append(Row(self._submitted, stream, self.tokenizer, self._stop_ids, self.context))
        self._submitted += 1
        return stream

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """All requests to their end, batched; answers in the order of the requests. One invalid request: none runs."""
        for request in requests:
            request.validate(self.model.config.vocab_size, self.context)
        streams = [self.submit(request) for request in requests]
        try:
            while not all(stream.done for stream in streams):
                self.step()
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return [stream.completion() for stream in streams]

    @torch.inference_mode()
    def step(self) -> bool:
        """Take requests in and move the active ones on by one forward. False when there was nothing to do.

        If it fails or is interrupted, active requests end as "cancelled", since their state is no longer certain.
        """
        try:
            self._admit()
            if not self._rows:
                return False
            self._advance(self._plan())
        except BaseException:
            for row in list(self._rows):
                self._drop(row)
                if not row.stream.done:
                    row.end("cancelled")
            raise
        return True

    def _admit(self) -> None:
        """Who may begin now: while there are pages for the whole prompt beside what the active ones need soon."""
        lacking = sum(self.cache.lacking(_cached(row), row.soon) for row in self._rows)
        computing = {digest for row in self._rows for digest in row.digests[len(_cached(row).digests) :]}
        while self._waiting and len(self._rows) < self.max_batch:
            row = self._waiting[0]
            chain(row.digests, row.request.tenant, row.tokens, len(row.tokens) - 1)  # one token at least is fed
            cached = self.cache.open()
            self.cache.match(cached, row.digests)
            lacking += self.cache.lacking(cached, row.soon)
            # what an active request is about to compute is worth waiting for
            shared = len(cached.digests) < len(row.digests) and row.digests[len(cached.digests)] in computing
            if self._rows and (shared or lacking > self.cache.pages.available):
                self.cache.close(cached)
                return
            row.cached = cached
            if not row.n_new:
                row.stream.shared_tokens = cached.length
            computing.update(row.digests[len(cached.digests) :])
            self._rows.append(self._waiting.popleft())
            self._rows.sort(key=lambda row: row.number)

    def _plan(self) -> list[tuple[Row, int]]:
        """How many of its tokens each active row feeds in this step, its pages taken; the oldest come first."""
        pending = {row: len(row.tokens) - _cached(row).length for row in self._rows}
        room = PREFILL_TOKENS if all(n > 1 for n in pending.values()) else MIXED_TOKENS
        parts: list[tuple[Row, int]] = []
        for row in list(self._rows):
            if row.cached is None:  # put back for an older one's sake
                continue
            n = pending[row] if pending[row] == 1 else min(pending[row], room)
            if n and self._make_room(row, row.cached.length + n):
                room -= n if n > 1 else 0
                parts.append((row, n))
        return parts

    def _make_room(self, row: Row, length: int) -> bool:
        """Pages for ``length`` tokens of a row, taken from later rows if need be. False if it was put back itself."""
        cached = _cached(row)
        while self.cache.lacking(cached, length) > self.cache.pages.available and len(self._rows) > 1:
            latest = self._rows[-1]
            self._drop(latest)
            self._waiting.appendleft(latest)
            self.n_preempted += 1
            if latest is row:
                return False
        self.cache.grow(cached, length)
        return True

    def _advance(self, parts: list[tuple[Row, int]]) -> None:
        """One forward over these tokens; rows whose last known token was among them get their next one."""
        device = self.model.device
        tokens: list[int] = []
        ready: list[Row] = []
        places: list[int] = []
        for row, n in parts:
            at = _cached(row).length
            tokens += row.tokens[at : at + n]
            if at + n == len(row.tokens):
                ready.append(row)
                places.append(len(tokens) - 1)
        positions_1N, attend = self.cache.step([(_cached(row), n) for row, n in parts])
        hidden_1ND = self.model(torch.tensor([tokens], device=device), positions_1N, attend)
        for row, _ in parts:
            self.cache.remember(_cached(row), row.request.tenant, row.tokens)
        if ready:
            hidden_BD = hidden_1ND[0, torch.tensor(places, device=device)]
            self._next_tokens(ready, self._adjust(self.model.lm_head(hidden_BD).float()))

    def _adjust(self, logits_BV: Tensor) -> Tensor:
        """What may be said at all: rows of the head that are no token never are."""
        if self.tokenizer is not None and self.tokenizer.vocab_size < logits_BV.shape[1]:
            logits_BV[:, self.tokenizer.vocab_size :] = -torch.inf
        return logits_BV

    def _next_tokens(self, rows: list[Row], logits_BV: Tensor) -> None:
        """Sample for these rows, hand out deltas, drop those that ended."""
        ids = sample(logits_BV, [r.sampling for r in rows], [r.seed for r in rows], [r.n_new for r in rows])
        lps = logprobs(logits_BV, ids, [r.sampling.logprobs for r in rows])
        for row, token, lp in zip(rows, ids, lps, strict=True):
            if row.take(token, lp):
                self._drop(row)

    def _drop(self, row: Row) -> None:
        """Its pages are free at once."""
        self.cache.close(_cached(row))
        row.cached = None
        self._rows.remove(row)

    def _cancel(self, stream: Stream) -> None:
        for row in (*self._rows, *self._waiting):
            if row.stream is stream:
                row.end("cancelled")
                if row.cached is None:
                    self._waiting.remove(row)
                else:
                    self._drop(row)
                return


def _cached(row: Row) -> Cached:
    assert row.cached is not None
    return row.cached
