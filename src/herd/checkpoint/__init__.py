"""Checkpoints on disk: Hugging Face folders with a lineage, quantized GGUF folders, import and export.

`folder.py` saves and loads checkpoints, `gguf_folder.py` quantized ones. `convert.py` (Hugging Face),
`meta.py`, `gguf_convert.py` and `vllm.py` import and export. Each other file is about one thing: a file
format, the names of other programs, the lineage, the chat format.
"""

from .chat_format import generation_defaults
from .convert import ImportSource, export_hf, import_hf, open_source
from .folder import (
    ModelSource,
    checkpoint_hash,
    load_config,
    load_model,
    load_tokenizer,
    load_trainable,
    save_model,
    unpacked_weights,
    write_checkpoint,
)
from .gguf_convert import export_gguf, import_gguf, quantize_folder, write_random
from .hf import config_from_hf, config_to_hf
from .lineage import Lineage, load_lineage, update_lineage
from .meta import import_meta
from .sources import resolve_model
from .vllm import export_vllm

__all__ = [
    "ImportSource",
    "Lineage",
    "ModelSource",
    "checkpoint_hash",
    "config_from_hf",
    "config_to_hf",
    "export_gguf",
    "export_hf",
    "export_vllm",
    "generation_defaults",
    "import_gguf",
    "import_hf",
    "import_meta",
    "load_config",
    "load_lineage",
    "load_model",
    "load_tokenizer",
    "load_trainable",
    "open_source",
    "quantize_folder",
    "resolve_model",
    "save_model",
    "unpacked_weights",
    "update_lineage",
    "write_checkpoint",
    "write_random",
]
