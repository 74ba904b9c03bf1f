"""From a parsed tool call to the message the model reads: what chat and evaluations share.

The content of the ipython message is the tool's text; code for the interpreter answers in the documented form,
``completed`` or ``failed`` and then what was printed (`text.chat.tool_output`). A failure is told to the model too.
"""

from __future__ import annotations

from ..errors import ToolError
from ..text.chat import CODE_INTERPRETER, tool_output
from ..text.toolcall import ToolCall
from ..tools import call as call_tool


def run_call(call: ToolCall) -> tuple[str, bool]:
    """(content for the model, whether it worked). Only what is in `herd.tools` runs, code only in its sandbox."""
    code = call.name == CODE_INTERPRETER
    try:
        text = call_tool(call.name, call.arguments)
    except ToolError as error:
        return (tool_output(ok=False, stderr=str(error)) if code else f"error: {error}"), False
    return (tool_output(ok=True, stdout=text) if code else text), True
