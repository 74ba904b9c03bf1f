"""Generate continuations of the same prompts by several models, for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.generate import Prompt, generate_many
from ..llama.model import LlamaLM
from ..text.tokenizer import Tokenizer


def samples(
    models: Mapping[str, LlamaLM], tokenizer: Tokenizer, prompts: Sequence[Prompt], **sampling: Any
) -> list[dict[str, Any]]:
    """Return ``[{prompt, outputs: {model: text}}]`` for the report page. Decoding is greedy by default.

    For a prompt of messages, ``prompt`` is the last message.
    """
    outputs = {
        name: [c.text for c in generate_many(model, tokenizer, prompts, **sampling)]
        for name, model in models.items()
    }
    shown = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [
        {"prompt": text, "outputs": {name: outputs[name][i] for name in models}}
        for i, text in enumerate(shown)
    ]
