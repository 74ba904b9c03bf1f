"""What the chunks of OpenAI's chat completions and completions have in common."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, ClassVar

from .answer import LiveAnswer
from .events import AnswerUsage
from .respond import AnswerWriter, json_text, sse_data
from .wire import StreamOptions

DONE = b"data: [DONE]\n\n"


class ChunkWriter(AnswerWriter):
    """Writes an answer as an object with ``choices``, or as chunks of such objects.

    ``prefix`` begins the ids of the objects. ``kind`` is the name of whole ones and ``chunk_kind`` that of
    chunks. ``options`` say whether the last chunk, or every chunk, has the usage.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, options: StreamOptions | None) -> None:
        self._model, self._options = model, options or StreamOptions()
        self._created = int(time.time())

    def begin(self, answer: LiveAnswer) -> bytes:
        self._head = self._frame(answer, self.chunk_kind)
        self._beginning = json_text(self._head)[:-1] + ',"choices":'
        return super().begin(answer)

    def end(self, answer: LiveAnswer) -> bytes:
        """Return the usage if it was asked for, the warnings, and the end of the stream."""
        more: dict[str, Any] = {}
        if self._options.include_usage:
            more = {"usage": _usage(answer.usage), "timings": answer.usage.timings}
        remarks = answer.remarks
        if answer.warnings or (remarks and self._options.include_usage):
            more["herd"] = remarks
        last = sse_data(self._head | {"choices": []} | more) if more else b""
        return last + DONE

    def _whole(self, choices: list[dict[str, Any]], answer: LiveAnswer) -> dict[str, Any]:
        """Return a body that is not streamed."""
        body = self._frame(answer, self.kind) | {"choices": choices}
        body |= {"usage": _usage(answer.usage), "timings": answer.usage.timings}
        return body | ({"herd": answer.remarks} if answer.remarks else {})

    def _frame(self, answer: LiveAnswer, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{answer.id}",
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": answer.served.fingerprint,
        }

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        """Return a chunk with one choice, and as in vLLM with the usage of that choice so far, if wanted."""
        usage = ""
        if self._options.continuous_usage_stats:
            n_tokens = self._answer.tokens.get(choice["index"], 0)
            usage = f',"usage":{json_text(_usage(replace(self._answer.usage, completion_tokens=n_tokens)))}'
        return f"data: {self._beginning}{json_text([choice])}{usage}}}\n\n".encode()


def _usage(usage: AnswerUsage) -> dict[str, Any]:
    """Return the usage as OpenAI's API has it. The prompt's tokens include the cached ones."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
