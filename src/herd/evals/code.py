"""Written functions: the fraction of a model's programs that parse, and that pass hidden tests.

An instruct model is asked in a dialog. A base model gets the question as a comment and the ``def`` line to
continue. Each program runs in the sandbox with the asserts of its dialog (functional correctness as in
HumanEval, arXiv 2107.03374).
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
from ..text.fenced import defined_functions, python_program
from ..text.tokenizer import Tokenizer
from ..tools import Sandbox
from .score import Score, share, shares_by
from .tooluse import prompt_ids

_DEF = re.compile(r"^def .*:$", re.MULTILINE)
TIMEOUT_S = 2.0


@dataclass(frozen=True)
class WrittenProgram:
    """The program that a model wrote for a dialog, and whether it parses and passes."""

    dialog: Dialog
    code: str
    parses: bool
    passes: bool


def code_items(n: int, seed: int = 0) -> list[Dialog]:
    """Return ``n`` held-out dialogs in English that ask for a function."""
    kinds = {"languages": ("en",), "tool_call_formats": ("json",), "tasks": ("programs",)}
    return make_dialogs(n, seed, split="test", **kinds)


def written_in_chat(model: LlamaLM, tokenizer: Tokenizer, dialogs: Sequence[Dialog]) -> list[WrittenProgram]:
    """Return an instruct model's programs, decoded greedily."""
    prompts = [prompt_ids(tokenizer, dialog, dialog.prompt) for dialog in dialogs]
    texts = _texts(model, tokenizer, prompts, max_tokens=160)
    return run_programs([(dialog, python_program(text)) for dialog, text in zip(dialogs, texts, strict=True)])


def written_as_text(model: LlamaLM, tokenizer: Tokenizer, dialogs: Sequence[Dialog]) -> list[WrittenProgram]:
    """Return a base model's programs: the ``def`` line, continued up to the next line without indentation."""
    heads = [_head(dialog) for dialog in dialogs]
    prompts = [tokenizer.encode(comment + head, bos=True) for comment, head in heads]
    texts = _texts(model, tokenizer, prompts, max_tokens=80)
    written = zip(dialogs, heads, texts, strict=True)
    return run_programs([(dialog, head + function_body(text)) for dialog, (_, head), text in written])


def program_scores(written: Sequence[WrittenProgram]) -> list[Score]:
    """Return ``code_parse`` and ``code_pass``, with breakdowns by language."""
    langs = [w.dialog.lang for w in written]
    hits = {"code_parse": [w.parses for w in written], "code_pass": [w.passes for w in written]}
    return [share(name, some, {"by_lang": shares_by(langs, some)}) for name, some in hits.items()]


def run_programs(programs: Sequence[tuple[Dialog, str]]) -> list[WrittenProgram]:
    """Run every program that parses, each with its dialog's asserts and in its own process."""
    out = []
    with Sandbox() as sandbox:
        for dialog, code in programs:
            parses, passes = bool(defined_functions(code)), False
            if parses:
                result = sandbox.run(f"{code}\n\n{dialog.check}\nprint('met')\n", timeout_s=TIMEOUT_S)
                passes = result.ok and result.stdout.endswith("met\n")
            out.append(WrittenProgram(dialog, code, parses, passes))
    return out


def function_body(text: str) -> str:
    """Return the text up to the next line that is neither indented nor empty.

    The first line does not count.
    """
    return re.split(r"\n(?=[^ \t\n])", text, maxsplit=1)[0]


def _head(dialog: Dialog) -> tuple[str, str]:
    """Return (question as a comment, the solution's ``def`` line with the next line's indentation)."""
    found = _DEF.search(dialog.messages[-1]["content"])
    if not found:
        raise DataError("the dialog does not ask for a function: make dialogs with tasks=('programs',)")
    comment = "".join(f"# {line}\n" for line in dialog.prompt[-1]["content"].splitlines())
    return comment, found[0] + "\n   "


def _texts(model: LlamaLM, tokenizer: Tokenizer, prompts: list[list[int]], max_tokens: int) -> list[str]:
    if not prompts:
        raise DataError("code: there are no dialogs to answer")
    requests = [Request(ids, Sampling(max_tokens=max_tokens)) for ids in prompts]
    return [completion.text for completion in Engine(model, tokenizer, max_batch=128).run(requests)]
