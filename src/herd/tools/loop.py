"""The loop between a model and its tools: run the calls of a reply and show the results, until an answer.

The caller generates the replies, so the same loop serves a streamed chat, evaluations that answer a batch of
dialogs in lockstep, and tests with fixed replies. The error of a failed call goes to the model as text,
because the model may correct the call in its next reply.
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
"""A function that runs a call.

Returns (text for the model, whether the tool worked), as `execute_call` does.
"""


@dataclass(frozen=True)
class ToolResult:
    """The result of a call.

    ``content`` is the tool's text, or the reason of the failure if ``ok`` is False.
    """

    call: ToolCall
    content: str
    ok: bool


@dataclass
class ToolLoop:
    """A dialog that a model and its tools continue in turns.

    While `waiting`, `add` the model's next reply and iterate over `run_calls`. Both append to ``messages``.
    With ``execute`` None, no calls are run, and the first reply ends the loop.
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
        """Whether the model's reply is next."""
        return (self.rounds == 0 or bool(self._calls)) and self.rounds < self.max_rounds

    @property
    def exhausted(self) -> bool:
        """Whether the model has called tools in all of its ``max_rounds`` replies, without an answer."""
        return bool(self._calls) and self.rounds >= self.max_rounds


def execute_call(call: ToolCall, tools: Mapping[str, Callable[..., str]] = TOOLS) -> tuple[str, bool]:
    """Run a call. Return (text for the model, whether the tool worked).

    The result of the code interpreter has Meta's documented form: ``completed`` or ``failed``, then the
    output.
    """
    is_code = call.name == CODE_INTERPRETER
    try:
        text = call_tool(call.name, call.arguments, tools)
    except ToolError as error:
        return (tool_output(ok=False, stderr=str(error)) if is_code else f"error: {error}"), False
    return (tool_output(ok=True, stdout=text) if is_code else text), True
