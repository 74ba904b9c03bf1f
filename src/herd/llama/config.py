"""The shape of a Llama: sizes, exact parameter counts, bytes and FLOPs. This module does not import torch.

The models of the family differ only in the numbers of `ModelConfig`. `SIZES` is the table of the published
ones. The accounting functions (`n_params`, `nbytes`, `flops_per_token`) are the only place for these
formulas.

Sources: "The Llama 3 Herd of Models" (arXiv 2407.21783) table 3; Meta's released `params.json` /
`config.json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

ROPE_KINDS = ("llama3", "linear", "dynamic", "yarn", "factors")


@dataclass(frozen=True)
class RopeScaling:
    """The change of RoPE's rotation speeds for a longer context (computed in `llama.rope`).

    ``kind`` is one of `ROPE_KINDS`:

    * "llama3": wavelengths above ``original_context / low_freq_factor`` are stretched by ``factor``, those
      below ``original_context / high_freq_factor`` are unchanged, and between the two they are interpolated.
    * "linear": all are stretched by ``factor`` (position interpolation, arXiv 2306.15595).
    * "dynamic": NTK-aware: the base grows with the length of a row beyond ``original_context``. Cached keys
      cannot follow that, so such a model's ``max_context`` is at most ``original_context``.
    * "yarn": pairs that turn fewer than ``beta_slow`` times within ``original_context`` are stretched, those
      that turn more than ``beta_fast`` times are not (arXiv 2309.00071). ``truncate`` rounds the borders of
      this ramp to whole pairs.
    * "factors": each pair's speed is divided by its own number in ``freq_factors``.

    ``attention_factor`` multiplies cos and sin; 0 means YaRN's ``0.1 ln(factor) + 1`` for "yarn" and 1 for
    the others.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    kind: str = "llama3"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0
    freq_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ConfigError(f"rope scaling kind={self.kind!r} is not one of {', '.join(ROPE_KINDS)}")
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ConfigError(f"rope scaling factor={self.factor} must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ConfigError(
                f"rope scaling needs 0 < low_freq_factor < high_freq_factor, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}"
            )
        if not 0 < self.beta_slow <= self.beta_fast < math.inf:
            raise ConfigError(
                f"rope scaling needs 0 < beta_slow <= beta_fast, got {self.beta_slow} and {self.beta_fast}"
            )
        if self.original_context < 1:
            raise ConfigError(f"rope scaling original_context={self.original_context} must be positive")
        object.__setattr__(self, "freq_factors", tuple(self.freq_factors))
        if (self.kind == "factors") != bool(self.freq_factors):
            raise ConfigError("rope scaling freq_factors and kind='factors' need each other")
        if not all(0 < value < math.inf for value in self.freq_factors):
            raise ConfigError("rope scaling freq_factors must be positive")
        if self.attention_factor == 0:
            implied = 0.1 * math.log(self.factor) + 1 if self.kind == "yarn" else 1.0
            object.__setattr__(self, "attention_factor", implied)
        if not 0 < self.attention_factor < math.inf:
            raise ConfigError(f"rope scaling attention_factor={self.attention_factor} must be positive")


@dataclass(frozen=True)
class ModelConfig:
    """A Llama: D ``dim``, H ``n_heads``, G ``n_kv_heads``, K ``head_dim``, F ``ffn_dim``, V ``vocab_size``.

    ``head_dim`` 0 means ``dim // n_heads``.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    head_dim: int = 0  # 0: dim // n_heads
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    max_context: int = 8192
    attention_bias: bool = False  # biases of the q, k, v and o projections
    mlp_bias: bool = False  # biases of the gate, up and down projections

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.dim % self.n_heads:  # transformers refuses it even if head_dim is given
            raise ConfigError(f"dim={self.dim} is not a multiple of n_heads={self.n_heads}")
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(f"norm_eps={self.norm_eps} must be positive")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 1):
            raise ConfigError(f"rope_theta={self.rope_theta} must be greater than 1")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "dynamic" and self.max_context > scaling.original_context:
            raise ConfigError(
                f"max_context={self.max_context} of a model with dynamic rope scaling must be at most its "
                f"original_context={scaling.original_context}"
            )
        if (
            scaling is not None
            and scaling.kind == "factors"
            and len(scaling.freq_factors) != self.head_dim // 2
        ):
            raise ConfigError(
                f"rope scaling has {len(scaling.freq_factors)} freq_factors, head_dim={self.head_dim} needs "
                f"{self.head_dim // 2}"
            )

    def replace(self, **changes: object) -> ModelConfig:
        """Return a copy with fields changed. ``head_dim=0`` derives it from ``dim`` and ``n_heads`` again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def param_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every parameter's Hugging Face name and shape, in file order, without a tied head."""
        D, K = self.dim, self.head_dim
        layer_shapes = {
            "self_attn.q_proj": (self.n_heads * K, D),
            "self_attn.k_proj": (self.n_kv_heads * K, D),
            "self_attn.v_proj": (self.n_kv_heads * K, D),
            "self_attn.o_proj": (D, self.n_heads * K),
            "mlp.gate_proj": (self.ffn_dim, D),
            "mlp.up_proj": (self.ffn_dim, D),
            "mlp.down_proj": (D, self.ffn_dim),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }
        yield "model.embed_tokens.weight", (self.vocab_size, D)
        for layer in range(self.n_layers):
            for name, shape in layer_shapes.items():
                yield f"model.layers.{layer}.{name}.weight", shape
                if (self.attention_bias and "attn" in name) or (self.mlp_bias and "mlp" in name):
                    yield f"model.layers.{layer}.{name}.bias", shape[:1]
        yield "model.norm.weight", (D,)
        if not self.tie_embeddings:
            yield "lm_head.weight", (self.vocab_size, D)

    @property
    def n_params(self) -> int:
        """Exact number of parameters (tied embeddings counted once)."""
        return sum(math.prod(shape) for _, shape in self.param_shapes())

    def nbytes(self, bytes_per_param: float = 2.0) -> int:
        """Return the bytes of the weights at a given width (2.0 for bf16)."""
        return round(self.n_params * bytes_per_param)

    def kv_nbytes_per_token(self, bytes_per_value: float = 2.0) -> int:
        """Return the bytes that one token adds to the KV cache: K and V of every layer."""
        return round(2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value)

    def flops_per_token(self, context: float = 0, *, training: bool = False) -> float:
        """Return the FLOPs of a token (2 per multiply-add), with head and attention over ``context`` keys.

        For causal training over sequences of T tokens the mean ``context`` is T / 2. Training is 3 forwards
        (one forward, two backward). Activation recomputation is not included.
        """
        D, K = self.dim, self.head_dim
        projections = D * K * (2 * self.n_heads + 2 * self.n_kv_heads) + 3 * D * self.ffn_dim
        matmul = 2 * (self.n_layers * projections + D * self.vocab_size)
        attention = 4 * self.n_layers * self.n_heads * K * context
        return (3 if training else 1) * (matmul + attention)


_LLAMA_31: dict[str, Any] = {"rope_scaling": RopeScaling(factor=8.0), "max_context": 131_072}
_LLAMA_32 = _LLAMA_31 | {"rope_scaling": RopeScaling(factor=32.0), "tie_embeddings": True}
SIZES: dict[str, ModelConfig] = {
    "405B": ModelConfig(128_256, 16_384, 126, 128, 8, 53_248, **_LLAMA_31),
    "70B": ModelConfig(128_256, 8_192, 80, 64, 8, 28_672, **_LLAMA_31),
    "8B": ModelConfig(128_256, 4_096, 32, 32, 8, 14_336, **_LLAMA_31),
    "3B": ModelConfig(128_256, 3_072, 28, 24, 8, 8_192, **_LLAMA_32),
    "1B": ModelConfig(128_256, 2_048, 16, 32, 8, 8_192, **_LLAMA_32),
}
"""The published text models: Llama 3.1 8B, 70B, 405B and Llama 3.2 1B, 3B."""


def extended(config: ModelConfig, context: int) -> ModelConfig:
    """Return ``config`` with Llama 3's frequency scaling from its first context to ``context`` tokens.

    A context that is not longer than the model's leaves the config as it is.
    """
    if context <= config.max_context:
        return config
    original = config.rope_scaling.original_context if config.rope_scaling else config.max_context
    scaling = RopeScaling(factor=context / original, original_context=original)
    return config.replace(max_context=context, rope_scaling=scaling)
