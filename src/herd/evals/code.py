"""Functions that run: the share of written programs that parse, and that pass a check they have not seen.

An instruct model is asked in a dialog; a base model gets the question as a comment and the ``def`` line, and goes on.
Each program runs in the sandbox with the asserts of its dialog (functional correctness as in HumanEval,
arXiv 2107.03374).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.dialogs import Dialog, make_dialogs
from ..engine.engine import Engine
from ..engine.request import Request, Sampling
from ..errors import DataError
from ..llama.model import LlamaLM
from ..text.chat import render
from ..text.fenced import defined_functions, python_program
from ..text.tokenizer import Tokenizer
from ..tools import Sandbox
from .score import Score, share, shares_by

_DEF = re.compile(r"^def .*:$", re.MULTILINE)
TIMEOUT_S = 2.0


@dataclass(frozen=True)
class WrittenProgram:
    """A dialog's program as the model wrote it: does it parse, does it pass."""

    dialog: Dialog
    code: str
    parses: bool
    passes: bool


def code_items(n: int, seed: int = 0, *, languages: Sequence[str] = ("en",)) -> list[Dialog]:
    """``n`` held-out dialogs that ask for a function."""
    return make_dialogs(
        n, seed, split="test", languages=languages, tool_call_formats=("json",), tasks=("programs",)
    )


def written_in_chat(
    model: LlamaLM, tokenizer: Tokenizer, dialogs: Sequence[Dialog], sampling: Sampling | None = None
) -> list[WrittenProgram]:
    """An instruct model's programs; greedy unless ``sampling`` says otherwise."""
    prompts = [
        render(
            d.prompt,
            tokenizer,
            tools=d.tools or None,
            tool_call_format=d.tool_call_format,
            generation_prompt=True,
        ).ids
        for d in dialogs
    ]
    texts = _texts(model, tokenizer, prompts, sampling or Sampling(max_tokens=160))
    return run_programs([(dialog, python_program(text)) for dialog, text in zip(dialogs, texts, strict=True)])


def written_as_text(
    model: LlamaLM, tokenizer: Tokenizer, dialogs: Sequence[Dialog], sampling: Sampling | None = None
) -> list[WrittenProgram]:
    """A base model's programs: the body that follows a comment and a ``def`` line, up to the next unindented line."""
    heads = [_head(dialog) for dialog in dialogs]
    prompts = [tokenizer.encode(comment + head, bos=True) for comment, head in heads]
    texts = _texts(model, tokenizer, prompts, sampling or Sampling(max_tokens=80))
    return run_programs(
        [(d, head + function_body(text)) for d, (_, head), text in zip(dialogs, heads, texts, strict=True)]
    )


def program_scores(written: Sequence[WrittenProgram]) -> list[Score]:
    """``code_parse`` and ``code_pass``, by language."""
    langs = [w.dialog.lang for w in written]
    parses, passes = [w.parses for w in written], [w.passes for w in written]
    return [
        share("code_parse", parses, {"by_lang": shares_by(langs, parses)}),
        share("code_pass", passes, {"by_lang": shares_by(langs, passes)}),
    ]


def run_programs(programs: Sequence[tuple[Dialog, str]]) -> list[WrittenProgram]:
    """Parse every program and run those that parse with their dialog's asserts, each in a process of its own."""
    out = []
    with Sandbox() as sandbox:
        for dialog, code in programs:
            parses = bool(defined_functions(code))
            passes = False
            if parses:
                result = sandbox.run(f"{code}\n\n{dialog.check}\nprint('met')\n", timeout_s=TIMEOUT_S)
                passes = result.ok and result.stdout.endswith("met\n")
            out.append(WrittenProgram(dialog, code, parses, passes))
    return out


def function_body(text: str) -> str:
    """Lines up to the first that is neither indented nor empty."""
    lines = text.split("\n")
    end = next(
        (i for i, line in enumerate(lines) if i and line.strip() and not line.startswith((" ", "\t"))),
        len(lines),
    )
    return "\n".join(lines[:end])


def _head(dialog: Dialog) -> tuple[str, str]:
    """(comment, def line with the first line's indentation) of the dialog's own solution."""
    found = _DEF.search(dialog.messages[-1]["content"])
    if not found:
        raise DataError("this dialog does not ask for a function: make dialogs with tasks=('programs',)")
    comment = "".join(f"# {line}\n" for line in dialog.prompt[-1]["content"].splitlines())
    return comment, found[0] + "\n   "


def _texts(model: LlamaLM, tokenizer: Tokenizer, prompts: list[list[int]], sampling: Sampling) -> list[str]:
    if not prompts:
        raise DataError("code: no dialogs to answer")
    requests = [Request(ids, sampling) for ids in prompts]
    return [completion.text for completion in Engine(model, tokenizer, max_batch=128).run(requests)]
