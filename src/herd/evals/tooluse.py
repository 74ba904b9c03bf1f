"""Does the model use its tools? Held-out dialogs, answered greedily, tools really run, every answer checked.

All dialogs go in lockstep: one batch of answers, all their calls run, one batch of answers to the results. Right means
that the call evaluates to the expected value *and* the answer states it (`herd.data.scoring`); a lucky guess is wrong.
Wordings, names and numbers are held out from training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..data.dialogs import Dialog, make_dialogs
from ..data.scoring import DialogVerdict
from ..data.scoring import score as judge
from ..data.wordings import LANGUAGES
from ..engine.engine import Engine
from ..engine.request import Request, Sampling
from ..errors import DataError, ToolError
from ..llama.model import LlamaLM
from ..text.chat import CODE_INTERPRETER, TOOL_CALL_FORMATS, render
from ..text.tokenizer import Tokenizer
from ..text.toolcall import parse
from ..tools import TOOLS, Sandbox, Tool, ToolLoop, execute_call
from .score import Score, share, shares_by

Message = dict[str, Any]
ROUNDS = 3
"""Answers at most in one dialog: a call, its answer, and one more chance."""


@dataclass(frozen=True)
class Answered:
    """A dialog, the messages the model produced after its prompt, and why it ended early ("" if it did not)."""

    dialog: Dialog
    produced: tuple[Message, ...]
    trouble: str = ""


@dataclass(frozen=True)
class ToolUse:
    """Every dialog with its verdict."""

    answered: list[Answered]
    verdicts: list[DialogVerdict]

    def score(self, name: str = "tool_use") -> Score:
        """Share of right dialogs: by language, form, task and kind; how many called rightly; what went wrong."""
        hits = [verdict.correct for verdict in self.verdicts]
        dialogs = [a.dialog for a in self.answered]
        detail: dict[str, Any] = {
            "by_lang": shares_by((d.lang for d in dialogs), hits),
            "by_form": shares_by((d.tool_call_format for d in dialogs), hits),
            "by_task": shares_by((d.task for d in dialogs), hits),
            "by_kind": shares_by((d.kind for d in dialogs), hits),
            "call_ok": sum(verdict.call_ok for verdict in self.verdicts) / len(hits),
            "trouble": dict(Counter(a.trouble for a in self.answered if a.trouble)),
        }
        return share(name, hits, detail)

    def mistakes(self, n: int = 5) -> list[dict[str, Any]]:
        """The first few wrong ones, for people."""
        wrong = (i for i, verdict in enumerate(self.verdicts) if not verdict.correct)
        return [
            {
                "question": self.answered[i].dialog.prompt[-1]["content"],
                "produced": list(self.answered[i].produced),
                "expected": self.answered[i].dialog.answer,
                "why": self.answered[i].trouble or self.verdicts[i].why,
            }
            for i, _ in zip(wrong, range(n), strict=False)
        ]


def tool_items(
    n: int,
    seed: int = 0,
    *,
    languages: Sequence[str] = LANGUAGES,
    tool_call_formats: Sequence[str] = TOOL_CALL_FORMATS,
) -> list[Dialog]:
    """``n`` held-out dialogs that need a tool, languages and forms evenly."""
    items: list[Dialog] = []
    block = max(64, n)
    for part in range(100):
        tasks = ("arithmetic", "dates", "strings")
        more = make_dialogs(
            block,
            seed * 1000 + part,
            split="test",
            languages=languages,
            tool_call_formats=tool_call_formats,
            tasks=tasks,
        )
        items += [dialog for dialog in more if dialog.call]
        if len(items) >= n:
            return items[:n]
    raise DataError(f"{n} dialogs with a tool are more than could be made")


def tool_use(
    model: LlamaLM,
    tokenizer: Tokenizer,
    dialogs: Sequence[Dialog],
    *,
    max_tokens: int = 160,
    max_batch: int = 128,
) -> ToolUse:
    """Answers and judges ``dialogs`` (`tool_items`, or any others of `herd.data.dialogs`)."""
    if not dialogs:
        raise DataError("tool use: no dialogs to answer")
    engine = Engine(model, tokenizer, max_batch=max_batch)
    answered = answer_dialogs(engine, tokenizer, dialogs, max_tokens)
    return ToolUse(answered, [judge(a.dialog, a.produced) for a in answered])


def answer_dialogs(
    engine: Engine, tokenizer: Tokenizer, dialogs: Sequence[Dialog], max_tokens: int = 160
) -> list[Answered]:
    """What the model says after each dialog's prompt, calls run and answered, all dialogs in lockstep."""
    trouble = [""] * len(dialogs)
    with Sandbox() as sandbox:
        execute = partial(execute_call, tools={**TOOLS, CODE_INTERPRETER: _interpreter(sandbox)})
        loops = [ToolLoop(list(dialog.prompt), execute, ROUNDS) for dialog in dialogs]
        going = list(range(len(dialogs)))
        while going:
            prompts = {i: _prompt(tokenizer, dialogs[i], loops[i].messages) for i in going}
            for i in going:
                if len(prompts[i]) >= engine.context:
                    trouble[i] = "beyond the context"
            going = [i for i in going if not trouble[i]]
            completions = engine.run([Request(prompts[i], Sampling(max_tokens=max_tokens)) for i in going])
            for i, completion in zip(going, completions, strict=True):
                complete = completion.finish_reason == "stop"
                loops[i].add(parse(completion.text), complete=complete)
                list(loops[i].run_calls())
                if not complete:
                    trouble[i] = "no end"
                elif loops[i].exhausted:
                    trouble[i] = "keeps calling"
            going = [i for i in going if loops[i].waiting]
    return [
        Answered(dialog, tuple(loop.messages[len(dialog.prompt) :]), why)
        for dialog, loop, why in zip(dialogs, loops, trouble, strict=True)
    ]


def _interpreter(sandbox: Sandbox) -> Tool:
    """The code interpreter with one sandbox for all: starting one takes longer than most programs."""

    def code_interpreter(code: str) -> str:
        """Run a Python program and give back what it printed."""
        result = sandbox.run(code)
        if not result.ok:
            raise ToolError(f"{result.reason}\n{result.stderr}".strip())
        return result.stdout

    return Tool(code_interpreter)


def _prompt(tokenizer: Tokenizer, dialog: Dialog, messages: Sequence[Message]) -> list[int]:
    return render(
        messages,
        tokenizer,
        tools=dialog.tools or None,
        tool_call_format=dialog.tool_call_format,
        generation_prompt=True,
    ).ids
