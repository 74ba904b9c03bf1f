"""Checkpoints on disk: Hugging Face's folder layout with a lineage, and imports from and exports to it.

`folder.py` saves and loads, `hf.py` knows `config.json`, `weights.py` and `write.py` the safetensors, `convert.py`
imports and exports, `meta.py` reads Meta's own files, `atomic.py` makes folders appear whole or not at all.
"""

from .convert import export_hf, import_hf
from .folder import checkpoint_hash, load, load_config, load_tokenizer, resolve, save, write_folder
from .hf import config_from_hf, config_to_hf
from .lineage import Lineage, load_lineage
from .meta import import_meta

__all__ = [
    "Lineage",
    "checkpoint_hash",
    "config_from_hf",
    "config_to_hf",
    "export_hf",
    "import_hf",
    "import_meta",
    "load",
    "load_config",
    "load_lineage",
    "load_tokenizer",
    "resolve",
    "save",
    "write_folder",
]
