"""The layout of a training run over devices: parallelism, micro-batches, recomputation, sharding.

- Tensor parallelism (TP) splits every matmul of a layer over the ranks of one node. Between the matmuls the
  rows of the activation are split (sequence parallelism).
- Context parallelism (CP) splits the sequence. K and V are gathered before attention.
- Pipeline parallelism (PP) splits the layers into stages. Each stage has ``chunks`` groups of layers, which
  run in turns (interleaved 1F1B). If it divides evenly, the first and the last stage have one layer less, to
  make up for the embedding and the head (Llama 3 paper, section 3.3.2).
- Data parallelism (DP) repeats all of that. States are sharded over DP · CP: only the ``optimizer``, the
  ``gradients`` too, or ``all`` (FSDP gathers weights before use and frees them afterwards).

Ranks are numbered in this order, with TP innermost, so that the ranks that communicate most are closest (same
section).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import PlanError
from ..llama.config import ModelConfig

Recompute = Literal["plain", "none", "selective", "full"]
Shard = Literal["optimizer", "gradients", "all"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
"""Recomputation in Herd's trainer. ``none`` recomputes only the outputs of norms and SwiGLU (cheap)."""
PLAIN_RECOMPUTES: tuple[Recompute, ...] = ("plain", "selective", "full")
"""Recomputation in other trainers. In ``plain``, autograd keeps the input of every matmul."""
SHARDS: tuple[Shard, ...] = ("all", "gradients", "optimizer")


@dataclass(frozen=True)
class ParallelLayout:
    """One way to spread a training run over devices. ``micro`` is the number of sequences per micro-batch."""

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
    replicas: int = 1  # groups of DP · CP ranks that each have a copy of all states (HSDP)

    @property
    def sharers(self) -> int:
        """Number of ranks over which the states are split."""
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
    """A model to train on batches of ``batch`` sequences of ``context`` tokens.

    If ``adapters`` is given, this number of parameters is trained next to a frozen model, and the frozen
    model takes ``frozen_bytes`` per parameter.
    """

    config: ModelConfig
    batch: int
    context: int
    adapters: int | None = None
    frozen_bytes: float = 2.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.context < 1:
            raise PlanError(f"batch={self.batch} sequences of context={self.context} tokens: give at least 1")
        if self.context > self.config.max_context:
            raise PlanError(f"context={self.context:,} exceeds the model's {self.config.max_context:,}")

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.context

    @property
    def flops(self) -> float:
        """Model FLOPs per step as MFU counts them, that is without recomputation.

        Frozen weights need no gradient of their own, so they count two thirds.
        """
        whole = self.tokens * self.config.flops_per_token(self.context / 2, training=True)
        return whole if self.adapters is None else whole * 2 / 3


def stage_layers(n_layers: int, pp: int) -> tuple[int, int] | None:
    """Return the layers of a middle stage and of the first and last stage, or None if they do not divide."""
    if pp > 1 and (n_layers + 2) % pp == 0 and (n_layers + 2) // pp > 1:
        each = (n_layers + 2) // pp
        return each, each - 1
    return (n_layers // pp, n_layers // pp) if n_layers % pp == 0 else None


def check_layout(layout: ParallelLayout, job: Job) -> None:
    """Raise `PlanError` if the layout does not divide the model and the batch. It says what would."""
    config = job.config
    for name in ("tp", "cp", "pp", "dp", "micro", "chunks"):
        if getattr(layout, name) < 1:
            raise PlanError(f"{name}={getattr(layout, name)}: give at least 1")
    if config.n_heads % layout.tp or config.ffn_dim % layout.tp:
        raise PlanError(f"tp={layout.tp} does not divide {config.n_heads} heads and FFN {config.ffn_dim:,}")
    if layout.cp > 1 and job.context % (2 * layout.cp):
        raise PlanError(f"cp={layout.cp} does not divide {job.context:,} tokens into {2 * layout.cp} parts")
    layers = stage_layers(config.n_layers, layout.pp)
    if layers is None:
        fits = [str(pp) for pp in range(1, config.n_layers + 1) if stage_layers(config.n_layers, pp)]
        raise PlanError(f"pp={layout.pp} does not divide {config.n_layers} layers: use {', '.join(fits)}")
    if layout.replicas < 1 or (layout.dp * layout.cp) % layout.replicas:
        raise PlanError(f"replicas={layout.replicas} does not divide dp={layout.dp} times cp={layout.cp}")
    if layers[0] % layout.chunks or (layout.chunks > 1 and layout.pp == 1):
        raise PlanError(f"chunks={layout.chunks} does not divide the {layers[0]} layers of a stage")
    if job.batch % (layout.dp * layout.micro):
        raise PlanError(
            f"a batch of {job.batch:,} sequences does not divide into dp={layout.dp:,} times "
            f"micro={layout.micro}: use a multiple of {layout.dp * layout.micro:,}"
        )


def micro_batches(layout: ParallelLayout, job: Job) -> int:
    """Return the micro-batches per step on each data-parallel rank."""
    return job.batch // (layout.dp * layout.micro)
