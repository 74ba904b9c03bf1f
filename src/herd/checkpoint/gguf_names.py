"""What GGUF calls things: tensors, the shape of a Llama, its rotary positions. Both ways.

Three translations happen here:

* **Names**: ``blk.0.attn_q.weight`` is ``model.layers.0.self_attn.q_proj.weight``.
* **Pairs**: llama.cpp rotates neighbouring channels, as Meta does, so the rows of q and k are permuted
  (`pairs.interleaved_pairs`). Blocks lie along rows, so packed rows are permuted as they are.
* **Frequencies**: Llama 3's scaling is not in the metadata but in a tensor, ``rope_freqs.weight``: what each channel
  pair's rotation speed is divided by. The scaling that gives these numbers is found again from them; files of Herd's
  carry it in ``herd.rope_scaling.*`` as well, which others ignore.

Source: llama.cpp ``convert_hf_to_gguf.py`` (LlamaModel) and ``gguf-py/gguf/constants.py``.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..llama.config import ModelConfig, RopeScaling
from ..llama.rope import inverse_frequencies
from ..quant import blocks
from ..quant.formats import F32, TYPES
from .gguf import GGUF, TensorEntry
from .pairs import half_rotation, interleaved_pairs

ROPE_FREQS = "rope_freqs.weight"
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Keys of llama.* that are read, or change nothing that is computed.
_KNOWN = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.original_context_length",
    "vocab_size",
}
# Keys that make another model of it unless they hold these values.
_ONLY: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "llama3"),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_IN_LAYER[rest.removesuffix('.weight')]}.weight"


def rotates(name: str) -> bool:
    """Whether a parameter's rows are channels that rotate (q and k)."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def to_pairs(name: str, rows: Tensor, config: ModelConfig) -> Tensor:
    """Rows of the parameter ``name`` (packed or not), from our order to GGUF's."""
    return interleaved_pairs(rows, config.head_dim) if rotates(name) else rows


def from_pairs(name: str, rows: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of `to_pairs`."""
    return half_rotation(rows, config.head_dim) if rotates(name) else rows


def model_metadata(config: ModelConfig) -> Iterator[tuple[str, str, Any]]:
    """(key, type letter, value) of ``llama.*``, and the scaling in our own words."""
    K = config.head_dim
    yield "llama.vocab_size", "I", config.vocab_size
    yield "llama.context_length", "I", config.max_context
    yield "llama.embedding_length", "I", config.dim
    yield "llama.block_count", "I", config.n_layers
    yield "llama.feed_forward_length", "I", config.ffn_dim
    yield "llama.attention.head_count", "I", config.n_heads
    yield "llama.attention.head_count_kv", "I", config.n_kv_heads
    yield "llama.attention.key_length", "I", K
    yield "llama.attention.value_length", "I", K
    yield "llama.attention.layer_norm_rms_epsilon", "f", config.norm_eps
    yield "llama.rope.freq_base", "f", config.rope_theta
    yield "llama.rope.dimension_count", "I", K
    if config.rope_scaling is not None:
        for name, value in vars(config.rope_scaling).items():
            yield f"herd.rope_scaling.{name}", "I" if isinstance(value, int) else "d", value


def config_from_gguf(file: GGUF) -> ModelConfig:
    """The model a file describes. Raises `CheckpointError` for another architecture or one that cannot be run."""
    architecture = file.require("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(f"{file.path}: architecture {architecture!r} cannot be run; only 'llama' can")
    _refuse_other_models(file)
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing; fetch the file again")
    n_heads, dim = (
        file.require("llama.attention.head_count", int),
        file.require("llama.embedding_length", int),
    )
    head_dim = file.get("llama.attention.key_length", int, 0)
    if file.get("llama.attention.value_length", int, head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: llama.attention.value_length differs from key_length={head_dim}")
    fields: dict[str, Any] = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "dim": dim,
        "n_layers": file.require("llama.block_count", int),
        "n_heads": n_heads,
        "n_kv_heads": file.get("llama.attention.head_count_kv", int, n_heads),
        "ffn_dim": file.require("llama.feed_forward_length", int),
        "head_dim": head_dim,
        "norm_eps": _short(file.require("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short(file.get("llama.rope.freq_base", float, 10_000.0)),
        "tie_embeddings": "output.weight" not in file.tensors,
        "max_context": file.require("llama.context_length", int),
    }
    try:
        plain = ModelConfig(**fields)
        rotated = file.get("llama.rope.dimension_count", int, plain.head_dim)
        if rotated != plain.head_dim:
            raise ConfigError(f"llama.rope.dimension_count={rotated} is not head_dim={plain.head_dim}")
        if file.get("llama.vocab_size", int, plain.vocab_size) != plain.vocab_size:
            raise ConfigError(f"llama.vocab_size is not the {plain.vocab_size} rows of token_embd.weight")
        # more layers than tensors: refused before any of them is named
        if plain.n_layers > len(file.tensors):
            raise ConfigError(
                f"llama.block_count={plain.n_layers}, but there are {len(file.tensors)} tensors"
            )
        return plain.replace(rope_scaling=_scaling(file, plain))
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


def check_tensors(file: GGUF, config: ModelConfig) -> dict[str, TensorEntry]:
    """Every parameter's tensor by our name, in our order. `CheckpointError` for one missing, extra or misshapen."""
    wanted: dict[str, TensorEntry] = {}
    for name, shape in config.param_shapes():
        theirs = gguf_name(name)
        if theirs not in file.tensors:
            raise CheckpointError(f"{file.path}: tensor {theirs} is missing; fetch the file again")
        entry = file.tensors[theirs]
        if entry.shape != shape:
            raise CheckpointError(
                f"{file.path}: {theirs} has shape {list(entry.shape)}, the metadata says {list(shape)}"
            )
        if entry.format.name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"):
            raise CheckpointError(
                f"{file.path}: {theirs} is {entry.format.name}, which is no type for weights"
            )
        wanted[name] = entry
    known = {entry.name for entry in wanted.values()} | {ROPE_FREQS}
    for theirs in file.tensors:
        if theirs not in known:
            raise CheckpointError(
                f"{file.path}: unexpected tensor {theirs}; this is not a Llama as it is known here"
            )
    return wanted


def rope_factors(config: ModelConfig) -> Tensor | None:
    """What each pair's rotation speed is divided by, (K / 2,) fp32; None without scaling."""
    if config.rope_scaling is None:
        return None
    return inverse_frequencies(config.replace(rope_scaling=None)) / inverse_frequencies(config)


def _scaling(file: GGUF, plain: ModelConfig) -> RopeScaling | None:
    """The scaling that gives the file's ``rope_freqs.weight``."""
    entry = file.tensors.get(ROPE_FREQS)
    if entry is None:
        return None
    if entry.format != F32 or entry.shape != (plain.head_dim // 2,):
        raise CheckpointError(
            f"{file.path}: {ROPE_FREQS} is {entry.format.name} {list(entry.shape)}, not F32 [{plain.head_dim // 2}]"
        )
    factors = blocks.decode(file.rows(ROPE_FREQS), F32)[0].clone()
    if not bool(torch.isfinite(factors).all()) or float(factors.min()) < 0.999:
        raise CheckpointError(
            f"{file.path}: {ROPE_FREQS} is not a table of factors of at least 1; fetch it again"
        )
    if bool((factors == 1).all()) and "herd.rope_scaling.factor" not in file.metadata:
        return None
    for candidate in _candidates(file, plain, factors):
        found = rope_factors(plain.replace(rope_scaling=candidate))
        if found is not None and torch.allclose(found, factors, rtol=1e-4, atol=0):
            return candidate
    raise CheckpointError(
        f"{file.path}: {ROPE_FREQS} is not Llama 3's frequency scaling, the only one that can be run"
    )


def _candidates(file: GGUF, plain: ModelConfig, factors: Tensor) -> Iterator[RopeScaling]:
    """Our own words; then the scalings Meta has used; then the solution of the blend between slow and fast channels."""
    try:
        own = {
            name: file.metadata[f"herd.rope_scaling.{name}"]
            for name in RopeScaling.__dataclass_fields__
            if f"herd.rope_scaling.{name}" in file.metadata
        }
        if len(own) == len(RopeScaling.__dataclass_fields__):
            yield RopeScaling(**own)
    except (ConfigError, TypeError):
        pass
    factor = _short(float(factors.max()))
    if factor <= 1:
        return
    for original in (8192, *(1 << n for n in range(4, 20))):
        yield RopeScaling(factor=factor, original_context=original)
    speeds = inverse_frequencies(plain).double() / (2 * math.pi)
    smooth = (1 / factors.double() - 1 / factor) / (1 - 1 / factor)
    blended = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    if int(blended.sum()) >= 2:
        # smooth = (original · speed - low) / (high - low), and low = 1 by choice: only ratios count
        x, y = speeds[blended], smooth[blended]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        intercept = y.mean() - slope * x.mean()
        if intercept < 0 and slope > 0:
            width = float(-1 / intercept)
            original = max(1, round(float(slope) * width))
            yield RopeScaling(factor=factor, high_freq_factor=1 + width, original_context=original)


def _refuse_other_models(file: GGUF) -> None:
    unknown = []
    for key, value in file.metadata.items():
        name = key.removeprefix("llama.")
        if name == key:
            continue
        if name in _ONLY and value not in _ONLY[name]:
            raise CheckpointError(f"{file.path}: {key}={value!r} cannot be run; only {_ONLY[name][0]!r} can")
        if name not in _KNOWN and name not in _ONLY:
            unknown.append(key)
    if unknown:
        warnings.warn(f"{file.path}: ignoring unknown keys {', '.join(sorted(unknown))}", stacklevel=3)


def _short(value: float) -> float:
    """The shortest decimal that is this number in single precision: 1e-5 was meant, not 9.999999747e-06."""
    try:
        if struct.unpack("<f", struct.pack("<f", value))[0] != value:
            return value
    except OverflowError:
        return value
    import numpy as np

    return float(str(np.float32(value)))


def formats_of(wanted: Mapping[str, TensorEntry]) -> list[str]:
    """The names of the formats in use, most bytes first."""
    total: dict[str, int] = {}
    for entry in wanted.values():
        total[entry.format.name] = total.get(entry.format.name, 0) + entry.nbytes
    return sorted(total, key=lambda name: (-total[name], list(TYPES).index(name)))
