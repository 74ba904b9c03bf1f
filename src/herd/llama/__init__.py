"""The model: shapes without torch (`config.py`), rotary positions, attention for training, and the one
forward.

Import `ModelConfig`, `RopeScaling` and `SIZES` from here without torch; `LlamaLM` comes from
`herd.llama.model`.
"""

from .config import SIZES, ModelConfig, RopeScaling

__all__ = ["SIZES", "ModelConfig", "RopeScaling"]
