"""Save a checkpoint folder, and read all weights of a model: for training, conversion, or their hash.

The layout is Hugging Face's, so `transformers`, vLLM and llama.cpp's converter read the folder unchanged:

    config.json  generation_config.json  model.safetensors (or shards and model.safetensors.index.json)
    tokenizer.json  tokenizer_config.json  special_tokens_map.json  tokenizer.model  herd.json (lineage)

Parameters have the same names in memory and in the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import require_free_space
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..quant.linear import is_quantized
from . import weights
from .adapter_config import base_of, is_adapter
from .chat_format import require_vocabulary_fits
from .gguf import gguf_file, gguf_parts
from .gguf_folder import GGUFSource, save_quantized
from .hf import config_to_hf
from .journal import new_folder
from .lineage import Lineage
from .model_source import ModelSource, load_config
from .paths import ADAPTER, CONFIG, GENERATION, require_replaceable, write_kept
from .plain import assemble, load_plain
from .sources import resolve_model
from .stream import Progress
from .verified import hash_file
from .write import Specs, write_weights

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


def save_model(
    folder: str | Path,
    model: LlamaLM,
    tokenizer: Tokenizer | None = None,
    *,
    lineage: Lineage | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> str:
    """Write ``model`` as a checkpoint folder and return the hash of its weights.

    ``dtype`` defaults to that of the parameters. The folder appears only when it is complete, and an existing
    checkpoint at ``folder`` is replaced in one step. Raises `StorageError` if the disk is full, and
    `CheckpointError` if ``folder`` contains other files than a checkpoint's.
    """
    if is_quantized(model):
        if dtype is not None:
            raise CheckpointError(f"{folder}: a quantized model is saved as it is; leave out dtype={dtype}")
        return save_quantized(Path(folder), model, tokenizer, lineage=lineage)
    params = dict(model.named_parameters())
    if dtype is None:
        dtypes = {param.dtype for param in params.values()}
        if len(dtypes) != 1:
            raise CheckpointError(f"{folder}: parameters have several dtypes {sorted(map(str, dtypes))}")
        dtype = dtypes.pop()
    return write_checkpoint(
        folder,
        model.config,
        lambda name: _gathered(params[name]),
        tokenizer,
        dtype=dtype,
        lineage=lineage,
        max_shard_bytes=max_shard_bytes,
    )


def write_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    get: Callable[[str], Tensor],
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype,
    lineage: Lineage | None = None,
    max_shard_bytes: int | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
    key: str | None = None,
    specs: Specs | None = None,
    config_json: Mapping[str, Any] | None = None,
) -> str:
    """Write a checkpoint whose weights are produced one at a time, as `save_model` without a model in memory.

    ``get(name)`` is called once per tensor, in file order. ``extra_files`` (a release's own tokenizer files,
    a licence) are written last and may replace derived ones. With a ``key`` (`journal.key_of`), repeating an
    interrupted call continues it. ``specs`` describes the tensors (default: the model's parameters).
    ``config_json`` has further or other entries of ``config.json``.
    """
    folder = Path(folder)
    if dtype not in weights.STORABLE.values():
        raise CheckpointError(f"{folder}: dtype={dtype} cannot be stored; use float32, float16 or bfloat16")
    if tokenizer is not None:
        require_vocabulary_fits(tokenizer, config.vocab_size, folder)
    require_replaceable(folder)
    require_free_space(folder, config.nbytes(dtype.itemsize) + 1_000_000)
    with new_folder(folder, key) as (temporary, journal):
        weights_hash = write_weights(
            temporary,
            specs or {name: (shape, dtype) for name, shape in config.param_shapes()},
            get,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
            where=folder,
            journal=journal,
        )
        stops = None if tokenizer is None else sorted(tokenizer.stop_ids) or None
        bos = None if tokenizer is None else tokenizer.bos_id
        name = str(dtype).removeprefix("torch.")
        hf = config_to_hf(config, dtype=name, bos_token_id=bos, eos_token_id=stops)
        _write_json(temporary / CONFIG, hf | dict(config_json or {}))
        if tokenizer is not None:
            tokenizer.save(temporary, model_max_length=config.max_context)
            from ..text.ranks_tokenizer import RanksTokenizer  # imported already, with the tokenizer

            # Meta's own release samples with 0.6 and 0.9 by default. Defaults of other models are unknown
            # here.
            is_llama3 = isinstance(tokenizer, RanksTokenizer)
            sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9} if is_llama3 else {}
            ids = {"bos_token_id": bos, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
            _write_json(temporary / GENERATION, ids | sampling)
        if lineage is not None:
            lineage.model_copy(update={"weights_hash": weights_hash}).write(temporary)
        write_kept(temporary, extra_files or {})
    return weights_hash


def weight_reader(source: str | Path) -> Callable[[str, torch.dtype], Tensor]:
    """Return a function that reads a parameter by its name, in a dtype, also if it is stored in blocks."""
    model = ModelSource(source)
    if model.file is not None:
        return GGUFSource(model.file).weight
    wanted = weights.check_against(model.config, weights.read_index(model.path), model.path)
    return lambda name, dtype: weights.cast_tensor(name, weights.read_tensor(wanted[name]), dtype, model.path)


def load_trainable(
    source: str | Path, dtype: torch.dtype, device: str | torch.device, *, layers: torch.dtype | None = None
) -> LlamaLM:
    """Return the model that ``source`` names with plain parameters, which can be trained, in ``dtype``.

    ``layers`` is the dtype of the layers' matrices (default: ``dtype``). Nothing is in memory twice.
    """
    found = ModelSource(source)
    if found.file is None:
        model = load_plain(found.path, found.config, dtype, device, layers)
    else:
        read = weight_reader(source)
        model = assemble(
            found.config, lambda name, dtype: read(name, dtype).to(device), dtype, layers, device, found.file
        )
    return found.with_adapter(model)


def checkpoint_hash(source: str | Path) -> str:
    """Return the SHA-256 of a model's weights. It does not depend on the sharding, but on the dtype.

    For a GGUF file it is the hash of the whole file, for an adapter the hash of its base and its own file.
    Reads all weights.
    """
    folder = resolve_model(source)
    if is_adapter(folder):
        own = hash_file(folder / ADAPTER)
        return hashlib.sha256(f"{checkpoint_hash(base_of(folder))} {own}".encode()).hexdigest()
    if file := gguf_file(folder):
        hashes = [hash_file(part) for part in gguf_parts(file)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    wanted = weights.check_against(load_config(folder), weights.read_index(folder), folder)
    return weights.hash_weights(wanted)


def _gathered(param: Tensor) -> Tensor:
    """Return a parameter as one plain tensor.

    A parameter sharded by FSDP2 is gathered. All ranks must call this in the same order.
    """
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
