"""All tools by name, with the JSON schemas for the prompt and the checks of arguments.

A schema has the form of Llama 3.1's JSON tool calling (``{"type": "function", "function": {"name",
"description", "parameters"}}``). Calls, ``call_tool(name, arguments)``, are untrusted input. An unknown name,
or a missing, extra or mistyped argument, raises a `ToolError` with one line, and the tool loop shows this
line to the model.

``wolfram_alpha`` and ``code_interpreter`` are Llama 3.1's built-in tools. Here the first computes arithmetic
on this machine and the second runs Python in the sandbox.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from ..errors import ToolError
from ..text.fenced import fenced_blocks
from .arithmetic import calculator
from .dates import add_days, days_between, weekday
from .sandbox import run_python
from .strings import count_letter, reverse, upper

JSON_TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
_PYTHON_TYPES = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,)}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call, described by its signature and the first line of its docstring."""

    function: Callable[..., str]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def parameters(self) -> dict[str, str]:
        """The JSON type of every argument. All arguments are required."""
        hints = get_type_hints(self.function)
        return {name: JSON_TYPES[hints[name]] for name in inspect.signature(self.function).parameters}

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema for the prompt."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        description = (inspect.getdoc(self.function) or "").split("\n")[0]
        function = {"name": self.name, "description": description, "parameters": parameters}
        return {"type": "function", "function": function}

    def __call__(self, **arguments: Any) -> str:
        """Check the arguments and call the function.

        Raises `ToolError` if an argument is wrong or the call fails.
        """
        wanted = self.parameters
        missing, extra = sorted(wanted.keys() - arguments.keys()), sorted(arguments.keys() - wanted.keys())
        if missing or extra:
            problem = f"missing {missing}" if missing else f"unknown {extra}"
            raise ToolError(f"{self.name}: {problem}; the arguments are {list(wanted)}")
        for name, kind in wanted.items():
            value = arguments[name]
            if kind == "integer" and isinstance(value, float) and value.is_integer():
                arguments[name] = value = int(value)  # in JSON, 3.0 is an integer
            if not isinstance(value, _PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
                raise ToolError(f"{self.name}: {name}={value!r} is not of type {kind}")
        return self.function(**arguments)


def wolfram_alpha(query: str) -> str:
    """Compute arithmetic, in place of the Wolfram Alpha service."""
    return calculator(query)


def code_interpreter(code: str) -> str:
    """Run a Python program and give back what it printed."""
    if code.lstrip().startswith("```"):  # models often fence the program
        code = "\n".join(block.code for block in fenced_blocks(code))
    result = run_python(code)
    if not result.ok:
        last = result.stderr.strip().splitlines()[-1:] or [""]
        raise ToolError(": ".join(part for part in ("code_interpreter", result.reason, last[0]) if part))
    return result.stdout


CUSTOM_TOOLS: dict[str, Tool] = {
    f.__name__: Tool(f) for f in (calculator, add_days, days_between, weekday, reverse, upper, count_letter)
}
TOOLS = CUSTOM_TOOLS | {f.__name__: Tool(f) for f in (wolfram_alpha, code_interpreter)}


def call_tool(
    name: str, arguments: Mapping[str, Any], tools: Mapping[str, Callable[..., str]] = TOOLS
) -> str:
    """Call a tool by name. Raises `ToolError` if it is unknown, an argument is wrong, or the tool fails."""
    if name not in tools:
        raise ToolError(f"unknown tool {name!r}; the tools are {', '.join(sorted(tools))}")
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise ToolError(f"{name}: arguments {arguments!r} are not an object; give named arguments")
    return tools[name](**arguments)
