"""Read and write `config.json`, Hugging Face's description of a Llama. Both dialects can be read.

Meta's releases (transformers 4) have ``rope_theta`` and ``rope_scaling`` at the top level. transformers 5
writes a single ``rope_parameters`` with both. Either is read, and if a file has both they must agree. Herd
writes the dialect of the releases, because every version of transformers, vLLM and llama.cpp's converter can
read it.

A key that demands an unsupported computation is refused by name, because the model would otherwise generate
fluent nonsense. Keys without effect (training hints, library versions) are ignored. Unknown keys are ignored
with a warning. The tables of keys are in `names.yaml`. This module does not import torch.

Source: transformers `configuration_llama.py` (defaults) and `modeling_rope_utils.py` (rope types), 4.43 to
5.23.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..llama.config import ModelConfig, RopeScaling
from .foreign import refuse_quantized
from .names import TABLES

_SHAPE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "ffn_dim",
}
# Values that transformers assumes if the key is absent (configuration_llama.py).
_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
# By kind of scaling (Hugging Face's rope_type), our field of RopeScaling: Hugging Face's key.
_ORIGINAL = "original_max_position_embeddings"
_SCALING_KEYS = {
    "llama3": {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")}
    | {"original_context": _ORIGINAL},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {name: name for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate")}
    | {"original_context": _ORIGINAL},
    "longrope": {"freq_factors": "short_factor", "original_context": _ORIGINAL}
    | {name: name for name in ("factor", "attention_factor")},
}
_SCALING_EXTRAS = {
    "rope_type", "type", "partial_rotary_factor", _ORIGINAL, "finetuned", "long_factor", "mscale",
    "mscale_all_dim",
}  # fmt: skip
"""Keys of a scaling that are read apart, or that say nothing about the rotation."""


def config_to_hf(
    config: ModelConfig,
    *,
    dtype: str = "bfloat16",
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> dict[str, Any]:
    """Return the content of ``config.json``.

    ``dtype`` is torch's name of the stored weights, e.g. "bfloat16".
    """
    out: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    out |= {key: getattr(config, name) for key, name in _SHAPE_KEYS.items()}
    out |= {
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        out["max_position_embeddings"] = scaling.original_context  # beyond this context the base grows
    written = None if scaling is None else _scaling_to_hf(scaling)
    return out | {"rope_theta": config.rope_theta, "rope_scaling": written, "torch_dtype": dtype}


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    """Return the entry ``rope_scaling``. "factors" becomes LongRoPE with the same factors at any length."""
    kind = "longrope" if scaling.kind == "factors" else scaling.kind
    out: dict[str, Any] = {"rope_type": kind}
    out |= {key: getattr(scaling, name) for name, key in _SCALING_KEYS[kind].items()}
    if kind == "longrope":
        factors = list(scaling.freq_factors)
        out |= {"short_factor": factors, "long_factor": factors}
    return out


def config_from_hf(data: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Return the configuration in the data of a ``config.json``. ``where`` names the file in errors.

    Raises `CheckpointError` that names the key if one is missing, malformed or unsupported.
    """
    _refuse_other_models(data, where)
    fields: dict[str, Any] = {}
    for key, name in _SHAPE_KEYS.items():
        if key not in data:
            raise CheckpointError(f"{where}: {key} is missing; restore the file from the model's release")
        fields[name] = _typed(data[key], int, key, where)
    kv_heads = 8 if data["model_type"] == "mistral" else fields["n_heads"]  # configuration_mistral.py
    fields["n_kv_heads"] = _value(data, "num_key_value_heads", int, kv_heads, where)
    fields["head_dim"] = _value(data, "head_dim", int, 0, where)
    context = _announced(data, "max_position_embeddings", int, where)
    fields["max_context"] = _within_window(data, context, where)
    fields["norm_eps"] = _announced(data, "rms_norm_eps", float, where)
    fields["tie_embeddings"] = _value(data, "tie_word_embeddings", bool, False, where)
    fields["attention_bias"] = _value(data, "attention_bias", bool, False, where)
    fields["mlp_bias"] = _value(data, "mlp_bias", bool, False, where)
    fields["rope_theta"], fields["rope_scaling"] = _rope_from_hf(data, context, where)
    try:
        return ModelConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def read_config(path: Path) -> ModelConfig:
    """Return the configuration in a file. See `config_from_hf`."""
    return config_from_hf(read_object(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `CheckpointError` if the file is missing or malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; is {path.parent} a checkpoint folder?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); restore the file") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds {type(data).__name__}, not a JSON object; restore the file")
    return data


def _refuse_other_models(data: dict[str, Any], where: str) -> None:
    refuse_quantized(data, where)
    if "model_type" not in data:
        raise CheckpointError(f"{where}: model_type is missing; only model_type 'llama' can be run")
    allowed = TABLES["hf_allowed"]
    for key, values in allowed.items():
        if key in data and not any(_same(data[key], value) for value in values):
            shown = " or ".join(repr(value) for value in values)
            raise CheckpointError(f"{where}: {key}={data[key]!r} cannot be run; only {shown} can")
    unknown = sorted(set(data) - set(TABLES["hf_known"].split()) - set(allowed))
    if unknown:
        warnings.warn(f"{where}: ignoring unknown keys {', '.join(unknown)}", stacklevel=3)


def _within_window(data: dict[str, Any], context: int, where: str) -> int:
    """Return the context within which a sliding window has no effect."""
    # Mistral's configurations have a window unless they say null (configuration_mistral.py).
    default = 4096 if data["model_type"] == "mistral" and "sliding_window" not in data else None
    window = _value(data, "sliding_window", int, default, where)
    if window is None or data.get("use_sliding_window") is False or window >= context:
        return context
    warnings.warn(
        f"{where}: attends to a sliding window of {window} tokens; the context is limited to that",
        stacklevel=4,
    )
    return window


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _rope_from_hf(data: dict[str, Any], context: int, where: str) -> tuple[float, RopeScaling | None]:
    """Return (theta, scaling) from either dialect. If both are present they must agree."""
    thetas, scalings = set(), set()
    if data.get("rope_theta") is not None:
        thetas.add(_typed(data["rope_theta"], float, "rope_theta", where))
    for key in ("rope_parameters", "rope_scaling"):
        group = data.get(key)
        if group is None:
            continue
        if not isinstance(group, dict):
            raise CheckpointError(f"{where}: {key}={group!r} is not a JSON object; restore the file")
        if group.get("rope_theta") is not None:
            thetas.add(_typed(group["rope_theta"], float, f"{key}.rope_theta", where))
        scalings.add(_scaling_from_hf(group, data.get(_ORIGINAL) or context, context, key, where))
    if len(thetas) > 1 or len(scalings) > 1:
        raise CheckpointError(f"{where}: rope_parameters, rope_scaling and rope_theta disagree")
    theta = thetas.pop() if thetas else _announced({}, "rope_theta", float, where)
    return theta, scalings.pop() if scalings else None


def _scaling_from_hf(
    group: dict[str, Any], original: int, context: int, key: str, where: str
) -> RopeScaling | None:
    """Return the scaling of one entry.

    ``original`` is the original context if the entry does not state it.
    """
    stated = {name for name, value in group.items() if value is not None and name != "rope_theta"}
    if not stated:
        return None
    kinds = {group[name] for name in ("rope_type", "type") if isinstance(group.get(name), str)}
    if len(kinds) != 1:
        raise CheckpointError(f"{where}: {key} needs one rope_type, got {sorted(kinds)}")
    kind = kinds.pop()
    if not _same(group.get("partial_rotary_factor", 1.0), 1.0):
        raise CheckpointError(
            f"{where}: {key}.partial_rotary_factor={group['partial_rotary_factor']!r} cannot be run"
        )
    if kind not in ("default", *_SCALING_KEYS):
        known = ", ".join(_SCALING_KEYS)
        raise CheckpointError(f"{where}: {key}.rope_type={kind!r} cannot be run; {known} can")
    if ignored := sorted(stated - _SCALING_EXTRAS - set(_SCALING_KEYS.get(kind, {}).values())):
        note = f"{where}: {key} has {', '.join(ignored)}, which rope_type {kind!r} does not use"
        warnings.warn(note, stacklevel=5)
    if kind == "default":
        return None
    values = dict(group)
    if kind in ("yarn", "longrope"):
        values[_ORIGINAL] = values.get(_ORIGINAL) or original
        values |= _long_context_defaults(values, kind, context, f"{where}: {key}")
    fields: dict[str, Any] = {"kind": "factors" if kind == "longrope" else kind}
    if kind == "dynamic":
        fields["original_context"] = context
    for name, theirs in _SCALING_KEYS[kind].items():
        if values.get(theirs) is not None:
            fields[name] = _scaling_value(name, values[theirs], f"{key}.{theirs}", where)
        elif kind == "llama3" or name == "freq_factors" or (name == "factor" and kind != "longrope"):
            raise CheckpointError(f"{where}: {key}.{theirs} is missing; rope_type {kind!r} needs it")
    try:
        return RopeScaling(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {key}: {error}") from error


def _long_context_defaults(values: dict[str, Any], kind: str, context: int, where: str) -> dict[str, Any]:
    """Return values of "yarn" and "longrope" that transformers derives from other keys if they are absent."""
    if kind == "longrope" and values.get("short_factor") != values.get("long_factor"):
        raise CheckpointError(f"{where}: short_factor and long_factor differ, which cannot be run")
    original = _typed(values[_ORIGINAL], int, _ORIGINAL, where)
    if original < 2:
        raise CheckpointError(f"{where}: {_ORIGINAL}={original} must be at least 2")
    stated = values.get("factor")
    factor = context / original if stated is None else _typed(stated, float, "factor", where)
    if values.get("attention_factor") is not None or factor <= 1:
        return {"factor": factor}
    growth = math.log(factor)
    if kind == "longrope":
        return {"attention_factor": math.sqrt(1 + growth / math.log(original))}
    scales = [_value(values, name, float, 0.0, where) for name in ("mscale", "mscale_all_dim")]
    numerator, denominator = (
        0.1 * scale * growth + 1 for scale in (scales if min(scales) > 0 else (1.0, 0.0))
    )
    return {"factor": factor, "attention_factor": numerator / denominator}


def _scaling_value(name: str, value: Any, key: str, where: str) -> Any:
    if name == "freq_factors":
        if not isinstance(value, list):
            raise CheckpointError(f"{where}: {key}={value!r} is not a list of numbers; restore the file")
        return tuple(_typed(number, float, key, where) for number in value)
    return _typed(value, {"original_context": int, "truncate": bool}.get(name, float), key, where)


def _announced(data: dict[str, Any], key: str, type_: type, where: str) -> Any:
    """Return the value of a key.

    If it is absent or null, warn and return the value that transformers assumes.
    """
    if data.get(key) is None:
        warnings.warn(f"{where}: {key} is missing; using the format's default {_DEFAULTS[key]}", stacklevel=4)
    return _value(data, key, type_, _DEFAULTS[key], where)


def _value(data: dict[str, Any], key: str, type_: type, default: Any, where: str) -> Any:
    value = data.get(key)
    return default if value is None else _typed(value, type_, key, where)


def _typed(value: Any, type_: type, key: str, where: str) -> Any:
    """Return ``value`` if it has the type. An integer counts as a float too, but a bool is not a number."""
    if isinstance(value, bool) != (type_ is bool) or not isinstance(value, (type_, int)):
        kind = {int: "an integer", float: "a number", bool: "true or false"}[type_]
        raise CheckpointError(f"{where}: {key}={value!r} is not {kind}; restore the file")
    try:
        return type_(value)
    except OverflowError:
        raise CheckpointError(f"{where}: {key} is beyond the range of numbers; restore the file") from None
