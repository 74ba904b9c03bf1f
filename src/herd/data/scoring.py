"""Is a produced dialog right? The call must evaluate to the expected value *and* the answer must state it.

Both halves are needed: a model that guesses the number without calling, or calls well and then miscopies, has not used
its tool. Numbers are compared as numbers that stand alone ("816" is not in "8160" nor in "2816"), written with or
without thousands separators; dates and words as whole words; programs by running their hidden check in the sandbox.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ToolError
from ..text.chat import CODE_INTERPRETER
from ..text.fenced import python_program
from ..tools import SandboxResult, call_tool, run_python

if TYPE_CHECKING:
    from .dialogs import Dialog

_DIGIT = re.compile(r"\d")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:[,.'’_\u00a0\u202f]\d{3})+(?![\d]|[.,]\d)")
_SEPARATOR = re.compile(r"[,.'’_\u00a0\u202f]")
_STDOUT = re.compile(r"^completed\n\[stdout\](.*)\[/stdout\]$", re.DOTALL)
_SPACELESS = ("THAI", "DEVANAGARI")  # scripts where a word boundary in the sense of \b says little


@dataclass(frozen=True)
class DialogVerdict:
    """``call_ok``: the call evaluates to the expected value (or none was made where none is wanted); ``answer_ok``:
    the last message says it; ``correct``: both. ``why`` names what is wrong, for people."""

    call_ok: bool
    answer_ok: bool
    why: str = ""

    @property
    def correct(self) -> bool:
        return self.call_ok and self.answer_ok


def states(text: str, answer: str) -> bool:
    """Whether ``text`` contains ``answer`` standing alone; digits of every script count, letters in their case."""
    text = _DIGIT.sub(lambda match: str(unicodedata.digit(match[0])), text)
    if re.fullmatch(r"-?\d+", answer):
        plain = _GROUPED.sub(lambda match: _SEPARATOR.sub("", match[0]), text)
        # Neither inside a longer number, nor part of a decimal or a date, nor with its sign cut off.
        pattern = rf"(?<![\d-])(?<!\d[.,])(?<!\w){re.escape(answer)}(?![\d]|[.,]\d|-\d)"
        return any(re.search(pattern, one) for one in (text, plain))
    if any(unicodedata.name(c, "").startswith(_SPACELESS) for c in answer):
        return answer in text
    before = r"(?<!\w)" if answer[:1].isalnum() else ""
    after = r"(?!\w)" if answer[-1:].isalnum() else ""
    return re.search(before + re.escape(answer) + after, text) is not None


def score(
    dialog: Dialog, produced: Sequence[Mapping[str, Any]], run: Callable[[str], SandboxResult] = run_python
) -> DialogVerdict:
    """Judge ``produced``, the messages that followed ``dialog.prompt``: assistant with calls, ipython, assistant.

    The first call counts. It is evaluated here, whatever the ipython message claims; only code of the interpreter is
    judged by what its ipython message says it printed, and run where there is none. ``run`` executes programs (one
    sandbox for many: ``Sandbox().run``).
    """
    calls = [call for message in produced for call in message.get("tool_calls") or ()]
    last = produced[-1] if produced else {}
    content = (
        str(last.get("content") or "")
        if last.get("role") == "assistant" and not last.get("tool_calls")
        else ""
    )
    if dialog.check:
        passed = not calls and _passes(content, dialog.check, run)
        return DialogVerdict(not calls, passed, "" if passed else "the program fails its check")
    if not dialog.call:
        said = states(content.casefold(), dialog.answer.casefold())
        why = "a call where none was wanted" if calls else "" if said else f"does not say {dialog.answer!r}"
        return DialogVerdict(not calls, said, why)
    value, why = _value(calls, produced, run) if calls else (None, "no call")
    call_ok = value == dialog.result
    if not call_ok and not why:
        why = f"the call gives {value!r}, not {dialog.result!r}"
    # A weekday may be written with a capital or without; of capitals and reversed words the case is the point.
    fold = str.casefold if dialog.kind == "weekday" else str
    answer_ok = states(fold(content), fold(dialog.answer))
    if call_ok and not answer_ok:
        why = f"the answer does not say {dialog.answer!r}"
    return DialogVerdict(call_ok, answer_ok, why)


def _value(
    calls: Sequence[Mapping[str, Any]],
    produced: Sequence[Mapping[str, Any]],
    run: Callable[[str], SandboxResult],
) -> tuple[str | None, str]:
    """What the first call evaluates to, and why not."""
    first = calls[0].get("function", calls[0])
    name, arguments = first.get("name"), first.get("arguments")
    if name == CODE_INTERPRETER and isinstance(arguments, Mapping):
        return _printed(str(arguments.get("code", "")), produced, run), ""
    try:
        return call_tool(str(name), arguments), ""
    except ToolError as error:
        return None, str(error)


def _printed(
    code: str, produced: Sequence[Mapping[str, Any]], run: Callable[[str], SandboxResult]
) -> str | None:
    for message in produced:
        if message.get("role") in ("ipython", "tool"):
            found = _STDOUT.match(str(message.get("content", "")))
            return found[1].strip() if found else None
    outcome = run(code)
    return outcome.stdout.strip() if outcome.ok else None


def _passes(content: str, check: str, run: Callable[[str], SandboxResult]) -> bool:
    """Whether the code in ``content`` (fenced or bare) runs and meets its asserts."""
    outcome = run(f"{python_program(content)}\n\n{check}\nprint('met')\n")
    return outcome.ok and outcome.stdout.endswith("met\n")
