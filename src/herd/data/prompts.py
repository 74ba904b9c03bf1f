"""Short system prompts of generated dialogs, and the code that the interpreter runs for each tool.

The documented Llama 3.1 tool prompt spends about 150 tokens per tool on instructions and schemas before a
question is asked. A model of a few million parameters with a context of a few hundred tokens learns the same
from one line that names the tools and the format of the call, so the dialogs have that line instead. The
documented prompt of the builtin format is short already: ``Environment: ipython``.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..tools import CUSTOM_TOOLS

TOOL_NAMES = tuple(CUSTOM_TOOLS)

# The code of a function call in the builtin format. Operands are in the question's order, and literals are
# written so that the tokenizer splits them as in the question.
_DATES = "from datetime import *\n"
CODE = {
    "calculator": "print({expression})",
    "add_days": _DATES + 'print(date.fromisoformat("{date}") + timedelta({days}))',
    "days_between": _DATES + 'print(abs(date.fromisoformat("{start}") - date.fromisoformat("{end}")).days)',
    "weekday": _DATES + 'print(date.fromisoformat("{date}").strftime("%A"))',
    "reverse": 'print("{text}"[::-1])',
    "upper": 'print("{text}".upper())',
    "count_letter": 'print("{text}".count("{letter}"))',
}


def system_prompt(tool_call_format: str, names: Sequence[str] = TOOL_NAMES) -> str:
    """Return the short system message for the tools ``names`` in a format (json, builtin, function).

    The builtin format always has the interpreter, and ``wolfram_alpha`` unless ``names`` is empty.
    """
    if tool_call_format == "builtin":
        return "Environment: ipython\nTools: wolfram_alpha" if names else "Environment: ipython"
    return ("Tools as JSON: " if tool_call_format == "json" else "Tools as <function>: ") + ", ".join(names)
