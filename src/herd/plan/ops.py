"""Every operator of a Llama's forward pass, with its operations and bytes: one list for prefill, decode and
training.

Legend: D model dim, H query heads, G KV heads, K head dim, F ffn dim, V vocab; rows of the activation are all
tokens that pass together. Tensor parallelism over ``tp`` ranks divides heads, F and V; up to G ranks KV heads
divide too, then they are repeated, one on each rank (as in Meta's MP16 file).

The operations are those of `ModelConfig.flops_per_token` (a test holds them equal); what is added here is how
they split into operators, and the bytes each of these moves.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PlanError
from ..llama.config import ModelConfig
from .machines import Machine
from .roofline import Device, Link, Op, all_reduce, seconds


@dataclass(frozen=True)
class Weights:
    """How weights lie in memory and what they are multiplied in: bytes a parameter, compute dtype."""

    linears: float = 2.0
    head: float = 2.0
    dtype: str = "bf16"


BF16 = Weights()
FP32 = Weights(4.0, 4.0, "fp32")
INT8 = Weights(1.0, 1.0)
INT4_G32 = Weights(0.625, 0.625)  # 4 bits and a bf16 scale and zero for each 32
FP8 = Weights(1.0, 2.0, "fp8")


def layer_ops(
    config: ModelConfig,
    rows: float,
    keys: float,
    cached: float,
    *,
    weights: Weights = BF16,
    kv_bytes: float = 2.0,
    act_bytes: float = 2.0,
    tp: int = 1,
    split_rows: bool = False,
) -> list[Op]:
    """One block over ``rows`` tokens that attend to ``keys`` others each in the mean; ``cached`` tokens of K
    and V are read in all. Decode of B sequences at context C: rows B, keys C, cached B·C. Prefill of T: T,
    T/2, T. ``split_rows``: between the matmuls each rank keeps its part of the rows (sequence parallelism),
    as training does.
    """
    if config.n_heads % tp or config.ffn_dim % tp:
        raise PlanError(
            f"tp={tp} does not divide {config.n_heads} heads and an FFN of {config.ffn_dim}: use a power of two"
        )
    D, K, F = config.dim, config.head_dim, config.ffn_dim // tp
    q, kv = config.n_heads * K // tp, max(config.n_kv_heads // tp, 1) * K
    act = act_bytes * rows
    own = D / tp if split_rows else D  # of the residual stream

    def gemm(name: str, inner: float, outer: float) -> Op:
        nbytes = weights.linears * inner * outer + act * (inner + outer)
        return Op(name, "gemm", 2 * rows * inner * outer, nbytes, weights.dtype, rows)

    def pointwise(name: str, values: float) -> Op:
        return Op(name, "memory", 0.0, act * values, "bf16", rows)

    return [
        pointwise("attention norm", 3 * own),  # the residual is added and kept: read two, write one
        gemm("qkv", D, q + 2 * kv),
        pointwise("rope", 2 * (q + kv)),
        Op(
            "attention",
            "attention",
            4 * rows * keys * q,
            act * 2 * q + kv_bytes * cached * 2 * kv,
            "bf16",
            rows,
        ),
        gemm("out", q, D),
        pointwise("ffn norm", 3 * own),
        gemm("gate up", D, 2 * F),
        pointwise("swiglu", 3 * F),
        gemm("down", F, D),
    ]


def head_ops(config: ModelConfig, rows: float, *, weights: Weights = BF16, tp: int = 1) -> list[Op]:
    """The last norm and the logits of ``rows`` tokens."""
    D, V = config.dim, config.vocab_size / tp
    return [
        Op("last norm", "memory", 0.0, 4 * rows * D),
        Op(
            "head", "gemm", 2 * rows * D * V, weights.head * D * V + 2 * rows * D + 4 * rows * V, "bf16", rows
        ),
    ]


def forward_ops(
    config: ModelConfig,
    rows: float,
    keys: float,
    cached: float,
    *,
    head_rows: float | None = None,
    weights: Weights = BF16,
    kv_bytes: float = 2.0,
    act_bytes: float = 2.0,
    tp: int = 1,
) -> list[Op]:
    """The whole forward pass on one of ``tp`` ranks; logits of ``head_rows`` tokens (default: all)."""
    block = layer_ops(
        config, rows, keys, cached, weights=weights, kv_bytes=kv_bytes, act_bytes=act_bytes, tp=tp
    )
    repeated = [Op(op.name, op.kind, op.flops, op.nbytes, op.dtype, op.rows, config.n_layers) for op in block]
    return repeated + head_ops(config, rows if head_rows is None else head_rows, weights=weights, tp=tp)


def tp_seconds(config: ModelConfig, rows: float, tp: int, link: Link, act_bytes: float = 2.0) -> float:
    """Seconds of the two all-reduces a block needs in a forward pass over ``tp`` ranks, all blocks
    together."""
    return 2 * config.n_layers * all_reduce(rows * config.dim * act_bytes, tp, link)


def decode_seconds(
    config: ModelConfig,
    machine: Machine | Device,
    *,
    batch: int = 1,
    context: int = 1,
    weights: Weights = BF16,
    kv_bytes: float = 2.0,
    tp: int = 1,
) -> float:
    """Seconds of one decode step of ``batch`` sequences that hold ``context`` tokens each, over ``tp``
    ranks."""
    device, link = _parts(machine, tp)
    ops = forward_ops(config, batch, context, batch * context, weights=weights, kv_bytes=kv_bytes, tp=tp)
    return seconds(ops, device) + tp_seconds(config, batch, tp, link)


def prefill_seconds(
    config: ModelConfig,
    machine: Machine | Device,
    *,
    tokens: int,
    weights: Weights = BF16,
    kv_bytes: float = 2.0,
    tp: int = 1,
) -> float:
    """Seconds until a prompt of ``tokens`` has its first logits, over ``tp`` ranks: the time to the first
    token."""
    device, link = _parts(machine, tp)
    ops = forward_ops(
        config, tokens, tokens / 2, tokens, head_rows=1, weights=weights, kv_bytes=kv_bytes, tp=tp
    )
    return seconds(ops, device) + tp_seconds(config, tokens, tp, link)


_NO_LINK = Link("none", 1e12, 0.0, 1.0)


def _parts(machine: Machine | Device, tp: int) -> tuple[Device, Link]:
    if isinstance(machine, Device):
        if tp > 1:
            raise PlanError(
                f"tp={tp} needs a machine with links: give a Machine, not the device {machine.name}"
            )
        return machine, _NO_LINK
    if tp > machine.count:
        raise PlanError(
            f"tp={tp} is more than the {machine.count} devices of {machine.name}: use at most that many"
        )
    return machine.device, machine.join(tp)
