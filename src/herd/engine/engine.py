"""The one generator: continuous batching of requests over a paged KV cache.

`submit` queues a request and gives its stream; every `step` is one forward over the next tokens of all active requests,
flattened into one row: a token each for those that decode, and a piece of their prompt for those that begin (Orca, Yu
et al., OSDI 2022; chunked prefill, Sarathi, arXiv 2308.16369). So a long prompt holds the others up by one piece at
most, and finished requests cost nothing. A stream pulls steps when it has nothing to give, so one request and fifty go
the same way. One thread drives an engine.

With a draft (`draft.py`) a row that decodes feeds its last token and the guesses that may follow, and gets as many as
prove right and one more (`speculate.py`); the cache forgets the others.

Prompts that begin alike share their pages. When pages run out, the latest request gives its own back and computes them
again later. Matrices in blocks and attention give each token the same bits in any company, so its answer does not
change. (Plain fp32 matrices are torch's, which adds fewer than four rows up otherwise: there a near tie may turn.)

Shapes: N tokens of a step, or its places whose next token is wanted, D model dim, V vocab.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import EngineError
from ..llama.model import LlamaLM
from ..quant.linear import is_quantized
from ..text.tokenizer import Tokenizer
from .cache import Cached, PagedCache
from .constraint import Guide
from .draft import Draft, ModelDraft, NGramDraft
from .pace import Pace, best_guesses
from .pages import chain
from .request import Completion, Request, Speculated
from .rules import Rules
from .sampling import seed_of
from .speculate import Guess, settle
from .stream import Row, Stream
from .trunk import Trunk

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

    ``draft`` guesses up to ``draft_tokens`` tokens ahead: a smaller model with the same tokens, "ngram" for what stood
    in prompt or answer before, or any `Draft`. It guesses as many as pay (`pace.py`), and for a request with a seed
    always so many. No distribution changes, and no greedy token (`speculate.py`). A draft model's cache may take as
    many pages as the model's, on top.
    """

    def __init__(
        self,
        model: LlamaLM,
        tokenizer: Tokenizer | None,
        max_batch: int = 32,
        max_context: int | None = None,
        cache_bytes: int = 4 << 30,
        kv: str = "auto",
        draft: LlamaLM | Draft | str | None = None,
        draft_tokens: int = 4,
    ) -> None:
        config = model.config
        if max_batch < 1:
            raise EngineError(f"max_batch={max_batch} must be at least 1")
        if max_context is not None and not 2 <= max_context <= config.max_context:
            raise EngineError(
                f"max_context={max_context} must be between 2 and the model's {config.max_context}"
            )
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise EngineError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: "
                "use the tokenizer the model was trained with"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.context = max_batch, max_context or config.max_context
        self.cache = PagedCache(config, _kind(model, kv), cache_bytes, self.context, model.device)
        self._trunk = Trunk(model, self.cache)
        self.draft, self._draft_tokens = self._drafted(draft, kv), draft_tokens
        if draft_tokens < 1:
            raise EngineError(
                f"draft_tokens={draft_tokens} must be at least 1; without a draft nothing is guessed"
            )
        self.n_preempted = 0
        """How often a request had to give its pages back and begin again."""
        self._paces = Pace(), Pace()  # of the model and of the draft
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
        return self._queue(self._row(request))

    def submit_many(self, request: Request, n: int) -> list[Stream]:
        """``n`` answers to one request, whose prompt is computed once. With a seed the first answer is the one that
        `submit` gives, and the others have seeds of their own that follow from it."""
        if n < 1:
            raise EngineError(f"n={n} must be at least 1")
        sampling = request.sampling
        if sampling.seed is not None:
            seeds = [seed_of(sampling.seed, number) for number in range(n)]
            requests = [replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds]
        else:
            requests = [request] * n
        return [self._queue(row) for row in [self._row(request) for request in requests]]

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """All requests to their end, batched; answers in the order of the requests. One invalid request: none runs."""
        streams = [self._queue(row) for row in [self._row(request) for request in requests]]
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

    def _row(self, request: Request) -> Row:
        """A request checked, and its constraint read."""
        request.validate(self.model.config.vocab_size, self.context)
        if self.tokenizer is None and request.sampling.stop:
            raise EngineError("stop strings need a tokenizer, and this engine has none")
        guide = rules = None
        if request.constraint is not None:
            if self.tokenizer is None:
                raise EngineError("a constraint needs a tokenizer, and this engine has none")
            guide = Guide(request.constraint, self.tokenizer)
        if guide is not None or request.sampling.bends:
            rules = Rules(request.sampling, request.prompt_ids, guide)
        counts = None if self.draft is None else Speculated()
        return Row(Stream(self, request), self.tokenizer, self._stop_ids, self.context, rules, counts)

    def _queue(self, row: Row) -> Stream:
        row.number, self._submitted = self._submitted, self._submitted + 1
        self._waiting.append(row)
        return row.stream

    def _drafted(self, draft: LlamaLM | Draft | str | None, kv: str) -> Draft | None:
        if not isinstance(draft, LlamaLM | str):
            return draft
        if isinstance(draft, str):
            if draft != "ngram":
                raise EngineError(f'draft={draft!r}: give a model, a Draft or "ngram"')
            return NGramDraft()
        ours, theirs = self.model.config.vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise EngineError(
                f"the draft has {theirs} tokens and the model {ours}: both must have the same tokenizer"
            )
        n_tokens = ours if self.tokenizer is None else self.tokenizer.vocab_size
        return ModelDraft(draft, n_tokens, self.cache.pages.limit, self.context, _kind(draft, kv))

    def _admit(self) -> None:
        """Who may begin now: while there are pages for the whole prompt beside what the active ones need soon."""
        lacking = sum(self.cache.lacking(_cached(row), row.soon) for row in self._rows)
        computing = {digest for row in self._rows for digest in row.digests[len(_cached(row).digests) :]}
        while self._waiting and len(self._rows) < self.max_batch:
            row = self._waiting[0]
            chain(
                row.digests, row.request.tenant, row.tokens, len(row.tokens) - 1
            )  # one token at least is fed
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

    def _plan(self) -> list[tuple[Row, int, Guess]]:
        """What each active row feeds in this step, its pages taken: so many of its tokens, then guesses. The oldest
        rows come first."""
        pending = {row: len(row.tokens) - _cached(row).length for row in self._rows}
        guesses = self._guess(
            [row for row, n in pending.items() if n == 1 and row.n_new], sum(pending.values())
        )
        room = PREFILL_TOKENS if all(n > 1 for n in pending.values()) else MIXED_TOKENS
        parts: list[tuple[Row, int, Guess]] = []
        for row in list(self._rows):
            if row.cached is None:  # put back for an older one's sake
                continue
            guess = guesses.get(row, Guess([]))
            if guess is None:  # its draft is not ready
                continue
            n = pending[row]
            if n > 1:
                # one that was put back goes on where it was, with guesses behind its last token as it would have had
                n = min(n - 1 if row.n_new and self.draft is not None else n, room)
                room -= n
            if n and self._make_room(row, row.cached.length + n + len(guess.tokens)):
                parts.append((row, n, guess))
        return parts

    def _guess(self, rows: list[Row], n_tokens: int) -> dict[Row, Guess | None]:
        """What the draft has for rows that decode; no more than may still be said beside the model's own token, and
        for rows without a seed no more than pay (`pace.py`). ``n_tokens`` wait to be fed besides."""
        if self.draft is None or not rows:
            return {}
        free = [row for row in rows if row.sampling.seed is None]
        n_tokens = min(n_tokens, len(self._rows) + MIXED_TOKENS)
        k = best_guesses(self._draft_tokens, [row.acceptance for row in free], n_tokens, *self._paces)
        if k == 0:
            for row in free:
                row.hope()
        most = [
            min(k if row.sampling.seed is None else self._draft_tokens, row.limit - row.n_new - 1)
            for row in rows
        ]
        start = time.perf_counter()
        guesses = self.draft.guess(rows, most)
        if depth := max(len(guess.tokens) if guess else 0 for guess in guesses):
            self._paces[1].note(len(rows), (time.perf_counter() - start) / depth)
        return dict(zip(rows, guesses, strict=True))

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

    def _advance(self, parts: list[tuple[Row, int, Guess]]) -> None:
        """One forward over these tokens; rows whose last known token was among them get their next ones."""
        if not parts:
            return
        tokens: list[int] = []
        ready: list[tuple[Row, Guess, int]] = []  # with the tokens they had
        places: list[int] = []
        for row, n, guess in parts:
            at = _cached(row).length
            tokens += row.tokens[at : at + n]
            if at + n == len(row.tokens):
                places += range(len(tokens) - 1, len(tokens) + len(guess.tokens))
                if guess.tokens:
                    tokens += guess.tokens
                    row.count(Speculated(guessed=len(guess.tokens)))
                ready.append((row, guess, at + n))
        start = time.perf_counter()
        logits_NV = self._forward(
            [(_cached(row), n + len(guess.tokens)) for row, n, guess in parts], tokens, places
        )
        if ready:
            kept = settle(logits_NV, [row for row, _, _ in ready], [guess for _, guess, _ in ready])
            self._paces[0].note(len(tokens), time.perf_counter() - start)
            for (row, _, known), n_kept in zip(ready, kept, strict=True):
                self.cache.truncate(_cached(row), min(known + n_kept, len(row.tokens)))
        for row, _, _ in parts:
            self.cache.remember(_cached(row), row.request.tenant, row.tokens)
            if row.stream.done:
                self._drop(row)

    def _forward(self, parts: list[tuple[Cached, int]], tokens: list[int], places: list[int]) -> Tensor:
        """Feed these tokens, so many to each sequence; logits (N, V) fp32 at these places of the row."""
        hidden_ND = self._trunk(parts, tokens)
        if not places:
            return torch.empty(0, self.model.config.vocab_size)
        logits_NV = self.model.lm_head(hidden_ND[places]).float()
        # what may be said at all: rows of the head that are no token never are
        if self.tokenizer is not None and self.tokenizer.vocab_size < logits_NV.shape[1]:
            logits_NV[:, self.tokenizer.vocab_size :] = -torch.inf
        return logits_NV

    def _drop(self, row: Row) -> None:
        """Its pages are free at once."""
        if self.draft is not None:
            self.draft.forget(row)
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


def _kind(model: LlamaLM, kv: str) -> str:
    if kv != "auto":
        return kv
    return "bf16" if model.dtype == torch.bfloat16 or is_quantized(model) else "fp32"


def _cached(row: Row) -> Cached:
    assert row.cached is not None
    return row.cached
