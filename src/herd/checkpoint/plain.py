"""Load a folder of safetensors files.

All headers are checked against the configuration, the model is built on the meta device, and then each
tensor becomes its parameter, without initialization and without a second copy of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: str | torch.device,
    layers: torch.dtype | None = None,
) -> LlamaLM:
    """Return the model of a folder of safetensors files, in ``dtype`` (None: as stored). See `load_model`.

    ``layers`` is the dtype of the layers' matrices (default: ``dtype``).
    """
    inode = folder.stat().st_ino
    wanted = weights.check_against(config, weights.read_index(folder), folder)
    warn_of_adapter_beside_model(folder)
    dtype = weights.common_dtype(wanted, folder) if dtype is None else dtype
    known = load_lineage(folder)
    expected = known.weights_hash if known else None
    hashed = weights.BackgroundHash(wanted) if expected else None

    def read(name: str, dtype: torch.dtype) -> Tensor:
        stored = weights.read_tensor(wanted[name])
        if hashed is not None:
            hashed.add(name, stored)
        tensor = weights.cast_tensor(name, stored, dtype, folder).to(device)
        # A tensor without conversion is still mapped from the file.
        return tensor.clone() if tensor.data_ptr() == stored.data_ptr() else tensor

    model = assemble(config, read, dtype, layers, device, folder)
    differs = hashed is not None and hashed.result() != expected
    if folder.stat().st_ino != inode:  # the folder was replaced by a save: some tensors may be old
        raise CheckpointError(f"{folder}: was replaced while it was being read; load it again")
    if differs:
        raise CheckpointError(
            f"{folder}: its weights are not those that {FILE} describes; restore the folder"
        )
    return model


def assemble(
    config: ModelConfig,
    read: Callable[[str, torch.dtype], Tensor],
    dtype: torch.dtype,
    layers: torch.dtype | None,
    device: str | torch.device,
    where: Path,
) -> LlamaLM:
    """Return a model whose parameters ``read(name, dtype)`` returns one at a time. See `load_plain`.

    Raises `CheckpointError`, before anything is read, if it needs more memory than is free.
    """
    dtypes = {
        name: layers if layers is not None and "_proj." in name else dtype
        for name, _ in config.param_shapes()
    }
    if torch.device(device).type == "cpu":
        sizes = (math.prod(shape) * dtypes[name].itemsize for name, shape in config.param_shapes())
        require_memory(config, sum(sizes), where)
    model = LlamaLM.on_meta(config)
    for name, wanted in dtypes.items():
        place_parameter(model, name, read(name, wanted))
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.inv_freq = rope.inverse_frequencies(config).to(device)
    return model


def place_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter ``name`` of a model."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))
