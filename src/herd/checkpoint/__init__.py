"""Checkpoints on disk: Hugging Face's folder layout with a lineage, and imports from and exports to it.

`folder.py` saves and loads, `hf.py` knows `config.json`, `weights.py` the safetensors, `meta.py` Meta's own files.
"""

from .folder import checkpoint_hash, load, load_config, load_tokenizer, resolve, save, write_folder
from .hf import config_from_hf, config_to_hf
from .lineage import Lineage, load_lineage

__all__ = [
    "Lineage",
    "checkpoint_hash",
    "config_from_hf",
    "config_to_hf",
    "load",
    "load_config",
    "load_lineage",
    "load_tokenizer",
    "resolve",
    "save",
    "write_folder",
]
