"""Load a folder of safetensors files.

All headers are checked against the configuration, the model is built on the meta device, and then each
tensor becomes its parameter, without initialization and without a second copy of the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..llama import rope
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from . import weights
from .adapter_config import warn_of_adapter_beside_model
from .lineage import FILE, load_lineage
from .memory import require_memory


def load_plain(
    folder: Path, config: ModelConfig, dtype: torch.dtype | None, device: str | torch.device
) -> LlamaLM:
    """Return the model of a folder of safetensors files, in ``dtype`` (None: as stored). See `load_model`."""
    inode = folder.stat().st_ino
    wanted = weights.check_against(config, weights.read_index(folder), folder)
    warn_of_adapter_beside_model(folder)
    dtype = weights.common_dtype(wanted, folder) if dtype is None else dtype
    if torch.device(device).type == "cpu":
        require_memory(config, config.nbytes(dtype.itemsize), folder)
    with torch.device("meta"):
        model = LlamaLM(config)
    known = load_lineage(folder)
    expected = known.weights_hash if known else None
    hashed = weights.BackgroundHash(wanted) if expected else None
    for name, info in wanted.items():
        stored = weights.read_tensor(info)
        if hashed is not None:
            hashed.add(name, stored)
        tensor = weights.cast_tensor(name, stored, dtype, folder).to(device)
        # A tensor without conversion is still mapped from the file.
        place_parameter(model, name, tensor.clone() if tensor.data_ptr() == stored.data_ptr() else tensor)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.inv_freq = rope.inverse_frequencies(config).to(device)
    differs = hashed is not None and hashed.result() != expected
    if folder.stat().st_ino != inode:  # the folder was replaced by a save: some tensors may be old
        raise CheckpointError(f"{folder}: was replaced while it was being read; load it again")
    if differs:
        raise CheckpointError(
            f"{folder}: its weights are not those that {FILE} describes; restore the folder"
        )
    return model


def place_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter ``name`` of a model."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))
