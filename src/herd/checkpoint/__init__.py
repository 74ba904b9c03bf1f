"""Checkpoints on disk: Hugging Face folders with a lineage, quantized GGUF folders, import and export.

`model_source.py` opens a model. `folder.py` saves checkpoints and `plain.py` loads them, `gguf_folder.py`
does both for quantized ones. `convert.py` (Hugging Face), `meta.py`, `gguf_convert.py` and `vllm.py` import
and export. Each other file is about one thing: a file format, the names of other programs, the lineage, the
chat format.

Names are imported at their first use, because most of these files import torch, and finding a model does not
need it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import ImportSource, export_hf, import_hf, open_source
    from .folder import checkpoint_hash, load_trainable, save_model, weight_reader, write_checkpoint
    from .gguf_convert import export_gguf, import_gguf, quantize_folder, write_random
    from .hf import config_to_hf
    from .lineage import Lineage, load_lineage, update_lineage
    from .meta import import_meta
    from .model_source import ModelSource, load_config, load_model, load_tokenizer
    from .sources import resolve_model
    from .vllm import export_vllm

_HOMES = {
    "convert": ("ImportSource", "export_hf", "import_hf", "open_source"),
    "folder": ("checkpoint_hash", "load_trainable", "save_model", "weight_reader", "write_checkpoint"),
    "gguf_convert": ("export_gguf", "import_gguf", "quantize_folder", "write_random"),
    "hf": ("config_to_hf",),
    "lineage": ("Lineage", "load_lineage", "update_lineage"),
    "meta": ("import_meta",),
    "model_source": ("ModelSource", "load_config", "load_model", "load_tokenizer"),
    "sources": ("resolve_model",),
    "vllm": ("export_vllm",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ImportSource", "Lineage", "ModelSource", "checkpoint_hash", "config_to_hf", "export_gguf", "export_hf",
    "export_vllm", "import_gguf", "import_hf", "import_meta", "load_config", "load_lineage", "load_model",
    "load_tokenizer", "load_trainable", "open_source", "quantize_folder", "resolve_model", "save_model",
    "update_lineage", "weight_reader", "write_checkpoint", "write_random",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module 'herd.checkpoint' has no attribute {name!r}")
