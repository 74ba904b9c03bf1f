"""Tool use: answer held-out dialogs greedily, run the model's calls, and check every answer.

All dialogs advance in lockstep: the engine answers them in one batch, all their calls are run, and the next
batch has the results. An answer is right if the call evaluates to the expected value *and* the text states
that value (`herd.data.scoring`), so a lucky guess is wrong. The wordings, names and numbers do not occur in
training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..data.dialogs import Dialog, make_dialogs
from ..data.scoring import DialogVerdict
from ..data.scoring import score as judge
from ..data.tool_dialogs import names_tools, openai_messages, schemas
from ..data.wordings import LANGUAGES
from ..engine.engine import Engine
from ..engine.request import Request, Sampling
from ..errors import DataError, ToolError
from ..llama.model import LlamaLM
from ..text.llama3_chat import TOOL_CALL_FORMATS
from ..text.messages import CODE_INTERPRETER
from ..text.tokenizer import Tokenizer
from ..tools import TOOLS, Sandbox, Tool, ToolLoop, execute_call
from .score import Score, share, shares_by

Message = dict[str, Any]
ROUNDS = 3  # most messages of the model in a dialog: a call, the answer, and one retry


@dataclass(frozen=True)
class Answered:
    """A dialog with the model's messages after the prompt. ``trouble`` is the reason if it ended early."""

    dialog: Dialog
    produced: tuple[Message, ...]
    trouble: str = ""


@dataclass(frozen=True)
class ToolUse:
    """Answered dialogs with a verdict for each."""

    answered: list[Answered]
    verdicts: list[DialogVerdict]

    def score(self, name: str = "tool_use") -> Score:
        """Return the fraction of right dialogs, with breakdowns, right calls and counts of troubles."""
        hits = [verdict.correct for verdict in self.verdicts]
        attributes = {"lang": "lang", "form": "tool_call_format", "task": "task", "kind": "kind"}
        detail: dict[str, Any] = {
            f"by_{name}": shares_by((getattr(a.dialog, attribute) for a in self.answered), hits)
            for name, attribute in attributes.items()
        }
        detail["call_ok"] = sum(verdict.call_ok for verdict in self.verdicts) / len(hits)
        detail["trouble"] = dict(Counter(a.trouble for a in self.answered if a.trouble))
        return share(name, hits, detail)


def tool_items(n: int, seed: int = 0, *, languages: Sequence[str] = LANGUAGES) -> list[Dialog]:
    """Return ``n`` held-out dialogs that need a tool, with languages and call formats in equal parts."""
    items: list[Dialog] = []
    for part in range(100):  # some dialogs do not need a tool, so draw until there are enough
        more = make_dialogs(
            max(64, n), seed * 1000 + part, split="test", languages=languages,
            tool_call_formats=TOOL_CALL_FORMATS, tasks=("arithmetic", "dates", "strings"),
        )  # fmt: skip
        items += [dialog for dialog in more if dialog.call]
        if len(items) >= n:
            return items[:n]
    raise DataError(f"tool use: could not make {n} dialogs that need a tool; ask for fewer")


def tool_use(
    model: LlamaLM, tokenizer: Tokenizer, dialogs: Sequence[Dialog], *, max_tokens: int = 160,
    max_batch: int = 128,
) -> ToolUse:  # fmt: skip
    """Answer and judge dialogs from `tool_items` or others from `herd.data.dialogs`."""
    if not dialogs:
        raise DataError("tool use: there are no dialogs to answer")
    engine = Engine(model, tokenizer, max_batch=max_batch)
    answered = answer_dialogs(engine, tokenizer, dialogs, max_tokens)
    return ToolUse(answered, [judge(a.dialog, a.produced) for a in answered])


def answer_dialogs(
    engine: Engine, tokenizer: Tokenizer, dialogs: Sequence[Dialog], max_tokens: int = 160
) -> list[Answered]:
    """Let the model continue the prompts of all dialogs in lockstep, and run its calls."""
    trouble = [""] * len(dialogs)
    chat = tokenizer.require_chat()
    with Sandbox() as sandbox:
        execute = partial(execute_call, tools={**TOOLS, CODE_INTERPRETER: _interpreter(sandbox)})
        loops = [ToolLoop(list(dialog.prompt), execute, ROUNDS) for dialog in dialogs]
        going = list(range(len(dialogs)))
        while going:
            prompts = {i: prompt_ids(tokenizer, dialogs[i], loops[i].messages) for i in going}
            for i in going:
                if len(prompts[i]) >= engine.context:
                    trouble[i] = "beyond the context"
            going = [i for i in going if not trouble[i]]
            completions = engine.run([Request(prompts[i], Sampling(max_tokens=max_tokens)) for i in going])
            for i, completion in zip(going, completions, strict=True):
                complete = completion.finish_reason == "stop"
                loops[i].add(chat.parser(tools=True).parse(completion.text), complete=complete)
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
    """Return a code interpreter that reuses one sandbox, because starting one takes longer than a program."""

    def code_interpreter(code: str) -> str:
        """Run a Python program and return what it printed."""
        result = sandbox.run(code)
        if not result.ok:
            raise ToolError(f"{result.reason}\n{result.stderr}".strip())
        return result.stdout

    return Tool(code_interpreter)


def prompt_ids(tokenizer: Tokenizer, dialog: Dialog, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the prompt for the next message of a dialog with these messages so far.

    A checkpoint with a chat template of its own for tools gets their schemas instead of their names.
    """
    own = dialog.tool_call_format
    chat = tokenizer.require_chat()
    if own not in chat.tool_call_formats and chat.supports_tools and names_tools(dialog):
        return chat.render(openai_messages(messages), tools=schemas(dialog), generation_prompt=True).ids
    form = own if own in chat.tool_call_formats else None
    return chat.render(messages, tool_call_format=form, generation_prompt=True).ids
