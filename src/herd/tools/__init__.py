"""What a model may call: a calculator, dates, strings, Python in a sandbox, and the loop between model and tools.

`call_tool(name, arguments)` runs a tool by name, `TOOLS` describes all of them, and `ToolLoop` alternates between
a model and its tools.
"""

from ..errors import ToolError
from .arithmetic import calculator
from .dates import add_days, days_between, weekday
from .loop import ToolLoop, ToolResult, execute_call
from .registry import BUILTIN_TOOLS, CUSTOM_TOOLS, TOOLS, Tool, call_tool
from .sandbox import Sandbox, SandboxResult, SandboxWarning, run_python
from .strings import count_letter, reverse, upper

__all__ = [
    "BUILTIN_TOOLS",
    "CUSTOM_TOOLS",
    "TOOLS",
    "Sandbox",
    "SandboxResult",
    "SandboxWarning",
    "Tool",
    "ToolError",
    "ToolLoop",
    "ToolResult",
    "add_days",
    "calculator",
    "call_tool",
    "count_letter",
    "days_between",
    "execute_call",
    "reverse",
    "run_python",
    "upper",
    "weekday",
]
