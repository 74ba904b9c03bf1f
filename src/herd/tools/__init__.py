"""What a model may call: a calculator, dates, strings, Python in a sandbox, and the loop between model and tools.

`call(name, arguments)` runs a tool by name; `TOOLS` describes all of them; `run_tool_loop` alternates with a model.
"""

from ..errors import ToolError
from .arithmetic import calculator
from .dates import add_days, days_between, weekday
from .loop import TooManyRounds, answer_call, run_tool_loop
from .registry import BUILTIN_TOOLS, CUSTOM_TOOLS, TOOLS, Tool, call
from .sandbox import Sandbox, SandboxResult, SandboxWarning, run_python
from .strings import count_letter, reverse, upper

__all__ = [
    "BUILTIN_TOOLS",
    "CUSTOM_TOOLS",
    "TOOLS",
    "Sandbox",
    "SandboxResult",
    "SandboxWarning",
    "TooManyRounds",
    "Tool",
    "ToolError",
    "add_days",
    "answer_call",
    "calculator",
    "call",
    "count_letter",
    "days_between",
    "reverse",
    "run_python",
    "run_tool_loop",
    "upper",
    "weekday",
]
