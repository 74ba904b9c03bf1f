"""Embeddings by the engine of this process.

Each text is a request of the key to the engine, a few at a time. So keys take turns, long texts are computed
in pieces, and running answers go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine.request import Request, Sampling
from .events import AnswerEnd, AnswerUsage, AnswerVector, Piece
from .problems import Overloaded
from .source import AnswerSource

if TYPE_CHECKING:
    from ..engine.loop import EngineLoop, Generation

AT_ONCE = 32
"""Texts of one request that are in the engine or wait for it."""
_NO_ANSWER = Sampling(max_tokens=1)


@dataclass(frozen=True)
class EmbeddingPrompt:
    """The token ids of the texts of one request, with the ``adapter`` to use ("": none)."""

    inputs: Sequence[Sequence[int]]
    adapter: str = ""
    sampling: Sampling = _NO_ANSWER

    @property
    def n(self) -> int:
        return len(self.inputs)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.inputs))

    def max_completion_tokens(self, context: int) -> int:
        """Return 0, as nothing is generated."""
        return 0


class EmbeddingSource(AnswerSource):
    """The embeddings of the texts of one request, in their order."""

    def __init__(self, loop: EngineLoop, prompt: EmbeddingPrompt, tenant: str, owner: str) -> None:
        self._loop, self._prompt = loop, prompt
        self._options: dict[str, Any] = {
            "tenant": tenant, "owner": owner, "adapter": prompt.adapter, "embeds": True
        }  # fmt: skip
        self._open: deque[Generation] = deque()
        self._is_cancelled = False
        self._start, self._queue_seconds = time.monotonic(), 0.0
        self._end: float | None = None

    async def pieces(self) -> AsyncIterator[Piece]:
        prompt, n_read = self._prompt, 0
        for ids in (*prompt.inputs, None):
            if ids is not None:
                self._open += self._loop.submit(Request(ids, _NO_ANSWER, **self._options))
            while self._open and (ids is None or len(self._open) >= AT_ONCE):
                generation = self._open[0]
                async for delta in generation:
                    if delta.finish_reason == "cancelled" or self._is_cancelled:
                        raise Overloaded("the server is stopping, and this answer is not complete")
                assert generation.embedding is not None
                self._open.popleft()
                self._queue_seconds = self._queue_seconds or generation.usage.queue_seconds
                vector = AnswerVector(n_read, "", values=generation.embedding)
                yield Piece(n_read, 0, [vector, AnswerEnd(n_read, "stop")])
                n_read += 1
        self._end = time.monotonic()

    @property
    def usage(self) -> AnswerUsage:
        seconds = (self._end or time.monotonic()) - self._start
        return AnswerUsage(self._prompt.n_tokens, 0, 0, self._queue_seconds, None, seconds)

    def cancel(self) -> None:
        self._is_cancelled = True
        for generation in list(self._open):
            if not generation.done:
                generation.cancel()
