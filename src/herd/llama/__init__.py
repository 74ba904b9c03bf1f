"""The model: shapes without torch (`config.py`), rotary positions, attention for training, the forward.

Import `ModelConfig`, `RopeScaling` and `SIZES` from here without torch. `LlamaLM` is in `herd.llama.model`.
"""

from .config import SIZES, ModelConfig, RopeScaling

__all__ = ["SIZES", "ModelConfig", "RopeScaling"]
