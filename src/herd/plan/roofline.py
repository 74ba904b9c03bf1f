"""How long one operator takes on one device: the roofline, with what chips reach of their data sheets.

An operator does ``flops`` operations and moves ``nbytes``; it can take no less time than either at the chip's
rates, so

    seconds = max(flops / (peak[dtype] · share), nbytes / (bandwidth · share)) + op_seconds

The shares are measured, never assumed to be 1: a matmul of training shapes reaches 73 % of an H100's peak, a
stream of weights 88 % of its bandwidth. They come from published measurements by kind of chip
(``machines.yaml``) or from a profile of the very machine. A share may depend on the size of the work
(`EfficiencyCurve`): a matmul with few rows, a read of few bytes. ``op_seconds`` is what every operator pays
before it does anything; it is why small work is slow.

Collectives follow the ring: each of n ranks sends (n - 1) / n of the bytes at the link's rate, twice for an
all-reduce.

Williams, Waterman, Patterson: "Roofline" (CACM 52, 2009). NCCL's "bus bandwidth": nccl-tests, PERFORMANCE.md.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import PlanError

Kind = Literal["gemm", "attention", "attention_backward", "memory"]


@dataclass(frozen=True)
class EfficiencyCurve:
    """A share of the peak by size: points (size, share) in rising order, straight between them over the
    logarithm of the size, level beyond both ends. One point is a constant."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] <= 0:
            raise PlanError(f"efficiency curve sizes {sizes} must be positive and rise")
        if not all(0 < share <= 1.5 for _, share in self.points):
            raise PlanError(f"efficiency curve {self.points} has a share outside 0 to 1.5")

    @classmethod
    def flat(cls, share: float) -> EfficiencyCurve:
        """The same share at every size."""
        return cls(((1.0, share),))

    def __call__(self, size: float) -> float:
        sizes = [at for at, _ in self.points]
        right = bisect.bisect(sizes, size)
        if right == 0 or right == len(sizes):
            return self.points[min(right, len(sizes) - 1)][1]
        (low, start), (high, end) = self.points[right - 1], self.points[right]
        return start + (end - start) * math.log(size / low) / math.log(high / low)


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet that a chip reaches: ``gemm`` by dtype over the rows of the activation,
    ``memory`` over the bytes an operator moves, attention's two passes; ``op_seconds`` to begin an
    operator."""

    gemm: Mapping[str, EfficiencyCurve]
    memory: EfficiencyCurve
    attention_forward: float
    attention_backward: float
    op_seconds: float
    source: str = ""

    def gemm_share(self, dtype: str, rows: float) -> float:
        """For a dtype that was not measured, the first that was."""
        curve = self.gemm.get(dtype) or next(iter(self.gemm.values()))
        return curve(rows)


@dataclass(frozen=True, eq=False)
class Device:
    """One accelerator or processor: bytes, bytes/s and operations/s of the data sheet, and what it reaches of
    them. Compared by identity."""

    name: str
    kind: Literal["gpu", "apple", "cpu"]
    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    efficiency: Efficiency
    power: float = 0.0  # watts
    title: str = ""
    source: str = ""

    def peak(self, dtype: str) -> float:
        """Operations/s of the data sheet; for a dtype the chip lacks, those of the one it computes in
        instead."""
        for name in (dtype, *_INSTEAD.get(dtype, ())):
            if name in self.flops:
                return self.flops[name]
        raise PlanError(f"{self.name} has no peak for {dtype}: give flops: {{{dtype}: ...}} in its entry")

    def has(self, dtype: str) -> bool:
        """Whether the chip computes in this dtype rather than in another instead."""
        return dtype in self.flops

    def reachable(self, dtype: str, rows: float = 1e9) -> float:
        """Operations/s that a matmul of this many rows reaches."""
        return self.peak(dtype) * self.efficiency.gemm_share(dtype if self.has(dtype) else "bf16", rows)


_INSTEAD = {
    "fp8": ("bf16", "fp16", "fp32"),
    "int8": ("bf16", "fp16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
    "fp32": ("bf16",),
}


@dataclass(frozen=True)
class Op:
    """Work of one operator, ``count`` times over: operations, bytes moved, the activation's rows (for
    GEMM)."""

    name: str
    kind: Kind
    flops: float
    nbytes: float
    dtype: str = "bf16"
    rows: float = 1e9
    count: float = 1


@dataclass(frozen=True)
class Cost:
    """Seconds of an operator and what bounds it: ``compute`` and ``memory`` overlap, ``overhead`` does
    not."""

    compute: float = 0.0
    memory: float = 0.0
    overhead: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.overhead

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        return max(("compute", "memory", "overhead"), key=lambda part: getattr(self, part))


def cost(op: Op, device: Device) -> Cost:
    """Roofline of one operator on a device, ``count`` times."""
    share = device.efficiency
    if op.kind == "attention":
        rate = device.peak("bf16") * share.attention_forward
    elif op.kind == "attention_backward":
        rate = device.peak("bf16") * share.attention_backward
    else:
        rate = device.reachable(op.dtype, op.rows)
    return Cost(
        op.count * op.flops / rate,
        op.count * op.nbytes / (device.bandwidth * share.memory(max(op.nbytes, 1.0))),
        op.count * share.op_seconds,
    )


def seconds(ops: Iterable[Op], device: Device) -> float:
    """Seconds of operators one after another."""
    return sum(cost(op, device).seconds for op in ops)


@dataclass(frozen=True)
class Link:
    """What joins devices: bytes/s in one direction for each of them, seconds to begin, the share that is
    reached."""

    name: str
    bandwidth: float
    latency: float
    efficiency: float
    source: str = field(default="", compare=False)

    @property
    def rate(self) -> float:
        """Bytes/s that large transfers reach."""
        return self.bandwidth * self.efficiency


def all_gather(nbytes: float, ranks: int, link: Link) -> float:
    """Seconds until each of ``ranks`` has all ``nbytes``, of which it held its part; a reduce-scatter is the
    same."""
    return 0.0 if ranks < 2 else nbytes * (ranks - 1) / ranks / link.rate + link.latency * math.log2(ranks)


def all_reduce(nbytes: float, ranks: int, link: Link) -> float:
    """Seconds until ``nbytes`` on each of ``ranks`` are summed on all: a reduce-scatter and an all-gather."""
    return 2 * all_gather(nbytes, ranks, link)


def send(nbytes: float, link: Link) -> float:
    """Seconds for ``nbytes`` from one device to the next."""
    return nbytes / link.rate + link.latency
