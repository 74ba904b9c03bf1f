"""`config.json`: Hugging Face's description of a Llama, in both of its dialects.

Meta's releases (transformers 4) put ``rope_theta`` and ``rope_scaling`` at the top; transformers 5 writes one
``rope_parameters`` holding both. Either is read, and a file that has both must agree with itself. What is written is
the release dialect by default, which every version of transformers, vLLM and llama.cpp's converter read.

A key that would change the computation into one this code does not perform is refused by name: running it anyway would
give fluent nonsense. Keys that change nothing (training hints, library versions) pass; keys nobody has heard of pass
with a warning. Torch-free.

Source: transformers `configuration_llama.py` (defaults) and `modeling_rope_utils.py` (rope types), 4.43 to 5.23.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, ConfigError
from ..llama.config import ModelConfig, RopeScaling

Dialect = Literal["rope_scaling", "rope_parameters"]

_SHAPE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "ffn_dim",
}
# What transformers assumes when the key is absent (configuration_llama.py).
_FORMAT_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_DEFAULT_ROPE_THETA = 10_000.0
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# Keys that may only hold these values; anything else is another model.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_local_experts": (None,),
}
# Keys that do not change what is computed at inference.
_HARMLESS = {
    "architectures",
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "use_cache",
    "transformers_version",
    "initializer_range",
    "pretraining_tp",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "attention_dropout",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "tie_word_embeddings",
    "head_dim",
    "num_key_value_heads",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "_attn_implementation_autoset",
    "unsloth_version",
    "unsloth_fixed",
}


def config_to_hf(
    config: ModelConfig,
    *,
    dtype: str = "bfloat16",
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    dialect: Dialect = "rope_scaling",
) -> dict[str, Any]:
    """The contents of ``config.json``. ``dtype`` is torch's name of the stored weights, e.g. ``"bfloat16"``."""
    out: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    scaling = _scaling_to_hf(config.rope_scaling)
    if dialect == "rope_scaling":
        return out | {"rope_theta": config.rope_theta, "rope_scaling": scaling, "torch_dtype": dtype}
    return out | {
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "dtype": dtype,
    }


def config_from_hf(data: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The model a ``config.json`` describes; ``where`` names it in errors.

    Raises `CheckpointError` naming the key that is missing, malformed or asks for something this model does not do.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: holds {type(data).__name__}, not a JSON object; restore the file")
    _refuse_other_models(data, where)
    fields: dict[str, Any] = {}
    for key, name in _SHAPE_KEYS.items():
        if key not in data:
            raise CheckpointError(f"{where}: {key} is missing; restore the file from the model's release")
        fields[name] = _integer(data[key], key, where)
    n_kv_heads = data.get("num_key_value_heads")
    fields["n_kv_heads"] = (
        fields["n_heads"] if n_kv_heads is None else _integer(n_kv_heads, "num_key_value_heads", where)
    )
    head_dim = data.get("head_dim")
    fields["head_dim"] = 0 if head_dim is None else _integer(head_dim, "head_dim", where)
    for key, default in _FORMAT_DEFAULTS.items():
        if data.get(key) is None:
            warnings.warn(f"{where}: {key} is missing; using the format's default {default}", stacklevel=2)
    fields["max_context"] = _integer(
        _or(data.get("max_position_embeddings"), _FORMAT_DEFAULTS["max_position_embeddings"]),
        "max_position_embeddings",
        where,
    )
    fields["norm_eps"] = _number(
        _or(data.get("rms_norm_eps"), _FORMAT_DEFAULTS["rms_norm_eps"]), "rms_norm_eps", where
    )
    fields["tie_embeddings"] = _boolean(
        _or(data.get("tie_word_embeddings"), False), "tie_word_embeddings", where
    )
    fields["rope_theta"], fields["rope_scaling"] = _rope_from_hf(data, where)
    try:
        return ModelConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def read_config(path: Path) -> ModelConfig:
    """`config_from_hf` of a file."""
    return config_from_hf(read_json(path), str(path))


def read_json(path: Path) -> Any:
    """A JSON file's value; `CheckpointError` when it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; is {path.parent} a checkpoint folder?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error}); restore the file") from error


def _refuse_other_models(data: dict[str, Any], where: str) -> None:
    if "model_type" not in data:
        raise CheckpointError(f"{where}: model_type is missing; only model_type 'llama' can be run")
    for key, allowed in _ONLY.items():
        if key in data and not any(_same(data[key], value) for value in allowed):
            shown = " or ".join(repr(value) for value in allowed)
            raise CheckpointError(f"{where}: {key}={data[key]!r} cannot be run; only {shown} can")
    unknown = sorted(set(data) - _HARMLESS - set(_ONLY) - set(_SHAPE_KEYS) - set(_FORMAT_DEFAULTS))
    if unknown:
        warnings.warn(f"{where}: ignoring unknown keys {', '.join(unknown)}", stacklevel=3)


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _rope_from_hf(data: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """theta and scaling from either dialect; both present must agree."""
    found: list[tuple[float | None, RopeScaling | None]] = []
    for key in ("rope_parameters", "rope_scaling"):
        group = data.get(key)
        if group is None:
            continue
        if not isinstance(group, dict):
            raise CheckpointError(f"{where}: {key}={group!r} is not a JSON object; restore the file")
        theta = group.get("rope_theta")
        found.append(
            (
                None if theta is None else _number(theta, f"{key}.rope_theta", where),
                _scaling_from_hf(group, key, where),
            )
        )
    thetas = {theta for theta, _ in found if theta is not None}
    if data.get("rope_theta") is not None:
        thetas.add(_number(data["rope_theta"], "rope_theta", where))
    scalings = {scaling for _, scaling in found}
    if len(thetas) > 1 or len(scalings) > 1:
        raise CheckpointError(
            f"{where}: rope_parameters, rope_scaling and rope_theta disagree; keep one of the dialects"
        )
    if not thetas:
        warnings.warn(
            f"{where}: rope_theta is missing; using the format's default {_DEFAULT_ROPE_THETA}", stacklevel=4
        )
    return (thetas.pop() if thetas else _DEFAULT_ROPE_THETA), (scalings.pop() if scalings else None)


def _scaling_from_hf(group: dict[str, Any], key: str, where: str) -> RopeScaling | None:
    kinds = {group[name] for name in ("rope_type", "type") if isinstance(group.get(name), str)}
    if len(kinds) != 1:
        raise CheckpointError(
            f"{where}: {key} needs one rope_type, got {sorted(kinds)}; use 'default' or 'llama3'"
        )
    kind = kinds.pop()
    if not _same(group.get("partial_rotary_factor", 1.0), 1.0):
        raise CheckpointError(
            f"{where}: {key}.partial_rotary_factor={group['partial_rotary_factor']!r} cannot be run"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(
            f"{where}: {key}.rope_type={kind!r} cannot be run; only 'default' and 'llama3' can"
        )
    for name in _LLAMA3_KEYS:
        if name not in group:
            raise CheckpointError(f"{where}: {key}.{name} is missing; rope_type 'llama3' needs it")
    try:
        return RopeScaling(
            factor=_number(group["factor"], f"{key}.factor", where),
            low_freq_factor=_number(group["low_freq_factor"], f"{key}.low_freq_factor", where),
            high_freq_factor=_number(group["high_freq_factor"], f"{key}.high_freq_factor", where),
            original_context=_integer(
                group["original_max_position_embeddings"], f"{key}.original_max_position_embeddings", where
            ),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {key}: {error}") from error


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _integer(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{where}: {key}={value!r} is not an integer; restore the file")
    return value


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{where}: {key}={value!r} is not a number; restore the file")
    return float(value)


def _boolean(value: Any, key: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key}={value!r} is not true or false; restore the file")
    return value
