"""Checkpoints on disk: Hugging Face's folder layout with a lineage, and imports from and exports to it.

`folder.py` saves and loads, `hf.py` knows `config.json`, `weights.py` and `write.py` the safetensors, `convert.py`
imports and exports, `meta.py` reads Meta's own files. The
`gguf*.py` are for quantized folders and GGUF files: `gguf.py` reads, `gguf_convert.py` quantizes, imports, exports.
"""

from .chat_format import generation_defaults
from .convert import export_hf, import_hf
from .folder import (
    checkpoint_hash,
    load_config,
    load_model,
    load_tokenizer,
    resolve_folder,
    save_model,
    write_checkpoint,
)
from .gguf_convert import ImportSource, export_gguf, import_gguf, quantize_folder, write_random
from .hf import config_from_hf, config_to_hf
from .lineage import Lineage, load_lineage, update_lineage
from .meta import import_meta
from .vllm import export_vllm

__all__ = [
    "ImportSource",
    "Lineage",
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
    "quantize_folder",
    "resolve_folder",
    "save_model",
    "update_lineage",
    "write_checkpoint",
    "write_random",
]
