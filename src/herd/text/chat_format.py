"""The interface of chat formats: dialogs become token ids, and a model's answer becomes content and calls.

A format belongs to a tokenizer: ``tokenizer.chat``. Two classes implement it, `llama3_chat.Llama3Chat` and
`template_chat.TemplateChat`.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .answers import AnswerParser
    from .tokenizer import Tokenizer

Tools = Sequence[str | Mapping[str, Any]]
"""Names of builtin tools, and JSON schemas (``name, description, parameters``), bare or in OpenAI's form."""


@dataclass(frozen=True)
class Span:
    """The tokens ``ids[start:end]`` of a message, with its header and ending if the format knows them.

    ``message`` is its index in the dialog, or None for a message that the renderer added (descriptions of
    tools, or a system message with only the environment or date).
    """

    role: str
    start: int
    end: int
    message: int | None


@dataclass
class Rendered:
    """Token ids and a mask, both of length T. The mask is True for what an assistant writes."""

    ids: list[int]
    mask: list[bool]
    spans: list[Span] = field(default_factory=list)

    def add(
        self, role: str, message: int | None, header: list[int], body: list[int], *, trained: bool
    ) -> None:
        """Append a message."""
        start = len(self.ids)
        self.ids += header + body
        self.mask += [False] * len(header) + [trained] * len(body)
        self.spans.append(Span(role, start, len(self.ids), message))


class ChatFormat(Protocol):
    """The way in which a model's dialogs are written.

    ``stop_ids`` end an answer. ``tool_call_formats`` are the ways in which calls can be written, the usual
    one first.
    """

    @property
    def name(self) -> str: ...

    @property
    def supports_tools(self) -> bool: ...

    @property
    def tool_call_formats(self) -> tuple[str, ...]: ...

    @property
    def stop_ids(self) -> frozenset[int]: ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Tools | None = None,
        tool_call_format: str | None = None,
        generation_prompt: bool = False,
        date: str | datetime.date | None = None,
    ) -> Rendered:
        """Return the token ids and the loss mask of a dialog.

        ``messages``: ``{"role": system|developer|user|assistant|ipython|tool, "content": …}``. A content is
        text or a list of ``{"type": "text", "text": …}``. A tool's content may be any JSON value, an
        assistant's may be None. An assistant's message may have ``"tool_calls": [{"name", "arguments":
        dict}]``, or OpenAI's nesting under ``"function"``. ``tool_call_format`` None is the usual one of the
        format. ``date``: the text or date for "today". With ``generation_prompt`` the beginning of the
        assistant's next message is added.

        Raises `ChatError` for what the format cannot express and `TokenizerError` for text that is not
        Unicode.
        """
        ...

    def parser(self, *, tools: bool | Collection[str] = False) -> AnswerParser:
        """Return a parser of one answer.

        ``tools`` are the names of the tools that were offered, or whether any were. Without tools, text that
        looks like a call is text.
        """
        ...


def render(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, **options: Any) -> Rendered:
    """Return a dialog's token ids and loss mask in the tokenizer's chat format (`ChatFormat.render`).

    Raises `ChatError` if the tokenizer has none.
    """
    return tokenizer.require_chat().render(messages, **options)
