"""How a training run is spread over devices: TP × CP × PP × DP, micro-batches, recomputation, precision,
sharding.

- TP splits every matmul of a block over ranks of one node; between the matmuls the rows are split (sequence
  parallelism).
- CP splits the sequence; K and V are gathered before attention.
- PP splits the layers into stages; each stage holds ``chunks`` pieces of its layers in turn (interleaved
  1F1B). Where
  it comes out even, the first and last stage have one layer less, for the embedding and the head (Llama 3
  paper, 3.3.2).
- DP repeats all of that; states are sharded over DP · CP: ``optimizer`` alone, ``gradients`` too, or ``all``
  (FSDP with
  weights gathered before use and freed after).

Ranks are numbered in this order, TP innermost, so that what talks most sits closest (same section).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import PlanError
from ..llama.config import ModelConfig

Recompute = Literal["plain", "none", "selective", "full"]
Shard = Literal["optimizer", "gradients", "all"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
"""What Herd's trainer may be asked for; ``none`` makes the outputs of norms and SwiGLU again, which costs
nothing."""
PLAIN_RECOMPUTES: tuple[Recompute, ...] = ("plain", "selective", "full")
"""What other trainers may be asked for: without checkpoints plain autograd keeps the input of every
matmul."""
SHARDS: tuple[Shard, ...] = ("all", "gradients", "optimizer")


@dataclass(frozen=True)
class ParallelLayout:
    """One way to spread a run; ``micro`` sequences a micro-batch."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    micro: int = 1
    chunks: int = 1
    recompute: Recompute = "none"
    precision: str = "bf16"
    shard: Shard = "all"
    async_tp: bool = False
    replicas: int = 1  # groups of DP · CP that each hold all states among them (HSDP)

    @property
    def sharers(self) -> int:
        """Ranks over which states are split."""
        return self.dp * self.cp // self.replicas

    @property
    def devices(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.tp, self.cp, self.pp, self.dp

    def __str__(self) -> str:
        return f"TP{self.tp} × CP{self.cp} × PP{self.pp} × DP{self.dp}"


@dataclass(frozen=True)
class Job:
    """What is trained: a model on batches of ``batch`` sequences of ``context`` tokens; with ``adapters``,
    only that many parameters beside a frozen model of ``frozen_bytes`` a parameter."""

    config: ModelConfig
    batch: int
    context: int
    adapters: int | None = None
    frozen_bytes: float = 2.0

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise PlanError(f"batch={self.batch} sequences: give at least 1")
        if self.context < 1:
            raise PlanError(f"context={self.context}: give at least 1 token")
        if self.context > self.config.max_context:
            raise PlanError(
                f"context={self.context:,} is beyond the model's {self.config.max_context:,}: use at most that"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.context

    @property
    def flops(self) -> float:
        """Model FLOPs of one step: what MFU counts, recomputation left out. Frozen weights have no gradient
        of their own: two thirds."""
        whole = self.tokens * self.config.flops_per_token(self.context / 2, training=True)
        return whole if self.adapters is None else whole * 2 / 3


def stage_layers(n_layers: int, pp: int) -> tuple[int, int] | None:
    """Layers of a middle stage and of the first and last one; None where they do not come out even."""
    if pp > 1 and (n_layers + 2) % pp == 0 and (n_layers + 2) // pp > 1:
        each = (n_layers + 2) // pp
        return each, each - 1
    return (n_layers // pp, n_layers // pp) if n_layers % pp == 0 else None


def check(layout: ParallelLayout, job: Job) -> None:
    """PlanError naming what does not divide and what would."""
    config = job.config
    for name in ("tp", "cp", "pp", "dp", "micro", "chunks"):
        if getattr(layout, name) < 1:
            raise PlanError(f"{name}={getattr(layout, name)}: give at least 1")
    if config.n_heads % layout.tp or config.ffn_dim % layout.tp:
        raise PlanError(
            f"tp={layout.tp} does not divide {config.n_heads} heads and an FFN of {config.ffn_dim:,}"
        )
    if layout.cp > 1 and job.context % (2 * layout.cp):
        raise PlanError(
            f"cp={layout.cp} does not cut {job.context:,} tokens into {2 * layout.cp} equal pieces"
        )
    layers = stage_layers(config.n_layers, layout.pp)
    if layers is None:
        fits = [pp for pp in range(1, config.n_layers + 1) if stage_layers(config.n_layers, pp)]
        raise PlanError(
            f"pp={layout.pp} does not divide {config.n_layers} layers: use {', '.join(map(str, fits))}"
        )
    if layout.replicas < 1 or (layout.dp * layout.cp) % layout.replicas:
        raise PlanError(f"replicas={layout.replicas} does not divide dp={layout.dp} times cp={layout.cp}")
    if layers[0] % layout.chunks or (layout.chunks > 1 and layout.pp == 1):
        raise PlanError(f"chunks={layout.chunks} does not divide the {layers[0]} layers of a stage")
    if job.batch % (layout.dp * layout.micro):
        raise PlanError(
            f"a batch of {job.batch:,} sequences does not divide into dp={layout.dp:,} times micro={layout.micro}: "
            f"use a multiple of {layout.dp * layout.micro:,}"
        )


def micro_batches(layout: ParallelLayout, job: Job) -> int:
    """Micro-batches of one step on each data-parallel rank."""
    return job.batch // (layout.dp * layout.micro)
