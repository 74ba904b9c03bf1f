"""Herd's own tool dialogs, in the formats of its training: two tasks.

``tool_calls``: the model's call must compute the right value. ``tool_answers``: given the right call and its
result, the answer must state it. Wordings, names and numbers do not occur in training (`herd.data.dialogs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...data.dialogs import Dialog
from ...data.scoring import score, states
from ...text.toolcall import parse
from ...tools.sandbox import Sandbox
from ..tooluse import tool_items
from .data import Data
from .task import Answer, Generate, Item, Judgement, Task

N_DIALOGS = 200
MAX_TOKENS = 160


class ToolDialogs(Task):
    """Held-out dialogs, grouped by language. The id of an item names the format of its call."""

    source = "the project's own held-out dialogs"
    licence = "Apache-2.0"
    metric = "right"

    def items(self, data: Data) -> list[Item]:
        return [self._item(n, dialog) for n, dialog in enumerate(tool_items(N_DIALOGS))]

    def judge(self, item: Item, answer: Answer) -> Judgement:
        return self.judge_all([(item, answer)])[0]

    def judge_all(self, answered: Sequence[tuple[Item, Answer]]) -> list[Judgement]:
        if self.name == "tool_answers":
            return [_answered(item.doc["dialog"], answer.text) for item, answer in answered]
        with Sandbox() as sandbox:
            return [_called(item.doc["dialog"], answer.text, sandbox) for item, answer in answered]

    def _item(self, n: int, dialog: Dialog) -> Item:
        messages = dialog.prompt
        if self.name == "tool_answers":
            last = max(i for i, message in enumerate(dialog.messages) if message["role"] == "ipython")
            messages = dialog.messages[: last + 1]
        request = Generate(messages, max_tokens=MAX_TOKENS, tool_call_format=dialog.tool_call_format)
        gold: Any = dialog.answer if self.name == "tool_answers" else dialog.call
        return Item(f"{n}-{dialog.tool_call_format}", request, gold, dialog.lang, {"dialog": dialog})


def _called(dialog: Dialog, text: str, sandbox: Sandbox) -> Judgement:
    parsed = parse(text)
    message = parsed.message()
    verdict = score(dialog, [message], sandbox.run)
    why = "" if verdict.call_ok else "; ".join([verdict.why, *parsed.errors])[:300]
    return Judgement(float(verdict.call_ok), message.get("tool_calls") or parsed.content[:200], why=why)


def _answered(dialog: Dialog, text: str) -> Judgement:
    """Judge whether the text states the answer. The case of weekdays does not matter."""
    fold = str.casefold if dialog.kind == "weekday" else str
    right = not parse(text).calls and states(fold(text), fold(dialog.answer))
    return Judgement(float(right), text[:200], why="" if right else f"does not say {dialog.answer!r}")
