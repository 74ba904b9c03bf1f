"""Every operator of a forward pass with its operations and bytes, for decode, prefill and training.

Legend: D model dim, H query heads, G KV heads, K head dim, F FFN dim, V vocabulary. The rows of an activation
are all tokens of a forward pass. Tensor parallelism over ``tp`` ranks divides heads, F and V. KV heads are
divided too, up to G ranks. With more ranks, each has a copy of one KV head (as in Meta's MP16 files).

The operations add up to `ModelConfig.flops_per_token` (a test checks this). This file adds the split into
operators and the bytes that each operator moves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import PlanError
from ..llama.config import ModelConfig
from .machines import Machine
from .roofline import Link, Op, all_reduce, total_seconds


@dataclass(frozen=True)
class Weights:
    """Format of a model: bytes per weight and per value of the KV cache, and the compute dtype."""

    linears: float = 2.0
    head: float = 2.0
    dtype: str = "bf16"
    kv: float = 2.0


BF16 = Weights()
FP32 = Weights(4.0, 4.0, "fp32")
FP8 = Weights(1.0, 2.0, "fp8")
ACTIVATION = 2.0  # bytes per value


def layer_ops(
    config: ModelConfig, rows: float, keys: float, cached: float, *, weights: Weights = BF16, tp: int = 1,
    split_rows: bool = False,
) -> list[Op]:  # fmt: skip
    """Return the operators of one layer for ``rows`` tokens.

    Each token attends to ``keys`` others on average, and K and V of ``cached`` tokens are read in total. A
    decode step of B sequences at context C has rows B, keys C, cached B · C. A prefill of T tokens has rows
    T, keys T/2, cached T. With ``split_rows`` each rank keeps only its part of the rows between the matmuls
    (sequence parallelism), as in training.
    """
    if config.n_heads % tp or config.ffn_dim % tp:
        raise PlanError(
            f"tp={tp} does not divide {config.n_heads} heads and an FFN of {config.ffn_dim}: use a power "
            "of two"
        )
    D, K, F = config.dim, config.head_dim, config.ffn_dim // tp
    q, kv = config.n_heads * K // tp, max(config.n_kv_heads // tp, 1) * K
    act = ACTIVATION * rows
    own = D / tp if split_rows else D  # of the residual stream

    def gemm(name: str, inner: float, outer: float) -> Op:
        nbytes = weights.linears * inner * outer + act * (inner + outer)
        return Op(name, "gemm", 2 * rows * inner * outer, nbytes, weights.dtype, rows)

    def pointwise(name: str, values: float) -> Op:
        return Op(name, "memory", 0.0, act * values, "bf16", rows)

    attention_bytes = act * 2 * q + weights.kv * cached * 2 * kv
    return [
        pointwise("attention norm", 3 * own),  # adds and stores the residual: reads two, writes one
        gemm("qkv", D, q + 2 * kv),
        pointwise("rope", 2 * (q + kv)),
        Op("attention", "attention", 4 * rows * keys * q, attention_bytes, "bf16", rows),
        gemm("out", q, D),
        pointwise("ffn norm", 3 * own),
        gemm("gate up", D, 2 * F),
        pointwise("swiglu", 3 * F),
        gemm("down", F, D),
    ]


def head_ops(config: ModelConfig, rows: float, *, weights: Weights = BF16, tp: int = 1) -> list[Op]:
    """Return the operators of the last norm and of the logits for ``rows`` tokens."""
    D, V = config.dim, config.vocab_size / tp
    nbytes = weights.head * D * V + 2 * rows * D + 4 * rows * V
    return [
        Op("last norm", "memory", 0.0, 4 * rows * D),
        Op("head", "gemm", 2 * rows * D * V, nbytes, "bf16", rows),
    ]


def forward_ops(
    config: ModelConfig, rows: float, keys: float, cached: float, *, weights: Weights = BF16, tp: int = 1,
    head_rows: float | None = None,
) -> list[Op]:  # fmt: skip
    """Return the operators of a forward pass on one of ``tp`` ranks.

    Logits are computed for ``head_rows`` tokens (default: all).
    """
    layer = layer_ops(config, rows, keys, cached, weights=weights, tp=tp)
    repeated = [replace(op, count=config.n_layers) for op in layer]
    return repeated + head_ops(config, rows if head_rows is None else head_rows, weights=weights, tp=tp)


def tp_seconds(config: ModelConfig, rows: float, tp: int, link: Link) -> float:
    """Return the seconds of all all-reduces (two per layer) of a bf16 forward pass."""
    return 2 * config.n_layers * all_reduce(rows * config.dim * 2.0, tp, link)


def decode_seconds(
    config: ModelConfig, machine: Machine, weights: Weights = BF16, *, batch: int = 1, context: int = 1,
    tp: int = 1,
) -> float:  # fmt: skip
    """Return the seconds of a decode step of ``batch`` sequences of ``context`` tokens, over ``tp`` ranks."""
    ops = forward_ops(config, batch, context, batch * context, weights=weights, tp=tp)
    return _seconds(ops, config, machine, batch, tp)


def prefill_seconds(
    config: ModelConfig, machine: Machine, weights: Weights = BF16, *, tokens: int, tp: int = 1
) -> float:
    """Return the seconds from a prompt of ``tokens`` to its first logits, over ``tp`` ranks."""
    ops = forward_ops(config, tokens, tokens / 2, tokens, head_rows=1, weights=weights, tp=tp)
    return _seconds(ops, config, machine, tokens, tp)


def _seconds(ops: list[Op], config: ModelConfig, machine: Machine, rows: int, tp: int) -> float:
    if tp > machine.count:
        raise PlanError(f"tp={tp} exceeds the {machine.count} devices of {machine.name}: use a smaller tp")
    return total_seconds(ops, machine.device) + tp_seconds(config, rows, tp, machine.join(tp))
