"""Plan the memory of a chat before anything is loaded: the weights, and the keys and values of the dialog.

The rule: weights, cache and a fixed overhead must fit in the memory that is free. If the model's whole
context does not fit, the dialog is limited to what does, and one line says so. If not even a short dialog
fits, nothing is loaded, and the error names what would fit.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .. import units
from ..checkpoint import ModelSource
from ..checkpoint.catalogue import catalogue
from ..checkpoint.gguf import gguf_parts
from ..checkpoint.memory import fitting_formats
from ..dtypes import nbytes_per_value
from ..errors import CheckpointError
from ..kernels.page_layout import BYTES, PAGE
from ..llama.config import ModelConfig
from ..machine import available_memory

OVERHEAD = 300_000_000
"""Bytes for the process and the activations of a long prompt: all but weights and cache."""
MIN_CONTEXT = 2048
"""Tokens of the shortest dialog that is worth loading a model for."""


def plan_context(source: ModelSource, dtype: str | None, device: str, kv: str, asked: int | None) -> int:
    """Return the most tokens of a dialog: ``asked``, the model's context, or the number that fits.

    ``dtype`` is the dtype of unquantized weights in memory (None: as stored). Raises `CheckpointError` if
    even a short dialog, or one of ``asked`` tokens, does not fit.
    """
    config, path = source.config, source.path
    wanted = asked or config.max_context
    weights, packed = stored_nbytes(source, dtype)
    kv = _cache_dtype(kv, dtype, packed)
    free = _free(device)
    fitting = _fitting_tokens(config, kv, free - weights)
    if fitting >= wanted:
        return wanted
    if asked is None and fitting >= min(wanted, MIN_CONTEXT):
        more = "" if kv == "int8" else "; more fit with --kv int8"
        print(
            f"context limited to {fitting:,} of {wanted:,} tokens, as memory allows: "
            f"{units.nbytes(weights)} of weights, {units.nbytes(free)} free{more}",
            file=sys.stderr,
        )
        return fitting
    least = asked or min(wanted, MIN_CONTEXT)
    cache = least * config.kv_nbytes_per_token(BYTES[kv])
    raise CheckpointError(
        f"{path}: {units.nbytes(weights)} of weights and {units.nbytes(cache)} for {least:,} tokens do not "
        f"fit in {units.nbytes(free)} of free memory; {_cure(config, path, weights, cache, free, kv, least)}"
    )


def stored_nbytes(source: ModelSource, dtype: str | None) -> tuple[int, bool]:
    """Return the bytes of the weights in memory, and whether they are packed (quantized).

    ``dtype`` is the dtype of unquantized weights in memory (None: as stored).
    """
    files = gguf_parts(source.file) if source.file else source.path.glob("*.safetensors")
    weights = sum(part.stat().st_size for part in files)
    packed = source.file is not None and weights < 1.5 * source.config.n_params
    if dtype is not None and not packed:
        weights = source.config.nbytes(nbytes_per_value(dtype))
    return weights, packed


def draft_nbytes(
    draft: ModelSource, source: ModelSource, dtypes: tuple[str | None, str | None], kv: str, cache_bytes: int
) -> int:
    """Return the bytes of a draft model with a cache of as many tokens as ``cache_bytes`` of its model have.

    ``dtypes`` are those of the unquantized weights of both in memory, the draft's first.
    """
    weights, packed = stored_nbytes(draft, dtypes[0])
    theirs = _cache_dtype(kv, dtypes[0], packed)
    ours = _cache_dtype(kv, dtypes[1], stored_nbytes(source, dtypes[1])[1])
    n_tokens = cache_bytes / source.config.kv_nbytes_per_token(BYTES[ours])
    return weights + int(n_tokens * draft.config.kv_nbytes_per_token(BYTES[theirs]))


def cache_budget(config: ModelConfig, device: str, context: int, parallel: int) -> int:
    """Return the bytes of a KV cache for ``parallel`` dialogs, at most three quarters of the free memory.

    A dialog has ``context`` tokens. Called once the weights are loaded.
    """
    needed = parallel * (context + PAGE) * config.kv_nbytes_per_token(BYTES["fp32"])
    return int(min(needed, 0.75 * max(0, _free(device) - OVERHEAD)))


def _cache_dtype(kv: str, dtype: str | None, packed: bool) -> str:
    """Return the dtype of keys and values that "auto" stands for, or else ``kv``."""
    if kv != "auto":
        return kv
    return "bf16" if packed or dtype in (None, "bf16") else "fp32"


def _free(device: str) -> int:
    if device == "cpu":
        return available_memory()
    import torch

    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else available_memory()


def _fitting_tokens(config: ModelConfig, kv: str, free: int) -> int:
    """Return the tokens, in whole pages, whose keys and values fit in ``free`` bytes with the overhead."""
    per_page = PAGE * config.kv_nbytes_per_token(BYTES[kv])
    return int(max(0, free - OVERHEAD) // per_page * PAGE)


def _cure(config: ModelConfig, path: Path, weights: int, cache: float, free: int, kv: str, least: int) -> str:
    """Return a cure: a shorter dialog, a smaller cache, fewer bits per weight, or a smaller model."""
    shorter = _fitting_tokens(config, kv, free - weights)
    if shorter >= min(MIN_CONTEXT, config.max_context):
        return f"--context {shorter} would fit"
    if (
        kv != "int8"
        and config.head_dim % 32 == 0
        and _fitting_tokens(config, "int8", free - weights) >= least
    ):
        return "--kv int8 would fit"
    formats = fitting_formats(config, int(free - cache - OVERHEAD))
    smaller = [
        f"--to {name} ({units.nbytes(nbytes)})" for name, nbytes in formats.items() if nbytes < weights
    ]
    if smaller:
        return f"herd quantize {path} {smaller[0]} would fit"
    named = [  # a GGUF file takes its size in memory
        (entry.gb, name)
        for name, entry in catalogue().items()
        if entry.source.endswith(".gguf") and 1.2e9 * entry.gb + OVERHEAD < free
    ]
    return f"herd chat {max(named)[1]} would fit" if named else "close programs, or take a larger machine"
