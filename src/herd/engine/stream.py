"""A request on its way: the `Stream` its caller reads, and the `Row` the engine works on."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import EngineError
from ..kernels.page_layout import PAGE
from ..text.tokenizer import Tokenizer
from .cache import Cached
from .detokenize import TextStream
from .request import Completion, Delta, FinishReason, Request, Speculated, TokenLogprob
from .rules import Rules

if TYPE_CHECKING:
    from .engine import Engine


HOPED = 0.8
"""What is thought of guesses before any was made."""
LEARNT = 0.1
"""How much the last guess counts among all before it."""


class Stream(Iterator[Delta]):
    """The deltas of one request. Iterating drives the engine; `cancel` ends the answer and frees its pages.

    Raises EngineError, after the deltas that came before, where this request alone could not go on.
    ``shared_tokens``: how many of the prompt's tokens were in the cache already when it began.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self.request = engine, request
        self._deltas: deque[Delta] = deque()
        self._error: EngineError | None = None
        self.done = False
        self.shared_tokens = 0

    def __next__(self) -> Delta:
        while not self._deltas:
            if self._error is not None:
                raise self._error
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
            logprobs=None
            if self.request.sampling.logprobs is None
            else [p for d in deltas for p in d.logprobs],
            prompt_tokens=len(self.request.prompt_ids),
            shared_tokens=self.shared_tokens,
            speculated=last.speculated,
        )

    def push(self, delta: Delta) -> None:
        """What the engine adds."""
        self._deltas.append(delta)
        self.done = delta.finish_reason is not None

    def fail(self, error: EngineError) -> None:
        """The engine gives this answer up."""
        self._error, self.done = error, True


class Row:
    """A request in the engine: its tokens so far, and how many of them the cache has seen (``cached.length``).

    ``rules`` bend its logits; None where nothing does. ``speculated`` counts guesses; None where nobody guesses.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer | None,
        stop_ids: frozenset[int],
        context: int,
        rules: Rules | None = None,
        speculated: Speculated | None = None,
    ) -> None:
        request, sampling = stream.request, stream.request.sampling
        self.number = -1  # in the order of submission
        self.stream, self.request, self.sampling = stream, request, sampling
        self.rules, self.speculated = rules, speculated
        self.stop_ids = stop_ids | request.stop_ids
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self.text = None if tokenizer is None else TextStream(tokenizer, sampling.stop)
        self.tokens = list(request.prompt_ids)
        self.digests: list[bytes] = []  # of the prompt's full pages, once known
        self.cached: Cached | None = None  # None while it waits
        self.n_new = 0
        self.acceptance = HOPED  # how likely a guess stays, as the last ones fared
        room = context - len(request.prompt_ids)
        self.limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        self.limit_reason: FinishReason = "length" if self.limit == sampling.max_tokens else "context"

    @property
    def soon(self) -> int:
        """Tokens it will hold a page from now; the last token of an answer is never fed back."""
        return min(len(self.tokens) + PAGE, len(self.request.prompt_ids) + self.limit - 1)

    def take(self, token: int, lps: tuple[TokenLogprob, ...]) -> bool:
        """Account for a sampled token and push its delta; True if the answer has ended."""
        if token in self.stop_ids:
            self.end("stop", stop_id=token)
            return True
        self.n_new += 1
        self.tokens.append(token)
        if self.rules is not None:
            self.rules.push((token,))
        piece = "" if self.text is None else self.text.feed(token)
        reason: FinishReason | None = None
        if (self.text is not None and self.text.stopped) or (self.rules is not None and self.rules.complete):
            reason = "stop"
        elif self.n_new == self.limit:
            reason = self.limit_reason
        if reason and self.text is not None:
            piece += self.text.finish()
            if self.text.stopped:  # the end of a broken character may complete a stop string
                reason = "stop"
        self.stream.push(Delta(piece, (token,), reason, None, lps, self.speculated if reason else None))
        return reason is not None

    def count(self, guesses: Speculated) -> None:
        """Account for guesses."""
        self.speculated = guesses if self.speculated is None else self.speculated + guesses
        self.acceptance += LEARNT * (guesses.kept - guesses.judged * self.acceptance)

    def hope(self) -> None:
        """No guess was worth making now; sooner or later one may be."""
        self.acceptance += LEARNT / 10 * (HOPED - self.acceptance)

    def end(self, reason: FinishReason, stop_id: int | None = None) -> None:
        """The last delta, without a token."""
        text = "" if self.text is None else self.text.finish()
        self.stream.push(Delta(text, (), reason, stop_id, speculated=self.speculated))
