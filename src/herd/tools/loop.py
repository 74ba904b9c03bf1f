"""The loop between a model and its tools: generate, run what was called, show the results, until an answer comes.

The generator is handed in, so that the same few lines serve the command line, evaluations and tests with a scripted
model. A call that fails is told to the model as text, for it may do better; only a model that never stops calling is an
error of the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ToolError
from ..text.chat import CODE_INTERPRETER, tool_output
from ..text.toolcall import parse
from .registry import TOOLS, call

Message = dict[str, Any]


class TooManyRounds(ToolError):
    """The model called tools in every round; ``messages`` is the dialog so far."""

    def __init__(self, rounds: int, messages: list[Message]) -> None:
        super().__init__(f"tools: still calling after {rounds} rounds; allow more, or ask something simpler")
        self.messages = messages


def answer_call(
    name: str, arguments: Mapping[str, Any], tools: Mapping[str, Callable[..., str]] = TOOLS
) -> tuple[str, bool]:
    """(what the model reads, whether the tool worked).

    A tool's text comes as it is; the code interpreter answers in the documented form, ``completed`` or ``failed`` with
    what was printed; a failure says why.
    """
    code = name == CODE_INTERPRETER
    try:
        text = call(name, arguments, tools)
    except ToolError as error:
        return (tool_output(ok=False, stderr=str(error)) if code else f"error: {error}"), False
    return (tool_output(ok=True, stdout=text) if code else text), True


def run_tool_loop(
    generate: Callable[[list[Message]], str],
    messages: Sequence[Message],
    tools: Mapping[str, Callable[..., str]] = TOOLS,
    max_rounds: int = 4,
) -> list[Message]:
    """The dialog continued up to the model's answer; the given messages are not changed.

    ``generate(messages)`` gives the text of the assistant's next message. ``tools``: name to function, called with
    named arguments. Raises TooManyRounds after ``max_rounds`` messages that all call tools.
    """
    dialog = list(messages)
    for _ in range(max_rounds):
        parsed = parse(generate(list(dialog)))
        message: Message = {"role": "assistant", "content": parsed.content}
        if parsed.calls:
            message["tool_calls"] = [
                {"name": c.name, "arguments": c.arguments, "tool_call_format": c.tool_call_format}
                for c in parsed.calls
            ]
        dialog.append(message)
        if not parsed.calls:
            return dialog
        dialog += [
            {"role": "ipython", "content": answer_call(c.name, c.arguments, tools)[0]} for c in parsed.calls
        ]
    raise TooManyRounds(max_rounds, dialog)
