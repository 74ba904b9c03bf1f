"""From one folder to another: import what Hugging Face folders hold, export for other programs.

Both directions rewrite a folder tensor by tensor (one dtype, one shard size, the canonical set of tensors, one dialect
of `config.json`), so the memory needed is that of the largest tensor. What Herd does not derive from the model is kept
byte for byte: the release's own tokenizer files, generation settings, licence. Nothing is fetched or run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import TokenizerError
from ..llama.config import SIZES, ModelConfig
from . import weights
from .folder import CONFIG, GENERATION, TOKENIZER_FILES, resolve_folder, write_checkpoint
from .gguf_folder import is_gguf_folder
from .hf import Dialect, config_from_hf, config_to_hf, read_json
from .journal import key_of
from .lineage import Lineage, load_lineage
from .write import MAX_SHARD_BYTES

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE")
_KEPT = (*TOKENIZER_FILES, "chat_template.jinja", GENERATION, *LICENCE_FILES)


def import_hf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    name: str | None = None,
    progress: weights.Progress | None = None,
) -> str:
    """Rewrites a Llama in Hugging Face's layout (a folder, or ``hf:ORG/NAME``) as a checkpoint folder of Herd's.

    ``dtype`` None keeps the stored one; ``name`` None is the source's. Weights that are not finite are refused. Returns
    the hash of the weights; raises `CheckpointError`, with ``out`` as it was, for anything that cannot be read or run.
    """
    folder = resolve_folder(source)
    name = name or str(source).removeprefix("hf:").rstrip("/").split("/")[-1]
    return _rewrite(folder, Path(out), dtype, max_shard_bytes, "rope_scaling", name, notice, progress)


def export_hf(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dialect: Dialect = "rope_scaling",
    progress: weights.Progress | None = None,
) -> str:
    """Copies a checkpoint folder for another program: dtype, shard size and dialect of ``config.json`` of your choice.

    A quantized folder is unpacked, into bf16 if ``dtype`` is None.
    Returns the hash of the written weights. Raises `CheckpointError`, with ``out`` as it was.
    """
    source = resolve_folder(folder)
    if is_gguf_folder(source):
        from .gguf_convert import unpack_folder

        return unpack_folder(
            source, out, dtype=dtype or torch.bfloat16, max_shard_bytes=max_shard_bytes, progress=progress
        )
    return _rewrite(source, Path(out), dtype, max_shard_bytes, dialect, source.resolve().name, None, progress)


def released_as(config: ModelConfig) -> str | None:
    """The name in `SIZES` of this shape, whatever its context and RoPE scaling; None if Meta released no such model."""
    for size, released in SIZES.items():
        if released == config.replace(rope_scaling=released.rope_scaling, max_context=released.max_context):
            return size
    return None


def notice(config: ModelConfig) -> str | None:
    """The NOTICE Meta's licence asks for, where the shape is that of a released model."""
    size = released_as(config)
    if size is None:
        return None
    family = "Llama 3.2" if config.tie_embeddings else "Llama 3.1" if config.rope_scaling else "Meta Llama 3"
    return (
        f"{family} is licensed under the {family} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved."
    )


def _rewrite(
    source: Path,
    out: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    dialect: Dialect,
    name: str,
    notice_of: Callable[[ModelConfig], str | None] | None,
    progress: weights.Progress | None,
) -> str:
    data = read_json(source / CONFIG)
    config = config_from_hf(data, str(source / CONFIG))
    wanted = weights.check_against(config, weights.read_index(source), source)
    stored = weights.common_dtype(wanted, source)
    dtype = stored if dtype is None else dtype
    kept = {file: (source / file).read_bytes() for file in _KEPT if (source / file).exists()}
    written_config = config_to_hf(
        config,
        dtype=str(dtype).removeprefix("torch."),
        bos_token_id=data.get("bos_token_id"),
        eos_token_id=data.get("eos_token_id"),
        dialect=dialect,
    )
    licence = notice_of(config) if notice_of else None
    if licence:
        kept.setdefault("NOTICE", (licence + "\n").encode())
    kept[CONFIG] = (json.dumps(written_config, indent=2) + "\n").encode()

    def get(tensor_name: str) -> torch.Tensor:
        tensor = weights.read_tensor(tensor_name, wanted[tensor_name])
        weights.require_finite(tensor_name, tensor, source)
        return tensor

    return write_checkpoint(
        out,
        config,
        get,
        _tokenizer(source),
        dtype=dtype,
        lineage=_lineage(source, name, same_weights=dtype == stored, licence=licence),
        max_shard_bytes=max_shard_bytes,
        dialect=dialect,
        extra_files=kept,
        progress=progress,
        key=key_of(
            weights.weight_files(wanted),
            do="rewrite",
            dtype=dtype,
            shard=max_shard_bytes,
            kept=sorted(kept.items()),
        ),
    )


def _tokenizer(source: Path) -> Tokenizer | None:
    """The source's tokenizer if it is one of Llama 3's kind; else a warning, and only its files are kept."""
    if not any((source / file).exists() for file in ("tokenizer.model", "tokenizer.json")):
        warnings.warn(f"{source}: has no tokenizer; the copy will have none", stacklevel=4)
        return None
    from ..text.tokenizer import Tokenizer
    from .chat_format import with_chat_settings

    try:
        return with_chat_settings(Tokenizer.from_folder(source), source)
    except TokenizerError as error:
        warnings.warn(f"{source}: tokenizer files are copied, but cannot be used here: {error}", stacklevel=4)
        return None


def _lineage(source: Path, name: str, *, same_weights: bool, licence: str | None) -> Lineage:
    """A lineage goes along with its weights; rounded weights are a child of the exact ones."""
    known = load_lineage(source)
    if known is None:
        return Lineage(name=name, stage="imported", licence=licence)
    if same_weights:
        return known
    parents = {known.name: known.weights_hash} if known.weights_hash else {}
    return known.model_copy(update={"parents": parents})
