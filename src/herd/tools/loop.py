"""The loop between a model and its tools: reply, run the calls, show the results, until an answer comes.

The caller generates the replies, so the same loop serves a streamed chat, evaluations that answer a batch of
dialogs in lockstep, and tests with a script. A call that fails is told to the model as text, because it may
do better in the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ToolError
from ..text.llama3_chat import tool_output
from ..text.messages import CODE_INTERPRETER
from ..text.toolcall import Parsed, ToolCall
from .registry import TOOLS, call_tool

Execute = Callable[[ToolCall], tuple[str, bool]]
"""Runs a call: returns the text that the model reads, and whether the tool worked. See `execute_call`."""


@dataclass(frozen=True)
class ToolResult:
    """The ``content`` that a tool returned for a call, or, where ``ok`` is False, why it failed."""

    call: ToolCall
    content: str
    ok: bool


@dataclass
class ToolLoop:
    """A dialog that a model and its tools take turns to continue.

    While `waiting`, `add` the model's next reply and iterate over `run_calls`; both append to ``messages``.
    With ``execute`` None nothing is run, and the first reply ends the loop.
    """

    messages: list[dict[str, Any]]
    execute: Execute | None
    max_rounds: int
    rounds: int = 0
    _calls: list[ToolCall] = field(default_factory=list)

    def add(self, reply: Parsed, *, complete: bool = True) -> None:
        """Append the model's reply. The calls of a reply that is not complete are not run."""
        self.messages.append(reply.message())
        self.rounds += 1
        self._calls = list(reply.calls) if complete and self.execute else []

    def run_calls(self) -> Iterator[ToolResult]:
        """Run the calls of the last reply one after another."""
        for call in self._calls:
            assert self.execute is not None
            content, ok = self.execute(call)
            self.messages.append({"role": "ipython", "content": content})
            yield ToolResult(call, content, ok)

    @property
    def waiting(self) -> bool:
        """Whether the model is to reply next."""
        return (self.rounds == 0 or bool(self._calls)) and self.rounds < self.max_rounds

    @property
    def exhausted(self) -> bool:
        """Whether the model called tools in every one of ``max_rounds`` replies and never answered."""
        return bool(self._calls) and self.rounds >= self.max_rounds


def execute_call(call: ToolCall, tools: Mapping[str, Callable[..., str]] = TOOLS) -> tuple[str, bool]:
    """Run a call; return the text that the model reads, and whether the tool worked.

    The code interpreter answers in the documented form: ``completed`` or ``failed``, with what was printed.
    """
    is_code = call.name == CODE_INTERPRETER
    try:
        text = call_tool(call.name, call.arguments, tools)
    except ToolError as error:
        return (tool_output(ok=False, stderr=str(error)) if is_code else f"error: {error}"), False
    return (tool_output(ok=True, stdout=text) if is_code else text), True
