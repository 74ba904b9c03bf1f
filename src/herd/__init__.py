"""Run, serve, shrink, tune and train Llama models, in PyTorch with C++ kernels for CPUs.

Everything here is imported at its first use, so that `import herd` is fast and does not import torch::

    model, tokenizer = herd.load("runs/demo/student")
    logits_BTV = model.logits(tokens_BT)
    herd.generate(model, tokenizer, "def area(", max_tokens=32, temperature=0)  # the same every time
    herd.generate(model, tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    herd.stream(...)  # the same as generate, piece by piece
    lower_case = herd.Constraint.regex("[a-z]+")
    herd.generate_many(model, tokenizer, prompts, n=4, temperature=1.0, constraint=lower_case)
    herd.Tokenizer.from_file("tokenizer.model")
    herd.render(messages, tokenizer, tools=...)
    herd.SIZES["405B"].n_params  # 405_853_388_800
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from .engine.constraint import Constraint
    from .engine.generate import generate, generate_many, stream
    from .llama.config import SIZES, ModelConfig
    from .llama.model import LlamaLM
    from .text.chat_format import render
    from .text.tokenizer import Tokenizer

try:
    __version__ = metadata.version("llamaherd")
except metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"
__all__ = ["SIZES", "Constraint", "ModelConfig", "Tokenizer", "__version__"]
__all__ += ["generate", "generate_many", "load", "load_tokenizer", "render", "stream"]

# By name and not by import statement: this file stands above all floors, yet every floor may ask it for the
# version.
_HOMES = {
    "SIZES": "llama.config",
    "ModelConfig": "llama.config",
    "Tokenizer": "text.tokenizer",
    "Constraint": "engine.constraint",
    "generate": "engine.generate",
    "generate_many": "engine.generate",
    "stream": "engine.generate",
    "render": "text.chat_format",
}


def load(
    folder: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[LlamaLM, Tokenizer | None]:
    """Load a model and its tokenizer. ``folder`` is anything that `herd chat` takes.

    ``dtype`` defaults to the stored dtype, ``device`` to a GPU if there is one. The model has its recommended
    settings of answers in ``sampling_defaults``. Without a tokenizer in the folder, it is None, with a
    warning. Raises `CheckpointError` if it is not a checkpoint.
    """
    source = importlib.import_module(".checkpoint", __name__).ModelSource(folder)
    model = source.load(dtype, device or importlib.import_module(".dtypes", __name__).default_device())
    model.sampling_defaults = source.sampling_defaults
    return model, source.tokenizer


def load_tokenizer(source: Path | str) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint folder or a GGUF file. If there is none, warn and return None."""
    return importlib.import_module(".checkpoint", __name__).load_tokenizer(source)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'herd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
