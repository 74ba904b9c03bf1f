"""Judge a dialog that a model produced: the call must give the expected value *and* the answer must state it.

Both are needed: a model that guesses the number without a call, or calls correctly and then miscopies, has
not used its tool. Numbers are compared as whole numbers ("816" is not in "8160" or "2816"), with or without
thousands separators, and dates and words as whole words. Programs are judged by running their hidden check in
the sandbox.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ToolError
from ..text.fenced import python_program
from ..text.messages import CODE_INTERPRETER
from ..tools import SandboxResult, call_tool, run_python

if TYPE_CHECKING:
    from .dialogs import Dialog

Messages = Sequence[Mapping[str, Any]]
Run = Callable[[str], SandboxResult]
_DIGIT = re.compile(r"\d")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:[,.'’_\u00a0\u202f]\d{3})+(?![\d]|[.,]\d)")
_SEPARATOR = re.compile(r"[,.'’_\u00a0\u202f]")
_STDOUT = re.compile(r"^completed\n\[stdout\](.*)\[/stdout\]$", re.DOTALL)
_SPACELESS = ("THAI", "DEVANAGARI")  # scripts where \b does not find word boundaries


@dataclass(frozen=True)
class DialogVerdict:
    """The judgement of a produced dialog.

    ``call_ok``: the call gives the expected value, or there is no call and none is needed. ``answer_ok``: the
    last message states the answer. ``why`` describes the failure, if there is one.
    """

    call_ok: bool
    answer_ok: bool
    why: str = ""

    @property
    def correct(self) -> bool:
        return self.call_ok and self.answer_ok


def states(text: str, answer: str) -> bool:
    """Return whether ``text`` contains ``answer`` as a whole word.

    Digits of every script are equal to ASCII digits. Upper and lower case are different.
    """
    text = _DIGIT.sub(lambda match: str(unicodedata.digit(match[0])), text)
    if re.fullmatch(r"-?\d+", answer):
        plain = _GROUPED.sub(lambda match: _SEPARATOR.sub("", match[0]), text)
        # Not inside a longer number, not part of a decimal or a date, and not without its sign.
        pattern = rf"(?<![\d-])(?<!\d[.,])(?<!\w){re.escape(answer)}(?![\d]|[.,]\d|-\d)"
        return any(re.search(pattern, candidate) for candidate in (text, plain))
    if any(unicodedata.name(c, "").startswith(_SPACELESS) for c in answer):
        return answer in text
    before = r"(?<!\w)" if answer[:1].isalnum() else ""
    after = r"(?!\w)" if answer[-1:].isalnum() else ""
    return re.search(before + re.escape(answer) + after, text) is not None


def score(dialog: Dialog, produced: Messages, run: Run = run_python) -> DialogVerdict:
    """Judge ``produced``, the messages after ``dialog.prompt``: assistant with calls, ipython, assistant.

    The first call counts. It is evaluated here, independently of the ipython message. The code of an
    interpreter call is judged by the output in its ipython message, and run only if there is none. ``run``
    executes programs (``Sandbox().run`` uses one sandbox for many).
    """
    calls = [call for message in produced for call in message.get("tool_calls") or ()]
    last = produced[-1] if produced else {}
    answered = last.get("role") == "assistant" and not last.get("tool_calls")
    content = str(last.get("content") or "") if answered else ""
    if dialog.check:
        passed = not calls and _passes(content, dialog.check, run)
        return DialogVerdict(not calls, passed, "" if passed else "the program fails its check")
    if not dialog.call:
        said = states(content.casefold(), dialog.answer.casefold())
        why = "a call, and none is needed" if calls else "" if said else f"does not say {dialog.answer!r}"
        return DialogVerdict(not calls, said, why)
    value, why = _value(calls[0], produced, run) if calls else (None, "no call")
    call_ok = value == dialog.result
    if not call_ok and not why:
        why = f"the call gives {value!r}, not {dialog.result!r}"
    # The case of a weekday does not matter. For upper-cased and reversed words it does.
    fold = str.casefold if dialog.kind == "weekday" else str
    answer_ok = states(fold(content), fold(dialog.answer))
    if call_ok and not answer_ok:
        why = f"the answer does not say {dialog.answer!r}"
    return DialogVerdict(call_ok, answer_ok, why)


def _value(call: Mapping[str, Any], produced: Messages, run: Run) -> tuple[str | None, str]:
    """Return the value of a call (None if it fails), and the error ("" if there is none)."""
    first = call.get("function", call)
    name, arguments = first.get("name"), first.get("arguments")
    if name == CODE_INTERPRETER and isinstance(arguments, Mapping):
        return _printed(str(arguments.get("code", "")), produced, run), ""
    try:
        return call_tool(str(name), arguments), ""
    except ToolError as error:
        return None, str(error)


def _printed(code: str, produced: Messages, run: Run) -> str | None:
    for message in produced:
        if message.get("role") in ("ipython", "tool"):
            match = _STDOUT.match(str(message.get("content", "")))
            return match[1].strip() if match else None
    outcome = run(code)
    return outcome.stdout.strip() if outcome.ok else None


def _passes(content: str, check: str, run: Run) -> bool:
    """Return whether the code in ``content`` (fenced or bare) runs and passes its asserts."""
    outcome = run(f"{python_program(content)}\n\n{check}\nprint('met')\n")
    return outcome.ok and outcome.stdout.endswith("met\n")
