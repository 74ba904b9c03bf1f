"""The one generator: continuous batching of requests over a KV cache.

`submit` queues a request and gives its stream; every `step` either takes waiting requests in (prefill: all prompt
tokens at once, prompts of like length together) or moves every active one a token on (decode: one forward for the whole
batch). Finished rows leave at once and the rest close up, so no work is spent on them (Orca, Yu et al., OSDI 2022). A
stream pulls steps when it has nothing to give, so one request and fifty go the same way. One thread drives an engine.

Behind this interface paging, prefix caches, constraints and speculation can come without callers noticing.

Shapes: B rows, T prompt tokens, D model dim, V vocab.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import EngineError
from ..llama.model import LlamaLM
from ..text.tokenizer import Tokenizer
from .cache import KVCache
from .detokenize import TextStream
from .memory import nbytes
from .request import Completion, Delta, FinishReason, Request, TokenLogprob
from .sampling import logprobs, sample

PREFILL_TOKENS = 4096
"""Most tokens of one prefill forward: enough to fill the matmuls, little enough memory for activations."""
PADDING = 1.25
"""Prompts share a prefill while padding them to one length costs at most this factor."""


class Stream(Iterator[Delta]):
    """The deltas of one request. Iterating drives the engine; `cancel` ends the answer and frees its slot."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._deltas: deque[Delta] = deque()
        self.done = False

    def __next__(self) -> Delta:
        while not self._deltas:
            if self.done:
                raise StopIteration
            if not self._engine.step():
                raise EngineError("this answer was given up when its engine failed earlier")
        return self._deltas.popleft()

    def cancel(self) -> None:
        """Stop this answer now; its last delta says "cancelled". Nothing happens if it has ended already."""
        self._engine._cancel(self)

    def completion(self) -> Completion:
        """The rest of the answer, run to its end; all of it if nothing was taken yet."""
        deltas = list(self)
        if not deltas:
            raise EngineError("this answer was already taken from its stream, to the end")
        last = deltas[-1]
        assert last.finish_reason is not None
        return Completion(
            ids=[i for d in deltas for i in d.token_ids],
            text="".join(d.text for d in deltas),
            finish_reason=last.finish_reason,
            stop_id=last.stop_id,
            logprobs=None if self._request.sampling.logprobs is None else [p for d in deltas for p in d.logprobs],
            prompt_tokens=len(self._request.prompt_ids),
        )

    def _push(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self.done = delta.finish_reason is not None


class _Row:
    """An active request: its place in the cache is its place in the engine's list."""

    def __init__(self, stream: Stream, tokenizer: Tokenizer | None, stop_ids: frozenset[int], context: int) -> None:
        request, sampling = stream._request, stream._request.sampling
        self.stream, self.sampling = stream, sampling
        self.stop_ids = stop_ids | request.stop_ids
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self.text = None if tokenizer is None else TextStream(tokenizer, sampling.stop)
        self.prompt_ids = request.prompt_ids
        self.cached = 0  # tokens in the cache: the next token's position
        self.n_new = 0
        self.last = -1
        room = context - len(request.prompt_ids)
        self.limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        self.limit_reason: FinishReason = "length" if self.limit == sampling.max_tokens else "context"

    @property
    def most_tokens(self) -> int:
        """Tokens its slot may come to hold; the last token is never fed back."""
        return len(self.prompt_ids) + self.limit - 1

    def take(self, token: int, lps: tuple[TokenLogprob, ...]) -> bool:
        """Account for a sampled token and push its delta; True if the answer has ended."""
        if token in self.stop_ids:
            self.end("stop", stop_id=token)
            return True
        self.n_new += 1
        self.last = token
        piece = "" if self.text is None else self.text.feed(token)
        reason: FinishReason | None = None
        if self.text is not None and self.text.stopped:
            reason = "stop"
        elif self.n_new == self.limit:
            reason = self.limit_reason
        if reason and self.text is not None:
            piece += self.text.finish()
            if self.text.stopped:  # the end of a broken character may complete a stop string
                reason = "stop"
        self.stream._push(Delta(piece, (token,), reason, logprobs=lps))
        return reason is not None

    def end(self, reason: FinishReason, stop_id: int | None = None) -> None:
        """The last delta, without a token."""
        self.stream._push(Delta("" if self.text is None else self.text.finish(), (), reason, stop_id))


class Engine:
    """Runs ``model``; ``tokenizer`` None gives ids without text and without stop tokens of its own.

    ``max_batch`` rows decode together; ``max_context`` defaults to the model's. ``cache_bytes`` bounds what the
    *worst case* of the active requests may take: others wait their turn (one alone always runs). The model is used as
    it is, on its device and in its dtype.
    """

    def __init__(
        self,
        model: LlamaLM,
        tokenizer: Tokenizer | None,
        max_batch: int = 32,
        max_context: int | None = None,
        cache_bytes: int = 4 << 30,
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
        self._cache_bytes = cache_bytes
        self._device, self._value_bytes = model.device, model.dtype.itemsize
        self.cache = KVCache(config, model.dtype, model.device)
        self._stop_ids = frozenset() if tokenizer is None else frozenset(tokenizer.stop_ids)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []

    @property
    def n_active(self) -> int:
        """Requests decoding now."""
        return len(self._rows)

    @property
    def n_waiting(self) -> int:
        """Requests not yet begun."""
        return len(self._waiting)

    def submit(self, request: Request) -> Stream:
        """Queue a request; computing begins with the next `step`. Raises EngineError if it cannot be served."""
        request.validate(self.model.config.vocab_size, self.context)
        if self.tokenizer is None and request.sampling.stop:
            raise EngineError("stop strings need a tokenizer, and this engine has none")
        stream = Stream(self, request)
        self._waiting.append(_Row(stream, self.tokenizer, self._stop_ids, self.context))
        return stream

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """All requests to their end, batched; answers in the order of the requests. One invalid request: none runs."""
        for request in requests:
            request.validate(self.model.config.vocab_size, self.context)
        # like lengths together: less padding, and the batch reads only as far as its longest row
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        streams = {i: self.submit(requests[i]) for i in order}
        try:
            while not all(stream.done for stream in streams.values()):
                self.step()
        except BaseException:
            for stream in streams.values():
                stream.cancel()
            raise
        return [streams[i].completion() for i in range(len(requests))]

    @torch.inference_mode()
    def step(self) -> bool:
        """Take requests in, or move all active ones one token on. False when there was nothing to do.

        If it fails or is interrupted, active requests end as "cancelled", since their state is no longer certain.
        """
        admitted: list[_Row] = []
        try:
            admitted = self._admit()
            for group in _groups(admitted):
                self._prefill(group)
            if not admitted and not self._rows:
                return False
            if not admitted:
                self._decode()
        except BaseException:
            self._abandon(admitted)
            raise
        if not self._rows:
            self.cache.release()
        return True

    def _admit(self) -> list[_Row]:
        """Who may begin now. With many waiting, slots are filled a few at a time: prefilling one by one is slow."""
        free = self.max_batch - len(self._rows)
        if not self._waiting or free < min(len(self._waiting), max(1, self.max_batch // 8)):
            return []
        longest = max((row.most_tokens for row in self._rows), default=0)
        admitted: list[_Row] = []
        while self._waiting and len(admitted) < free:
            longest = max(longest, self._waiting[0].most_tokens)
            n_rows = len(self._rows) + len(admitted) + 1
            if n_rows > 1 and nbytes(self.model.config, n_rows, longest, self._value_bytes) > self._cache_bytes:
                break
            admitted.append(self._waiting.popleft())
        return sorted(admitted, key=lambda row: len(row.prompt_ids))

    def _prefill(self, rows: list[_Row]) -> None:
        """Prompts of one group, right-padded, in chunks of at most `PREFILL_TOKENS` tokens; then each first token."""
        lengths = [len(row.prompt_ids) for row in rows]
        T, B = max(lengths), len(rows)
        self.cache.reserve(len(self._rows) + B, max([T, *(row.cached for row in self._rows)]))
        first = self.cache.add_rows(B)
        self._rows += rows
        tokens_BT = torch.zeros(B, T, dtype=torch.int64)
        for b, row in enumerate(rows):
            tokens_BT[b, : lengths[b]] = torch.tensor(row.prompt_ids)
            row.cached = lengths[b]
        tokens_BT = tokens_BT.to(self._device)
        chunk = max(1, PREFILL_TOKENS // B)
        last_hidden: list[Tensor | None] = [None] * B
        for start in range(0, T, chunk):
            stop = min(start + chunk, T)
            positions_1T = torch.arange(start, stop, device=self._device)[None]
            hidden_BTD = self.model(tokens_BT[:, start:stop], positions_1T, self.cache.prefill(first, start))
            for b, n in enumerate(lengths):
                if start < n <= stop:
                    last_hidden[b] = hidden_BTD[b, n - 1 - start]
        self._next_tokens(torch.stack([h for h in last_hidden if h is not None]), first)

    def _decode(self) -> None:
        positions = [row.cached for row in self._rows]
        self.cache.reserve(len(self._rows), max(positions) + 1)
        tokens_B1 = torch.tensor([[row.last] for row in self._rows], device=self._device)
        positions_B1 = torch.tensor(positions, device=self._device)[:, None]
        hidden_B1D = self.model(tokens_B1, positions_B1, self.cache.decode(positions))
        for row in self._rows:
            row.cached += 1
        self._next_tokens(hidden_B1D[:, 0], 0)

    def _next_tokens(self, hidden_BD: Tensor, first: int) -> None:
        """Sample for the rows from ``first`` on, hand out deltas, drop the rows that ended."""
        logits_BV = self.model.lm_head(hidden_BD).float()
        rows = self._rows[first:]
        if self.tokenizer is not None and self.tokenizer.vocab_size < logits_BV.shape[1]:
            logits_BV[:, self.tokenizer.vocab_size :] = -torch.inf  # rows of the head that are no token
        ids = sample(logits_BV, [r.sampling for r in rows], [r.seed for r in rows], [r.n_new for r in rows])
        lps = logprobs(logits_BV, ids, [r.sampling.logprobs for r in rows])
        self._drop([first + i for i, row in enumerate(rows) if row.take(ids[i], lps[i])])

    def _drop(self, ended: list[int]) -> None:
        for source, target in self.cache.drop(ended, [row.cached for row in self._rows]):
            self._rows[target] = self._rows[source]
        del self._rows[self.cache.n_rows :]

    def _abandon(self, admitted: list[_Row]) -> None:
        for row in {id(r): r for r in (*self._rows, *admitted)}.values():
            if not row.stream.done:
                row.end("cancelled")
        self._rows, self.cache.n_rows = [], 0
        self.cache.release()

    @torch.inference_mode()
    def _cancel(self, stream: Stream) -> None:
        for i, row in enumerate(self._rows):
            if row.stream is stream:
                row.end("cancelled")
                return self._drop([i])
        for row in self._waiting:
            if row.stream is stream:
                row.end("cancelled")
                self._waiting.remove(row)
                return None
        return None


def _groups(rows: list[_Row]) -> list[list[_Row]]:
    """Rows sorted by length, cut where padding to the longest would waste too much or the chunk would be too big."""
    groups: list[list[_Row]] = []
    real = 0
    for row in rows:
        n = len(row.prompt_ids)
        size = len(groups[-1]) + 1 if groups else 0
        if groups and size * n <= PREFILL_TOKENS and size * n <= PADDING * (real + n) + 32:
            groups[-1].append(row)
            real += n
        else:
            groups.append([row])
            real = n
    return groups
