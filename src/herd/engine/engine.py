"""Generate with continuous batching of requests over a paged KV cache.

`submit` queues a request and returns its stream. Every `step` is one forward over the concatenated next
tokens of all active requests: one token for each request that decodes, and a chunk of the prompt for each
that has just begun (Orca, Yu et al., OSDI 2022, with the chunked prefill of Sarathi, arXiv 2308.16369). So a
long prompt delays the others by one chunk at most, and finished requests cost nothing. Reading from an empty
stream runs steps, so one request and fifty are served the same way. One thread drives an engine.

With a draft (`draft.py`), a decoding sequence feeds its last token and the draft tokens after it. It keeps
the accepted ones and gets one more token (`speculate.py`), and the cache forgets the rejected ones.

Prompts with the same beginning share its pages. When pages run out, the latest request frees its pages and
computes them again later. Its answer does not change, because quantized matrices and attention give each
token the same bits in any batch. (Plain fp32 matrices are multiplied by torch, which sums batches of fewer
than four tokens in another order. This may decide a near tie between two tokens differently.)

Shapes: N tokens of a step, or its positions that need logits, D model dim, V vocab.
"""

from __future__ import annotations

import time
from collections import abc
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import EngineError
from ..llama.model import LlamaLM
from ..quant.linear import is_quantized
from ..text.tokenizer import Tokenizer
from .cache import PagedCache
from .constraint import Constraint, Guide, GuideCache
from .draft import Draft, ModelDraft, NGramDraft
from .memory import LOGIT_BYTES, PREFILL_TOKENS
from .pacing import MIXED_TOKENS, Pacer
from .request import Completion, Request, Speculated, TokenLogprob
from .runner import ModelRunner
from .sampling import logprobs, seed_of
from .saved_pages import SavedPages
from .scheduler import Scheduler
from .speculate import DraftTokens, verify
from .step_timer import StepTimer, best_draft_length
from .stream import ResponseStream, Sequence

__all__ = ["Engine", "ResponseStream"]

Part = tuple[Sequence, int, DraftTokens]
"""A sequence in a step, the number of its tokens, and the draft tokens after them."""


class Engine:
    """An engine that runs ``model`` on the model's device and in its dtype.

    Without ``tokenizer``, answers are ids without text, and only the request's own stop ids end them. At most
    ``max_batch`` requests are active at once. ``max_context`` defaults to the model's context.
    ``cache_bytes`` bounds the cache of all active requests. Others wait, but a single request always runs.
    ``kv`` is the dtype of keys and values: "fp32", "bf16", "int8" or "auto" (bf16 for bf16 and quantized
    models, otherwise fp32).

    ``draft`` proposes up to ``draft_tokens`` tokens ahead: a smaller model with the same tokenizer, "ngram"
    to continue earlier occurrences of the latest tokens, or any `Draft`. The number of draft tokens is the
    one with the best expected speed (`step_timer.py`), but always ``draft_tokens`` for a request with a seed.
    Neither distributions nor greedy answers change (`speculate.py`). A draft model has a cache of its own, of
    as many pages as the model's.
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
                f"max_context={max_context} must be between 2 and the model's context of {config.max_context}"
            )
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise EngineError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: "
                "use the tokenizer the model was trained with"
            )
        if draft_tokens < 1:
            raise EngineError(
                f"draft_tokens={draft_tokens} must be at least 1; leave out the draft to propose none"
            )
        self.model, self.tokenizer = model, tokenizer
        self._guides = None if tokenizer is None else GuideCache(tokenizer)
        self.context = max_context or config.max_context
        self.cache = PagedCache(config, _cache_kind(model, kv), cache_bytes, self.context, model.device)
        self._runner = ModelRunner(model, self.cache)
        self.draft, self._draft_tokens = self._make_draft(draft, kv), draft_tokens
        forget = (lambda sequence: None) if self.draft is None else self.draft.forget
        self.scheduler = Scheduler(self.cache, max_batch, forget, keeps_last=self.draft is not None)
        self.pacer: Pacer | None = None
        """Bounds the pieces of prompts by time, instead of `MIXED_TOKENS` and `PREFILL_TOKENS`."""
        self.saved_pages: SavedPages | None = None
        """Keeps the pages of prompts across restarts."""
        self.on_prompt: abc.Callable[[int, int], None] | None = None
        """Called layer by layer with the tokens of prompts computed so far, and those to compute in all."""
        self.n_steps = self.n_decoded = self.n_prefilled = 0
        """Number of forwards, of tokens added to answers, and of tokens computed before them."""
        self._timers = StepTimer(), StepTimer()  # of the model and of the draft
        self._stop_ids = frozenset() if tokenizer is None else frozenset(tokenizer.stop_ids)

    @property
    def n_active(self) -> int:
        """Number of requests that have pages in the cache now."""
        return len(self.scheduler.active)

    @property
    def n_waiting(self) -> int:
        """Number of requests that have not begun, or had to free their pages."""
        return len(self.scheduler.waiting)

    @property
    def n_preempted(self) -> int:
        """How often a request had to free its pages and begin again."""
        return self.scheduler.n_preempted

    def submit(self, request: Request) -> ResponseStream:
        """Queue a request for the next `step`. Raises EngineError if it is invalid."""
        return self._queue([request])[0]

    def submit_many(self, request: Request, n: int) -> list[ResponseStream]:
        """Queue ``n`` answers to one request, whose prompt is computed once.

        With a seed, the first answer is the same as from `submit`. The seeds of the others are hashes of it.
        """
        return self._queue(copies(request, n))

    def run(self, requests: abc.Sequence[Request]) -> list[Completion]:
        """Run all requests to their end and return their answers in order. If one is invalid, none is run."""
        streams = self._queue(requests)
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
        """Admit waiting requests, and run one forward for the active ones. Return False if there are none.

        If the step is interrupted, active requests end as "cancelled", and if it fails, with an EngineError,
        since their state is uncertain. Those that wait are not affected, unless nothing was active and so one
        of them is the cause.
        """
        try:
            self.scheduler.admit()
            if not self.scheduler.active:
                return False
            self._advance(self._plan())
        except BaseException as error:
            problem = f"the engine failed in a step of this answer: {type(error).__name__}: {error}"
            for sequence in self.scheduler.active or self.scheduler.waiting:
                if sequence.stream.done:
                    continue
                if isinstance(error, Exception):
                    sequence.fail(EngineError(" ".join(problem.split())))
                else:
                    sequence.end("cancelled")
            for sequence in (*self.scheduler.active, *self.scheduler.waiting):
                if sequence.stream.done:
                    self.scheduler.remove(sequence)
            raise
        return True

    def check(self, request: Request) -> None:
        """Raise EngineError if a request is invalid. Its constraint is not compiled."""
        request.validate(self.model.config.vocab_size, self.context)
        if self.tokenizer is None and request.sampling.stop:
            raise EngineError("stop strings need a tokenizer, and this engine has none")
        if self.tokenizer is None and request.constraint is not None:
            raise EngineError("a constraint needs a tokenizer, and this engine has none")
        if request.adapter and (switch := self._runner.switch) is None:
            raise EngineError(f"adapter {request.adapter!r}: this engine has no adapters")
        if request.adapter and switch is not None and request.adapter not in switch.digests:
            known = ", ".join(switch.digests)
            raise EngineError(f"adapter {request.adapter!r} is not one of {known}")

    def compile(self, constraint: Constraint | None) -> Guide | None:
        """Return the guide of one answer. Raises EngineError if the constraint cannot be followed.

        Safe from any thread. A constraint seen before is not compiled again.
        """
        if constraint is None:
            return None
        assert self._guides is not None
        return self._guides.guide(constraint)

    def enqueue(self, stream: ResponseStream, guide: Guide | None) -> None:
        """Queue a checked request, whose deltas go to ``stream``."""
        counts = None if self.draft is None else Speculated()
        sequence = Sequence(stream, self.tokenizer, self._stop_ids, self.context, guide, counts)
        if stream.request.embeds:  # so that no request waits for pages that it will not share
            sequence.tenant = f"{sequence.tenant}\0embeds"
        if stream.request.adapter and self._runner.switch is not None:  # its keys and values are its own
            sequence.tenant = f"{sequence.tenant}\0{self._runner.switch.digests[stream.request.adapter]}"
        self.scheduler.add(sequence)

    def cancel(self, stream: ResponseStream) -> None:
        """End an answer and free its pages. Does nothing if it has ended or was not queued."""
        for sequence in (*self.scheduler.active, *self.scheduler.waiting):
            if sequence.stream is stream:
                sequence.end("cancelled")
                self.scheduler.remove(sequence)
                return

    def _queue(self, requests: abc.Sequence[Request]) -> list[ResponseStream]:
        """Queue requests, if all of them are valid."""
        for request in requests:
            self.check(request)
        guides = [self.compile(request.constraint) for request in requests]
        streams = [ResponseStream(request, self.step, self.cancel) for request in requests]
        for stream, guide in zip(streams, guides, strict=True):
            self.enqueue(stream, guide)
        return streams

    def _make_draft(self, draft: LlamaLM | Draft | str | None, kv: str) -> Draft | None:
        if not isinstance(draft, LlamaLM | str):
            return draft
        if isinstance(draft, str):
            if draft != "ngram":
                raise EngineError(f'draft={draft!r} must be a model, a Draft or "ngram"')
            return NGramDraft()
        ours, theirs = self.model.config.vocab_size, draft.config.vocab_size
        if ours != theirs:
            raise EngineError(
                f"the draft model has {theirs} tokens and the model {ours}: both must have the same tokenizer"
            )
        n_tokens = ours if self.tokenizer is None else self.tokenizer.vocab_size
        return ModelDraft(draft, n_tokens, self.cache.pages.limit, self.context, _cache_kind(draft, kv))

    def _plan(self) -> list[Part]:
        """Take pages for this step and return its parts."""
        active = self.scheduler.active
        pending = {s: len(s.tokens) - s.cached.length for s in active}
        decoding = [s for s, n in pending.items() if n == 1 and s.n_new and s.may_draft]
        drafts = self._propose(decoding, sum(pending.values()))
        mixed = any(n == 1 for n in pending.values())
        room = MIXED_TOKENS if mixed else PREFILL_TOKENS
        prompts = [s for s, n in pending.items() if n > 1]
        if self.pacer is not None and prompts:
            # many prompts of one owner slow down the answers of others no more than one does
            alone = len({s.owner for s in active}) == 1
            room = self.pacer.room(mixed, len(prompts) if alone else len({s.owner for s in prompts}))
        lengths = {s: None if draft is None else len(draft.tokens) for s, draft in drafts.items()}
        return [(s, n, drafts.get(s) or DraftTokens([])) for s, n in self.scheduler.plan(room, lengths)]

    def _propose(self, sequences: list[Sequence], n_tokens: int) -> dict[Sequence, DraftTokens | None]:
        """Return the draft tokens of decoding sequences. ``n_tokens`` is the size of the step without them.

        Their number is limited by the length of the answer and, for sequences without a seed, by their
        expected speed (`step_timer.py`).
        """
        if self.draft is None or not sequences:
            return {}
        unseeded = [s for s in sequences if s.sampling.seed is None]
        n_tokens = min(n_tokens, len(self.scheduler.active) + MIXED_TOKENS)
        rates = [s.acceptance_rate for s in unseeded]
        k = best_draft_length(self._draft_tokens, rates, n_tokens, *self._timers)
        if k == 0:
            for sequence in unseeded:
                sequence.forget_acceptance_rate()
        most = [
            min(k if s.sampling.seed is None else self._draft_tokens, s.limit - s.n_new - 1)
            for s in sequences
        ]
        start = time.perf_counter()
        drafts = self.draft.propose(sequences, most)
        if depth := max(len(draft.tokens) if draft else 0 for draft in drafts):
            self._timers[1].note(len(sequences), (time.perf_counter() - start) / depth)
        return dict(zip(sequences, drafts, strict=True))

    def _advance(self, parts: list[Part]) -> None:
        """Run one forward over these parts, and add the next tokens to sequences whose tokens are all fed."""
        if not parts:
            return
        tokens: list[int] = []
        ready: list[tuple[Sequence, DraftTokens, int]] = []  # with the number of tokens known before
        positions: list[int] = []
        for sequence, n, draft in parts:
            start = sequence.cached.length
            tokens += sequence.tokens[start : start + n]
            if start + n == len(sequence.tokens) and not sequence.request.embeds:
                positions += range(len(tokens) - 1, len(tokens) + len(draft.tokens))
                if draft.tokens:
                    tokens += draft.tokens
                    sequence.record_draft(Speculated(drafted=len(draft.tokens)))
                ready.append((sequence, draft, start + n))
        self.n_steps += 1
        prompts = [n for sequence, n, _ in parts if n > 1 or not sequence.n_new]
        self.n_prefilled += sum(prompts)
        began = time.perf_counter()
        lengths = [(sequence.cached, n + len(draft.tokens)) for sequence, n, draft in parts]
        adapters = [sequence.request.adapter for sequence, _, _ in parts]
        on_layer = self._on_layer(parts)
        hidden_ND = self._runner(lengths, tokens, adapters, on_layer)
        on_layer(self.model.config.n_layers)
        if prompts:
            self._read_prompts(parts, hidden_ND)
        if ready:
            logits_NV = self._logits(hidden_ND if len(positions) == len(tokens) else hidden_ND[positions])
            n_before = sum(sequence.n_new for sequence, _, _ in ready)
            accepted = verify(logits_NV, [s for s, _, _ in ready], [draft for _, draft, _ in ready])
            self._timers[0].note(len(tokens), time.perf_counter() - began)
            self.n_decoded += sum(sequence.n_new for sequence, _, _ in ready) - n_before
            for (sequence, _, known), n in zip(ready, accepted, strict=True):
                self.cache.truncate(sequence.cached, min(known + n, len(sequence.tokens)))
        if self.pacer is not None:
            self.pacer.note(len(parts) - len(prompts), sum(prompts), time.perf_counter() - began)
        for sequence, _, _ in parts:
            if not sequence.request.embeds:  # nobody asks for its pages again
                self.cache.remember(sequence.cached, sequence.tenant, sequence.tokens)
                if self.saved_pages is not None and sequence.n_new <= 1:
                    self.saved_pages.save(sequence.cached)
            if sequence.stream.done:
                self.scheduler.remove(sequence)

    def _on_layer(self, parts: list[Part]) -> abc.Callable[[int], None]:
        """Return a function that calls `on_prompt` when the first n layers of a step are computed."""
        report, n_layers = self.on_prompt, self.model.config.n_layers
        prompts = [(sequence, n) for sequence, n, _ in parts if not sequence.n_new]
        if report is None or not prompts:
            return lambda layer: None
        n_now = sum(n for _, n in prompts)
        n_before = sum(s.cached.length - s.stream.shared_tokens for s, _ in prompts)
        n_all = sum(s.n_prompt - s.stream.shared_tokens for s, _ in prompts)
        return lambda layer: report(n_before + n_now * layer // n_layers, n_all)

    def _read_prompts(self, parts: list[Part], hidden_ND: Tensor) -> None:
        """Give sequences what they want of their prompts: hidden states, or log-probabilities of tokens."""
        row = 0
        for sequence, n, draft in parts:
            if sequence.lacks_prompt_logprobs:
                top, first = sequence.request.prompt_logprobs, sequence.cached.length - n + 1
                ids = sequence.stream.prompt_ids[first : first + n]  # no token follows the last one
                scored: list[TokenLogprob] = []
                step = max(1, LOGIT_BYTES // (4 * self.model.config.vocab_size))
                for at in range(0, len(ids), step):
                    some = ids[at : at + step]
                    logits_NV = self._logits(hidden_ND[row + at : row + at + len(some)])
                    scored += [each for (each,) in logprobs(logits_NV, some, [top] * len(some))]
                sequence.take_prompt_logprobs(scored)
            if sequence.request.embeds:
                sequence.take_hidden(hidden_ND[row : row + n])
            row += n + len(draft.tokens)

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits (N, V) fp32 after these hidden states."""
        logits_NV = self.model.lm_head(hidden_ND).float()
        # the model's vocabulary may be padded beyond the tokenizer's tokens: those ids are never picked
        if self.tokenizer is not None and self.tokenizer.vocab_size < logits_NV.shape[1]:
            logits_NV[:, self.tokenizer.vocab_size :] = -torch.inf
        return logits_NV


def copies(request: Request, n: int) -> list[Request]:
    """Return ``n`` requests for answers to one prompt, with seeds derived from the request's, if any."""
    if n < 1:
        raise EngineError(f"n={n} must be at least 1")
    sampling = request.sampling
    if sampling.seed is None:
        return [request] * n
    seeds = [seed_of(sampling.seed, number) for number in range(n)]
    return [replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds]


def _cache_kind(model: LlamaLM, kv: str) -> str:
    if kv != "auto":
        return kv
    return "bf16" if model.dtype == torch.bfloat16 or is_quantized(model) else "fp32"
