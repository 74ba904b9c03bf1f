"""Convert the configuration of a Llama, with its RoPE scaling, to GGUF's metadata and back.

A GGUF file states RoPE scaling in two places. ``llama.rope.scaling.*`` has "linear" and "yarn". Llama 3's
scaling is in the tensor ``rope_freqs.weight``: divisors of the rotation speed of each pair of channels.
Reading computes the combined effect of the two and returns a scaling with the same effect. Files that Herd
writes also have the scaling in ``herd.rope_scaling.*``. Other programs ignore these keys.

Source: llama.cpp ``convert_hf_to_gguf.py`` (LlamaModel), ``gguf-py/gguf/constants.py``, and
``llama-model.cpp`` and ``llama-context.cpp`` for what an absent key means. torch is imported only for a file
with RoPE scaling.
"""

from __future__ import annotations

import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from ..llama.config import SIZES, ModelConfig, RopeScaling
from ..quant.formats import F32
from .gguf import EMBEDDING, GGUF, TensorEntry
from .lineage import released_as
from .names import PARTIAL_BIASES, TABLES, gguf_name

if TYPE_CHECKING:
    from torch import Tensor

ROPE_FREQS = "rope_freqs.weight"
_ATTENTION_BIAS = re.compile(r"blk\.\d+\.attn_(q|k|v|output)\.bias")
_MLP_BIAS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.bias")
# Formats that a file may contain but that are not for weights.
_NOT_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")


def model_metadata(config: ModelConfig) -> Iterator[tuple[str, str, Any]]:
    """Yield (key, type, value) for ``llama.*`` and for the scaling under Herd's own keys."""
    integers = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_context,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }
    for key, number in integers.items():
        yield f"llama.{key}", "UINT32", number
    yield "llama.attention.layer_norm_rms_epsilon", "FLOAT32", config.norm_eps
    yield "llama.rope.freq_base", "FLOAT32", config.rope_theta
    scaling = config.rope_scaling
    if scaling is None:
        yield "llama.rope.scaling.type", "STRING", "none"
        return
    amplitude = scaling.attention_factor
    if scaling.kind == "linear" or _is_plain_yarn(scaling):
        yield "llama.rope.scaling.type", "STRING", scaling.kind
        yield "llama.rope.scaling.factor", "FLOAT32", scaling.factor
    if _is_plain_yarn(scaling):
        yield "llama.rope.scaling.original_context_length", "UINT32", scaling.original_context
        amplitude /= 0.1 * math.log(scaling.factor) + 1
    if not math.isclose(amplitude, 1, rel_tol=1e-6):
        yield "llama.rope.scaling.attn_factor", "FLOAT32", amplitude
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT64", str: "STRING"}
    for name, value in vars(scaling).items():
        if name != "freq_factors":  # those are in the tensor
            yield f"herd.rope_scaling.{name}", types[type(value)], value


def config_from_gguf(file: GGUF) -> ModelConfig:
    """Return the configuration in a file. Raises `CheckpointError` for another architecture."""
    if file.get("split.no", int, 0) > 0:
        first = re.sub(r"-\d{5}-of-", "-00001-of-", file.path.name)
        raise CheckpointError(f"{file.path}: is not the first part of a split file; give {first}")
    architecture = file.require("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(f"{file.path}: architecture {architecture!r} cannot be run; only 'llama' can")
    _refuse_other_models(file)
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor {EMBEDDING} is missing; fetch the file again")
    n_heads = file.require("llama.attention.head_count", int)
    head_dim = file.get("llama.attention.key_length", int, 0)
    if file.get("llama.attention.value_length", int, head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: llama.attention.value_length differs from key_length={head_dim}")
    fields: dict[str, Any] = {
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "dim": file.require("llama.embedding_length", int),
        "n_layers": file.require("llama.block_count", int),
        "n_heads": n_heads,
        "n_kv_heads": file.get("llama.attention.head_count_kv", int, n_heads),
        "ffn_dim": file.require("llama.feed_forward_length", int),
        "head_dim": head_dim,
        "norm_eps": _short(file.require("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short(file.get("llama.rope.freq_base", float, 10_000.0)),
        "tie_embeddings": "output.weight" not in file.tensors,
        "max_context": _within_window(file),
        "attention_bias": any(_ATTENTION_BIAS.search(name) for name in file.tensors),
        "mlp_bias": any(_MLP_BIAS.search(name) for name in file.tensors),
    }
    try:
        plain = ModelConfig(**fields)
        rotated = file.get("llama.rope.dimension_count", int, plain.head_dim)
        if rotated != plain.head_dim:
            raise ConfigError(f"llama.rope.dimension_count={rotated} is not head_dim={plain.head_dim}")
        if file.get("llama.vocab_size", int, plain.vocab_size) != plain.vocab_size:
            raise ConfigError(f"llama.vocab_size is not the {plain.vocab_size} rows of token_embd.weight")
        # refuses a huge number of layers before their names are made
        if plain.n_layers > len(file.tensors):
            raise ConfigError(f"llama.block_count={plain.n_layers}, but it has {len(file.tensors)} tensors")
        return plain.replace(rope_scaling=_scaling(file, plain))
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


def check_tensors(file: GGUF, config: ModelConfig) -> dict[str, TensorEntry]:
    """Return every parameter's tensor by Herd's name, in Herd's order.

    Raises `CheckpointError` if a tensor is missing, unexpected or of the wrong shape.
    """
    wanted: dict[str, TensorEntry] = {}
    for name, shape in config.param_shapes():
        theirs = gguf_name(name)
        if theirs not in file.tensors:
            cure = "fetch the file again"
            if name.endswith(".bias"):
                cure = PARTIAL_BIASES
            raise CheckpointError(f"{file.path}: tensor {theirs} is missing; {cure}")
        entry = file.tensors[theirs]
        if entry.shape != shape:
            raise CheckpointError(f"{file.path}: {theirs} has shape {list(entry.shape)}, not {list(shape)}")
        if entry.format.name in _NOT_WEIGHTS:
            raise CheckpointError(
                f"{file.path}: {theirs} is {entry.format.name}, which is not a type for weights"
            )
        wanted[name] = entry
    known = {entry.name for entry in wanted.values()} | {ROPE_FREQS}
    for theirs in file.tensors:
        if theirs not in known:
            raise CheckpointError(f"{file.path}: unexpected tensor {theirs}; this is not a Llama")
    return wanted


def rope_factors(config: ModelConfig) -> Tensor | None:
    """Return ``rope_freqs.weight``, the divisors of each pair's rotation speed: (K/2,) fp32.

    None if the metadata states the scaling ("linear", "yarn") or if there is none to state ("dynamic" scaling
    has no effect within the model's context).
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind in ("linear", "dynamic") or _is_plain_yarn(scaling):
        return None
    return _divisors(config)


def _divisors(config: ModelConfig) -> Tensor:
    from ..llama.rope import inverse_frequencies

    return inverse_frequencies(config.replace(rope_scaling=None)) / inverse_frequencies(config)


def _is_plain_yarn(scaling: RopeScaling) -> bool:
    """Return whether llama.cpp can compute this scaling from the metadata. It reads no further options."""
    return scaling.kind == "yarn" and scaling.truncate and (scaling.beta_fast, scaling.beta_slow) == (32, 1)


def _within_window(file: GGUF) -> int:
    """Return the context within which a sliding window has no effect."""
    context = file.require("llama.context_length", int)
    window = file.get("llama.attention.sliding_window", int, 0)
    if not 0 < window < context:
        return context
    warnings.warn(
        f"{file.path}: attends to a sliding window of {window} tokens; the context is limited to that",
        stacklevel=4,
    )
    return window


def _scaling(file: GGUF, plain: ModelConfig) -> RopeScaling | None:
    """Return the scaling with the combined effect of the file's metadata and ``rope_freqs.weight``."""
    if ROPE_FREQS not in file.tensors and not any(
        "rope.scal" in key or "rope_scal" in key for key in file.metadata
    ):
        return _release_scaling(file, plain)
    import torch

    stated = _stated(file, plain)
    divisors = _divisors(plain.replace(rope_scaling=stated))
    amplitude = (stated.attention_factor if stated else 1.0) * file.get(
        "llama.rope.scaling.attn_factor", float, 1.0
    )
    if not 0 < amplitude < math.inf:
        raise ConfigError(f"llama.rope.scaling.attn_factor gives an attention factor of {amplitude}")
    if ROPE_FREQS in file.tensors:
        divisors = divisors * _stored_factors(file, plain)
    own = _own(file, divisors)
    if own is None and amplitude == 1 and bool((divisors == 1).all()):
        return None
    for candidate in (own, stated, *_llama3_candidates(plain, divisors)):
        if candidate is None or not math.isclose(candidate.attention_factor, amplitude, rel_tol=1e-5):
            continue
        with suppress(ConfigError):  # Herd's keys may not fit the file's other numbers
            found = _divisors(plain.replace(rope_scaling=candidate))
            if torch.allclose(found, divisors, rtol=1e-4, atol=0):
                return candidate
    return RopeScaling(
        1.0,
        original_context=plain.max_context,
        kind="factors",
        attention_factor=amplitude,
        freq_factors=tuple(divisors.tolist()),
    )


def _stated(file: GGUF, plain: ModelConfig) -> RopeScaling | None:
    """Return the scaling of ``llama.rope.scaling.*``. A factor without a type means "linear"."""
    kind = file.get("llama.rope.scaling.type", str, "linear")
    old = file.get("llama.rope.scale_linear", float, 0.0)
    factor = _short(file.get("llama.rope.scaling.factor", float, old))
    if kind == "llama3" and ROPE_FREQS not in file.tensors:
        raise ConfigError(f"llama.rope.scaling.type='llama3' needs {ROPE_FREQS}, which is missing")
    if kind not in ("linear", "yarn") or factor in (0, 1):
        return None
    if kind == "linear":
        return RopeScaling(factor, kind=kind)
    original = file.get("llama.rope.scaling.original_context_length", int, plain.max_context)
    return RopeScaling(factor, original_context=original, kind=kind)


def _own(file: GGUF, divisors: Tensor) -> RopeScaling | None:
    """Return the scaling of Herd's own keys. Its ``freq_factors`` are only in the tensor."""
    names = [
        name for name in RopeScaling.__dataclass_fields__ if f"herd.rope_scaling.{name}" in file.metadata
    ]
    fields: dict[str, Any] = {name: file.metadata[f"herd.rope_scaling.{name}"] for name in names}
    if fields.get("kind") == "factors":
        fields["freq_factors"] = tuple(divisors.tolist())
    with suppress(ConfigError, TypeError):  # from another program or damaged: the file's other numbers decide
        if fields:
            return RopeScaling(**fields)
    return None


def _stored_factors(file: GGUF, plain: ModelConfig) -> Tensor:
    import torch

    from ..quant import blocks

    entry = file.tensors[ROPE_FREQS]
    if entry.format != F32 or entry.shape != (plain.head_dim // 2,):
        stored = f"{entry.format.name} {list(entry.shape)}"
        raise CheckpointError(f"{file.path}: {ROPE_FREQS} is {stored}, not F32 [{plain.head_dim // 2}]")
    factors = blocks.decode(file.rows(ROPE_FREQS), F32)[0].clone()
    if not bool(torch.isfinite(factors).all()) or float(factors.min()) <= 0:
        raise CheckpointError(f"{file.path}: {ROPE_FREQS} has factors that are not positive; fetch it again")
    return factors


def _release_scaling(file: GGUF, plain: ModelConfig) -> RopeScaling | None:
    """Return the scaling of a released Llama 3.1 or 3.2 if an early converter left it out."""
    size = released_as(plain)
    if size is None or plain.max_context != SIZES[size].max_context:
        return None
    warnings.warn(
        f"{file.path}: has no {ROPE_FREQS}, as files of early converters; using the RoPE scaling of Llama "
        f"3's {size}, whose shape and context it has",
        stacklevel=5,
    )
    return SIZES[size].rope_scaling


def _llama3_candidates(plain: ModelConfig, factors: Tensor) -> Iterator[RopeScaling]:
    """Yield the scalings that Meta has used, then a scaling fitted to the blended factors."""
    factor = _short(float(factors.max()))
    if factor <= 1:
        return
    for original in (8192, *(1 << n for n in range(4, 20))):
        yield RopeScaling(factor=factor, original_context=original)
    from ..llama.rope import inverse_frequencies

    speeds = inverse_frequencies(plain).double() / (2 * math.pi)
    smooth = (1 / factors.double() - 1 / factor) / (1 - 1 / factor)
    blended = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    if int(blended.sum()) >= 2:
        # smooth = (original · speed - low) / (high - low), where low = 1 may be chosen: only ratios matter
        x, y = speeds[blended], smooth[blended]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        intercept = y.mean() - slope * x.mean()
        if intercept < 0 and slope > 0:
            width = float(-1 / intercept)
            original = max(1, round(float(slope) * width))
            yield RopeScaling(factor=factor, high_freq_factor=1 + width, original_context=original)


def _refuse_other_models(file: GGUF) -> None:
    allowed, known, unknown = TABLES["gguf_allowed"], TABLES["gguf_known"].split(), []
    for key, value in file.metadata.items():
        name = key.removeprefix("llama.")
        if name == key:
            continue
        if name in allowed and value not in allowed[name]:
            raise CheckpointError(f"{file.path}: {key}={value!r} cannot be run, only {allowed[name][0]!r}")
        if name not in known and name not in allowed:
            unknown.append(key)
    if unknown:
        warnings.warn(f"{file.path}: ignoring unknown keys {', '.join(sorted(unknown))}", stacklevel=3)


def _short(value: float) -> float:
    """Return the shortest decimal with this value in single precision: 1e-5 for 9.999999747e-06."""
    try:
        if struct.unpack("<f", struct.pack("<f", value))[0] != value:
            return value
    except OverflowError:
        return value
    import numpy as np

    return float(str(np.float32(value)))
