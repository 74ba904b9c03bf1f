"""What `herd chat` knows of a model before the first word: base or instruct, what it was raised on, what it is good at.

A model raised by Herd has its stage in `herd.json`. Base stages continue text; the stages after instruct tuning talk,
with the short system message they were trained with. Of a model from elsewhere nothing is known but its files: it is
taken for an instruct model, and told so to the user.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import (
    Lineage,
    generation_defaults,
    load_lineage,
    load_model,
    load_tokenizer,
    resolve_folder,
)
from ..data.dialogs import Dialog, make_dialogs, showcase_dialogs
from ..data.prompts import TOOL_NAMES, system_prompt
from ..dtypes import torch_dtype
from ..errors import EngineError
from ..evals.tooluse import tool_use
from ..llama.model import LlamaLM
from ..text.tokenizer import Tokenizer

BASE_STAGES = ("teacher", "long", "lm")
RAISED_STAGES = ("instruct", "student", "control", "sft")
QUESTIONS = 5
FP32_PARAMS = 1_000_000_000
"""Up to this size a CPU computes in fp32 whatever the file holds: many CPUs have no fast bf16."""
TRIED_PARAMS = 100_000_000
"""Up to this size the opening questions are tried beforehand; larger models would keep the user waiting."""


@dataclass(frozen=True)
class Talker:
    """A loaded model and how to talk to it. ``base``: it continues text; ``raised``: made by Herd on its dialogs."""

    folder: Path
    model: LlamaLM
    tokenizer: Tokenizer
    lineage: Lineage | None

    @property
    def base(self) -> bool:
        return self.lineage is not None and self.lineage.stage in BASE_STAGES

    @property
    def raised(self) -> bool:
        return self.lineage is not None and self.lineage.stage in RAISED_STAGES

    @property
    def defaults(self) -> dict[str, Any]:
        """Sampling settings: greedy for raised models, which are evaluated that way; else what the folder says."""
        return {} if self.raised else generation_defaults(self.folder)

    def system(self, tool_call_format: str) -> str:
        """The system message it was trained with; empty for a model from elsewhere."""
        return system_prompt(tool_call_format, TOOL_NAMES) if self.raised else ""

    def card(self) -> list[str]:
        """What it is and what it cannot do, in a few lines."""
        config, stage = self.model.config, self.lineage.stage if self.lineage else "unknown"
        name = self.lineage.name if self.lineage else self.folder.resolve().name
        lines = [
            f"{name}: {_amount(config.n_params)} parameters, stage {stage}, context {config.max_context:,} tokens."
        ]
        if self.base:
            lines.append(
                "A base model: it continues your text and does not answer questions. The instruct stage comes after it."
            )
        elif self.raised:
            lines.append(
                "Raised to do arithmetic, dates and words with tools, and to write small Python functions. It cannot: "
                "know facts of the world, reason in several steps, talk about anything else. A toy; it may be wrong."
            )
        else:
            lines.append(
                "Nothing here says what it was trained for: it is asked as an instruct model; --complete if it is none."
            )
        return lines + self._measured()

    def _measured(self) -> list[str]:
        """Its held-out tool use, where its run has measured it."""
        try:
            records = json.loads((self.folder.resolve().parent / "scores.json").read_text())
            found = [
                r for r in records if r["model"] == self.folder.resolve().name and r["name"] == "tool_use"
            ]
            values = [(float(r["value"]), int(r["n"])) for r in found]
        except (OSError, ValueError, TypeError, KeyError):
            return []  # not within a run, or not measured yet
        return [
            f"Measured on {n} held-out questions that need a tool: {100 * value:.0f} % right."
            for value, n in values
        ]


def open_model(folder: str, dtype: str | None = None, device: str | None = None) -> Talker:
    """Loads a checkpoint folder for chat. Without a tokenizer: EngineError, before the weights are read."""
    import torch

    path = resolve_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said as an error below
        tokenizer = load_tokenizer(path)
    lineage = load_lineage(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = None if dtype is None else torch_dtype(dtype)
    if tokenizer is None:
        from ..checkpoint import load_config

        load_config(path)  # a folder that is no checkpoint says so first
        raise EngineError(
            f"{folder}: has no tokenizer; put the model's own tokenizer.model or tokenizer.json into the folder"
        )
    model = load_model(path, dtype=wanted, device=device)
    if wanted is None and device == "cpu" and model.config.n_params <= FP32_PARAMS:
        model = model.float()
    return Talker(path, model.eval().requires_grad_(False), tokenizer, lineage)


def open_draft(
    name: str, talker: Talker, dtype: str | None = None, device: str | None = None
) -> LlamaLM | str:
    """What guesses ahead for a model: "ngram", or another one with the same tokenizer."""
    if name == "ngram":
        return name
    draft = open_model(name, dtype, device)
    if draft.tokenizer != talker.tokenizer:
        raise EngineError(f"--draft {name}: has another tokenizer than {talker.folder}; both must share one")
    return draft.model


def opening_questions(talker: Talker, lang: str, tool_call_format: str) -> tuple[list[str], int, int]:
    """(questions it answers rightly, how many were right, how many were tried), at most five questions.

    A raised model is tried on the showcase and then on more held-out dialogs, calls really run, answers checked.
    """
    if not talker.raised or talker.model.config.n_params > TRIED_PARAMS:
        return [], 0, 0
    right: list[Dialog] = []
    n_right = n_tried = 0
    for dialogs in (list(showcase_dialogs(lang, tool_call_format)), _more(talker, lang, tool_call_format)):
        use = tool_use(talker.model, talker.tokenizer, dialogs, max_tokens=96)
        hits = [verdict.correct for verdict in use.verdicts]
        right += [dialog for dialog, hit in zip(dialogs, hits, strict=True) if hit]
        n_right, n_tried = n_right + sum(hits), n_tried + len(hits)
        if len(right) >= QUESTIONS:
            break
    return [dialog.prompt[-1]["content"] for dialog in _varied(right)[:QUESTIONS]], n_right, n_tried


def _more(talker: Talker, lang: str, tool_call_format: str) -> list[Dialog]:
    """Held-out dialogs under the very system message of the chat."""
    tasks = ("arithmetic", "dates", "strings", "programs")
    dialogs = make_dialogs(
        20, 1, split="test", languages=(lang,), tool_call_formats=(tool_call_format,), tasks=tasks
    )
    system = {"role": "system", "content": talker.system(tool_call_format)}
    return [replace(d, messages=(system, *(m for m in d.messages if m["role"] != "system"))) for d in dialogs]


def _varied(dialogs: Sequence[Dialog]) -> list[Dialog]:
    """The first of every kind before the second of any."""
    seen: dict[str, int] = {}
    order = []
    for at, dialog in enumerate(dialogs):
        order.append((seen.get(dialog.kind, 0), at))
        seen[dialog.kind] = seen.get(dialog.kind, 0) + 1
    return [dialogs[at] for _, at in sorted(order)]


def _amount(n: int) -> str:
    return f"{n / 1e9:.1f} billion" if n >= 1e9 else f"{n / 1e6:.1f} million" if n >= 1e6 else f"{n:,}"
