"""Questions that `herd chat` suggests for a model of `herd raise`, after testing which ones it can answer."""

from __future__ import annotations

from dataclasses import replace

from ..data.dialogs import Dialog, make_dialogs, showcase_dialogs
from ..evals.tooluse import tool_use
from .chat_model import ChatModel

N_QUESTIONS = 5
TRIED_PARAMS = 100_000_000
"""Up to this many parameters the suggested questions are tried first; larger models would take too long."""


def opening_questions(model: ChatModel, lang: str, tool_call_format: str) -> tuple[list[str], int, int]:
    """Return (questions, correct, tried): up to five questions with correct answers, and two counts.

    A model of `herd raise` is tried on the showcase and then on more held-out dialogs. Its tool calls are
    run.
    """
    if not model.is_raised or model.model.config.n_params > TRIED_PARAMS:
        return [], 0, 0
    answered: list[Dialog] = []
    n_tried = 0
    for dialogs in (
        list(showcase_dialogs(lang, tool_call_format)),
        _more_dialogs(model, lang, tool_call_format),
    ):
        verdicts = tool_use(model.model, model.tokenizer, dialogs, max_tokens=96).verdicts
        answered += [d for d, verdict in zip(dialogs, verdicts, strict=True) if verdict.correct]
        n_tried += len(dialogs)
        if len(answered) >= N_QUESTIONS:
            break
    # One question of every kind before a second question of any kind.
    n_before = [sum(other.kind == d.kind for other in answered[:i]) for i, d in enumerate(answered)]
    chosen = sorted(range(len(answered)), key=n_before.__getitem__)[:N_QUESTIONS]
    return [answered[i].prompt[-1]["content"] for i in chosen], len(answered), n_tried


def _more_dialogs(model: ChatModel, lang: str, tool_call_format: str) -> list[Dialog]:
    """Return held-out dialogs with the same system message as the chat."""
    tasks = ("arithmetic", "dates", "strings", "programs")
    formats = (tool_call_format,)
    dialogs = make_dialogs(20, 1, split="test", languages=(lang,), tool_call_formats=formats, tasks=tasks)
    system = {"role": "system", "content": model.system_message(tool_call_format)}
    return [replace(d, messages=(system, *(m for m in d.messages if m["role"] != "system"))) for d in dialogs]
