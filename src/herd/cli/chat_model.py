"""Facts about a model that `herd chat` needs: base or instruct, its training and its measured abilities.

A model made by `herd raise` names its stage in `herd.json`. Models of base stages continue text. Models of
later stages answer, given the short system message of their training. Other models are treated as instruct
models. If one has no chat template, a note says that it is probably a base model.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import units
from ..checkpoint import ModelSource
from ..checkpoint.sources import model_name
from ..dtypes import default_device, torch_dtype
from ..errors import EngineError

if TYPE_CHECKING:
    from ..checkpoint import Lineage
    from ..llama.model import LlamaLM
    from ..text.tokenizer import Tokenizer

BASE_STAGES = ("teacher", "long", "lm")
FP32_PARAMS = 1_000_000_000
"""Up to this many parameters a CPU computes in fp32 whatever the file's format: few CPUs have fast bf16."""


@dataclass(frozen=True)
class ChatModel:
    """A loaded model with its tokenizer and the settings of a chat with it."""

    folder: Path
    model: LlamaLM
    tokenizer: Tokenizer
    lineage: Lineage | None
    sampling_defaults: dict[str, Any]

    @property
    def is_base(self) -> bool:
        """Whether this is a base model. Base models continue text."""
        return self.lineage is not None and self.lineage.stage in BASE_STAGES

    @property
    def is_raised(self) -> bool:
        """Whether Herd trained it on its own dialogs."""
        return self.lineage is not None and self.lineage.is_raised

    def system_message(self, tool_call_format: str) -> str:
        """Return the system message of the model's training, or "" for a model that Herd did not train."""
        if not self.is_raised:
            return ""
        from ..data.prompts import TOOL_NAMES, system_prompt

        return system_prompt(tool_call_format, TOOL_NAMES)

    def card(self, context: int) -> list[str]:
        """Return a few lines about the model: its size, its training and its limits.

        ``context`` is the most tokens of a dialog, which may be fewer than the model allows.
        """
        stage = f"stage {self.lineage.stage}, " if self.lineage else ""
        name = self.lineage.name if self.lineage else model_name(self.folder)
        if self.is_base:
            about = (
                "This is a base model: it continues your text and does not answer questions. "
                "The model of the instruct stage answers."
            )
        elif self.is_raised:
            about = (
                "It was trained to use tools for arithmetic, dates and words, and to write small functions. "
                "It does not know facts about the world and cannot reason in several steps. It may be wrong."
            )
        elif self.tokenizer.chat_template is None:
            about = "No chat template: this is probably a base model; --complete continues text."
        else:
            about = ""
        size = f"{units.si(self.model.config.n_params)} parameters, {stage}context {context:,} tokens"
        return [f"{name}: {size}.", *filter(None, [about]), *self._measured()]

    def _measured(self) -> list[str]:
        """Return lines with the model's score on held-out tool use. Empty: its run has not measured it."""
        try:
            records = json.loads((self.folder.resolve().parent / "scores.json").read_text())
            name = self.folder.resolve().name
            found = [r for r in records if (r["model"], r["name"]) == (name, "tool_use")]
            values = [(int(record["n"]), 100 * float(record["value"])) for record in found]
        except (OSError, ValueError, TypeError, KeyError):
            return []  # not in a run, or not measured yet
        return [f"Measured on {n} held-out questions that need a tool: {x:.0f} % correct." for n, x in values]


def load_chat_model(
    folder: str | Path | ModelSource, dtype: str | None = None, device: str | None = None
) -> ChatModel:
    """Load a checkpoint for chat. Raises EngineError, before the weights are read, if it has no tokenizer."""
    source = folder if isinstance(folder, ModelSource) else ModelSource(folder)
    tokenizer = require_tokenizer(source)
    dtype, device = compute_kind(source, dtype, device)
    model = source.load(None if dtype is None else torch_dtype(dtype), device)
    model.eval().requires_grad_(False)
    return ChatModel(source.path, model, tokenizer, source.lineage, source.sampling_defaults)


def require_tokenizer(source: ModelSource) -> Tokenizer:
    """Return the model's tokenizer, without importing torch. Raises EngineError if it has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no tokenizer")  # is an error below
        tokenizer = source.tokenizer
    if tokenizer is None:
        source.config  # noqa: B018 - raises if the folder is not a checkpoint
        cure = "put the model's tokenizer.model or tokenizer.json into the folder"
        if source.file is not None:
            cure = "take a GGUF file with one"
        raise EngineError(f"{source.path} has no tokenizer; {cure}")
    return tokenizer


def compute_kind(source: ModelSource, dtype: str | None, device: str | None) -> tuple[str | None, str]:
    """Return the default dtype (None: as stored) and device to load a model with."""
    device = device or default_device()
    if dtype is None and device == "cpu" and source.config.n_params <= FP32_PARAMS:
        dtype = "fp32"
    return dtype, device


def load_draft(
    name: str, source: ModelSource, dtype: str | None = None, device: str | None = None
) -> LlamaLM | str:
    """Load the draft model of the model in ``source``, see `draft_source`. Returns "ngram" unchanged."""
    draft = draft_source(name, source)
    return name if draft is None else load_chat_model(draft, dtype, device).model


def draft_source(name: str, source: ModelSource) -> ModelSource | None:
    """Return the draft model of the model in ``source``, not loaded yet. None for "ngram".

    Raises EngineError if their tokenizers differ.
    """
    if name == "ngram":
        return None
    draft = ModelSource(name)
    theirs, ours = require_tokenizer(draft), require_tokenizer(source)
    if theirs != ours or draft.config.vocab_size != source.config.vocab_size:
        raise EngineError(
            f"--draft {name}: its tokenizer differs from the one of {source.path}; both must be the same"
        )
    return draft
