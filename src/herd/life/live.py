"""Show a recipe's training: progress, live samples, and the copying accuracy when it jumps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.dialogs import showcase_dialogs
from ..engine import Engine, Request, Sampling
from ..llama.model import LlamaLM
from ..text import Tokenizer, render
from .show import Show

SAMPLES_EVERY = 15.0
"""Seconds between live samples."""
WARMTH = 0.7
"""Temperature of sampled text."""
LEARNED = {"copy": "copy", "lookup": "look up", "needles": "find facts"}
"""Names of the skills that accuracies show, by the kind of rows."""
TEXT_PROMPTS = ("The old man", "It is", "In the", "Der", "Return the")
"""Texts that a base model continues."""


@dataclass(frozen=True)
class Prompt:
    """A text that live samples continue: ``shown`` in the terminal, ``ids`` for the model."""

    shown: str
    ids: list[int]


class Live:
    """The display of one recipe in training.

    ``progress`` is the recipe's part of the stage's progress bar.
    """

    def __init__(self, show: Show, kind: str, steps: int, progress: tuple[float, float]) -> None:
        self.show, self.kind, self.steps, self.progress = show, kind, steps, progress
        self.prompts: Sequence[Prompt] = ()
        self.model: LlamaLM | None = None
        self.tokenizer: Tokenizer | None = None
        self.last, self.turn = time.monotonic(), 0
        self.accuracies: dict[str, float] = {}

    def begin(self, model: LlamaLM, tokenizer: Tokenizer) -> None:
        """Take the model that is trained."""
        self.model, self.tokenizer = model, tokenizer
        continued = [Prompt(text, tokenizer.encode(text, bos=True)) for text in TEXT_PROMPTS]
        self.prompts = chat_prompts(tokenizer) if self.kind == "chat" else continued

    def on_step(self, record: dict[str, Any]) -> None:
        """Show the progress, and from time to time a sample."""
        low, high = self.progress
        done = low + (high - low) * record["step"] / self.steps
        self.show.advance(done, f"loss {record['loss']:.2f}  {record['tokens_per_s']:,.0f} tokens/s")
        if time.monotonic() - self.last >= SAMPLES_EVERY or record["step"] == self.steps:
            self.sample(record["step"])

    def on_evaluate(self, scores: dict[str, float]) -> None:
        """Print the accuracies on fresh rows that changed by a tenth, and the skills that are learnt now."""
        for kind, learned in LEARNED.items():
            value = scores.get(f"{kind}_accuracy")
            before = self.accuracies.get(kind)
            if value is None or (before is not None and abs(value - before) < 0.1):
                continue
            self.accuracies[kind] = value
            bar = "█" * round(20 * value) + "░" * (20 - round(20 * value))
            news = f"  it has learnt to {learned}" if before is not None and before < 0.5 <= value else ""
            self.show.line(f"  {learned:<12} {bar} {100 * value:.0f} % of fresh rows[green]{news}[/green]")

    def sample(self, step: int) -> None:
        """Show a few tokens of the model, for one prompt after another."""
        assert self.model is not None
        prompt = self.prompts[self.turn % len(self.prompts)]
        self.turn += 1
        # The most likely tokens alone make a small model repeat itself. An answer with a tool call needs
        # them.
        temperature = 0.0 if self.kind == "chat" else WARMTH
        request = Request(prompt.ids, Sampling(max_tokens=32, temperature=temperature, seed=self.turn))
        completion = Engine(self.model, self.tokenizer, max_batch=1).run([request])[0]
        self.model.train()
        self.show.sample(step, prompt.shown, completion.text)
        self.last = time.monotonic()


def chat_prompts(tokenizer: Tokenizer) -> list[Prompt]:
    """Return the questions that an instruct model answers in live samples. `herd chat` suggests them too."""
    prompts = []
    for dialog in (*showcase_dialogs("en"), *showcase_dialogs("de")):
        ids = render(
            dialog.prompt, tokenizer, tool_call_format=dialog.tool_call_format, generation_prompt=True
        ).ids
        prompts.append(Prompt(f"{dialog.prompt[-1]['content']} → ", ids))
    return prompts
