"""A request in progress: the `ResponseStream` for its caller, and the `Sequence` for the engine."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator

from torch import Tensor

from ..errors import EngineError
from ..kernels.page_layout import PAGE
from ..text.tokenizer import Tokenizer
from .cache import Cached
from .constraint import Guide
from .detokenize import TextStream
from .logits import LogitsProcessor
from .request import Completion, Delta, FinishReason, Request, Speculated, TokenLogprob, Usage

INITIAL_ACCEPTANCE_RATE = 0.8
"""Acceptance rate of a sequence without any verified draft token: high enough that drafting is tried."""
ACCEPTANCE_UPDATE = 0.1
"""Weight of the latest draft token in the running acceptance rate."""


class ResponseStream(Iterator[Delta]):
    """The deltas of one request. Reading runs ``step`` until one arrives.

    `cancel` ends the answer and frees its pages. If this request fails, reading raises EngineError after the
    deltas that came before. ``shared_tokens`` is the number of prompt tokens that were in the cache when the
    request began.
    """

    def __init__(
        self, request: Request, step: Callable[[], bool], cancel: Callable[[ResponseStream], None]
    ) -> None:
        self.request, self._step, self._cancel = request, step, cancel
        self.prompt_ids = tuple(request.prompt_ids)  # the caller's list may change later
        self._deltas: deque[Delta] = deque()
        self._error: EngineError | None = None
        self.done = False
        self.shared_tokens = 0
        self.prompt_logprobs: list[TokenLogprob] | None = None
        """Those of the prompt but for its first token, if the request asks for them. Set before any delta."""
        self.embedding: list[float] | None = None
        """The mean of the prompt's last hidden states, of length 1, if the request ``embeds``."""
        self._n_read = 0
        self._submitted = time.perf_counter()
        self._began: float | None = None
        self._first: float | None = None
        self._ended: float | None = None

    def __next__(self) -> Delta:
        while not self._readable():
            self._wait()
        return self._read()

    @property
    def began(self) -> bool:
        """Whether the request has left the queue."""
        return self._began is not None

    @property
    def usage(self) -> Usage:
        """The tokens and times of this request up to now."""
        now = self._ended or time.perf_counter()
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.shared_tokens,
            completion_tokens=self._n_read,
            queue_seconds=(self._began or now) - self._submitted,
            first_token_seconds=None if self._first is None else self._first - self._submitted,
            total_seconds=now - self._submitted,
        )

    def cancel(self) -> None:
        """End this answer now. Its last delta says "cancelled". Does nothing if it has already ended."""
        self._cancel(self)

    def completion(self) -> Completion:
        """Run to the end and return the part of the answer that has not been read from the stream yet."""
        deltas = list(self)
        if not deltas:
            raise EngineError("this answer was already read from its stream to the end")
        last = deltas[-1]
        assert last.finish_reason is not None
        logprobs = [p for d in deltas for p in d.logprobs]
        return Completion(
            ids=[i for d in deltas for i in d.token_ids],
            text="".join(d.text for d in deltas),
            finish_reason=last.finish_reason,
            stop_id=last.stop_id,
            logprobs=None if self.request.sampling.logprobs is None else logprobs,
            prompt_tokens=len(self.prompt_ids),
            shared_tokens=self.shared_tokens,
            speculated=last.speculated,
            prompt_logprobs=self.prompt_logprobs,
        )

    def begin(self, shared_tokens: int) -> None:
        """Note that the request leaves the queue. Later calls, after it freed its pages, have no effect."""
        if self._began is None:
            self._began, self.shared_tokens = time.perf_counter(), shared_tokens

    def push(self, delta: Delta) -> None:
        """Add a delta of the engine."""
        if self._first is None and (delta.token_ids or delta.stop_id is not None):
            self._first = time.perf_counter()
        if delta.finish_reason is not None:
            self._ended = time.perf_counter()
        self._deltas.append(delta)
        self.done = self._ended is not None  # after the delta: readers look at it first

    def fail(self, error: EngineError) -> None:
        """End this answer with an error, raised when it is read to this point."""
        self._error, self._ended = error, time.perf_counter()
        self.done = True

    def _readable(self) -> bool:
        """Return whether reading needs no waiting."""
        return self.done or bool(self._deltas)

    def _read(self) -> Delta:
        done = self.done  # before the deltas: what arrives after this line is read next time
        if not self._deltas and done:
            raise self._error or StopIteration
        delta = self._deltas.popleft()
        self._n_read += len(delta.token_ids) + (delta.stop_id is not None)
        return delta

    def _wait(self) -> None:
        if not self._step():
            raise EngineError("this answer ended without a result when its engine failed earlier")


class Sequence:
    """A request in the engine: its tokens so far, and its pages in the cache.

    ``speculated`` counts draft tokens. It is None in an engine without a draft.
    """

    def __init__(
        self,
        stream: ResponseStream,
        tokenizer: Tokenizer | None,
        stop_ids: frozenset[int],
        context: int,
        guide: Guide | None = None,
        speculated: Speculated | None = None,
    ) -> None:
        request, sampling = stream.request, stream.request.sampling
        self.number = -1  # in the order of submission
        self.stream, self.request, self.sampling = stream, request, sampling
        self.logits_processor = LogitsProcessor(sampling, stream.prompt_ids, guide)
        self.speculated = speculated
        self.stop_ids = stop_ids | request.stop_ids
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self.text = TextStream(tokenizer, sampling.stop)
        self.tokens = list(stream.prompt_ids)
        self.digests: list[bytes] = []  # of the prompt's full pages, once computed
        self.in_cache: Cached | None = None  # None while it waits
        self.n_new = 0  # tokens of the answer so far
        self.acceptance_rate = INITIAL_ACCEPTANCE_RATE
        self.may_draft = True
        self.prompt_logprobs: list[TokenLogprob] = []
        self.hidden_sum_D: Tensor | None = None
        self.owner, self.tenant = request.owner, request.tenant
        self.n_prompt = len(self.tokens)
        room = context - self.n_prompt
        self.limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        self.limit_reason: FinishReason = "length" if self.limit == sampling.max_tokens else "context"

    @property
    def cached(self) -> Cached:
        """Its pages in the cache. Only active sequences have them."""
        assert self.in_cache is not None
        return self.in_cache

    @property
    def n_shareable(self) -> int:
        """Number of its first tokens that may come from the cache. Logits need tokens that are computed."""
        return 0 if self.lacks_prompt_logprobs or self.request.embeds else len(self.tokens) - 1

    @property
    def soon(self) -> int:
        """Its length in the cache after one more page of tokens. An answer's last token is never fed back."""
        return min(len(self.tokens) + PAGE, self.n_prompt + self.limit - 1)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether the log-probabilities of its prompt are wanted and not yet complete."""
        return self.request.prompt_logprobs is not None and self.stream.prompt_logprobs is None

    def begin(self, shared_tokens: int) -> None:
        """Note that the sequence was admitted, with ``shared_tokens`` tokens from the cache."""
        self.stream.begin(shared_tokens)
        self.prompt_logprobs.clear()
        self.hidden_sum_D = None

    def take_prompt_logprobs(self, logprobs: list[TokenLogprob]) -> None:
        """Add log-probabilities of the next tokens of the prompt."""
        self.prompt_logprobs += logprobs
        if len(self.prompt_logprobs) == self.n_prompt - 1:
            self.stream.prompt_logprobs = list(self.prompt_logprobs)

    def take_hidden(self, hidden_ND: Tensor) -> None:
        """Add the hidden states (N, D) of the next tokens of a prompt to embed. The last ones end it."""
        sum_D = hidden_ND.float().sum(0)
        self.hidden_sum_D = sum_D if self.hidden_sum_D is None else self.hidden_sum_D + sum_D
        if self.cached.length < self.n_prompt:
            return
        norm = self.hidden_sum_D.norm()
        if not norm.isfinite():
            self.fail(EngineError("the hidden states of this text are not finite: the weights are damaged"))
            return
        self.stream.embedding = (self.hidden_sum_D / norm.clamp_min(1e-12)).tolist()
        self.end("stop")

    def fail(self, error: EngineError) -> None:
        """End its answer with an error."""
        self.stream.fail(error)

    def take(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> bool:
        """Add a sampled token, push its delta, and return whether the answer has ended."""
        if token in self.stop_ids:
            self.end("stop", stop_id=token)
            return True
        self.n_new += 1
        self.tokens.append(token)
        self.logits_processor.push((token,))
        piece = self.text.feed(token)
        reason: FinishReason | None = None
        if self.text.stopped or self.logits_processor.complete:
            reason = "stop"
        elif self.n_new == self.limit:
            reason = self.limit_reason
        if reason:
            piece += self.text.finish()
            if self.text.stopped:  # the end of a broken character may complete a stop string
                reason = "stop"
        speculated = self.speculated if reason else None
        self.stream.push(Delta(piece, (token,), reason, None, logprobs, speculated, self.text.stop_string))
        return reason is not None

    def record_draft(self, counts: Speculated) -> None:
        """Count draft tokens, and update the acceptance rate with the verified ones."""
        self.speculated = counts if self.speculated is None else self.speculated + counts
        self.acceptance_rate += ACCEPTANCE_UPDATE * (counts.accepted - counts.verified * self.acceptance_rate)

    def forget_acceptance_rate(self) -> None:
        """Move the acceptance rate towards its initial value, so that drafting is tried again."""
        self.acceptance_rate += ACCEPTANCE_UPDATE / 10 * (INITIAL_ACCEPTANCE_RATE - self.acceptance_rate)

    def end(self, reason: FinishReason, stop_id: int | None = None) -> None:
        """Push the last delta, without a token."""
        self.stream.push(Delta(self.text.finish(), (), reason, stop_id, speculated=self.speculated))
