"""Tools that a model may call (calculator, dates, strings, sandboxed Python), and the loop that runs them.

`call_tool(name, arguments)` runs a tool by name, `TOOLS` describes all of them, and `ToolLoop` alternates
between a model and its tools.
"""

from .loop import ToolLoop, ToolResult, execute_call
from .registry import CUSTOM_TOOLS, TOOLS, Tool, call_tool
from .sandbox import Sandbox, SandboxResult, run_python

__all__ = ["CUSTOM_TOOLS", "TOOLS", "Sandbox", "SandboxResult", "Tool", "ToolLoop", "ToolResult", "call_tool",
           "execute_call", "run_python"]  # fmt: skip
