"""The time of one operator on one device: the roofline model with measured efficiencies.

An operator does ``flops`` operations and moves ``nbytes``. It takes at least the time of either at the chip's
rates:

    seconds = max(flops / (peak[dtype] · fraction), nbytes / (bandwidth · fraction)) + op_seconds

The fractions are measured, never assumed to be 1: a matmul of training shapes reaches 73 % of an H100's peak,
a stream of weights 88 % of its bandwidth. They come from published measurements by kind of chip
(``machines.yaml``) or from a profile of this machine. A fraction can depend on the size of the work
(`EfficiencyCurve`), because a matmul with few rows or a read of few bytes is less efficient. ``op_seconds``
is the fixed cost of starting an operator.

Collectives use a ring: each of n ranks sends (n - 1) / n of the bytes at the link's rate, twice for an
all-reduce.

Sources: Williams, Waterman, Patterson: "Roofline" (CACM 52, 2009); NCCL's "bus bandwidth": nccl-tests,
PERFORMANCE.md.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..errors import PlanError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Kind = Literal["gemm", "attention", "attention_backward", "memory"]


@dataclass(frozen=True)
class EfficiencyCurve:
    """The reached fraction of the peak by size of the work.

    Points are (size, fraction) with rising sizes. The curve is linear between them over the logarithm of the
    size, and constant beyond both ends.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] <= 0:
            raise PlanError(f"efficiency curve sizes {sizes} must be positive and rise")
        if not all(0 < share <= 1.5 for _, share in self.points):
            raise PlanError(f"efficiency curve {self.points} has a fraction outside 0 to 1.5")

    @classmethod
    def flat(cls, share: float) -> EfficiencyCurve:
        """Return a curve with the same fraction at every size."""
        return cls(((1.0, share),))

    @classmethod
    def parse(cls, value: Any) -> Any:
        """Return the curve that a file describes by a number or by {size: fraction}."""
        if isinstance(value, Mapping):
            return cls(tuple(sorted((float(size), float(share)) for size, share in value.items())))
        return value if isinstance(value, cls) else cls.flat(float(value))

    def __call__(self, size: float) -> float:
        right = bisect.bisect(self.points, size, key=lambda point: point[0])
        if right in (0, len(self.points)):
            return self.points[max(right - 1, 0)][1]
        (low, start), (high, end) = self.points[right - 1], self.points[right]
        return start + (end - start) * math.log(size / low) / math.log(high / low)


Curve = Annotated[EfficiencyCurve, BeforeValidator(EfficiencyCurve.parse)]


@dataclass(frozen=True)
class Efficiency:
    """The fractions of the data sheet's rates that a chip reaches.

    ``gemm`` has a curve over the rows of the activation for each dtype, ``memory`` is a curve over the bytes
    that an operator moves. There are fractions for both passes of attention. Starting an operator takes
    ``op_seconds``.
    """

    gemm: Mapping[str, Curve]
    memory: Curve
    attention_forward: Positive
    attention_backward: Positive
    op_seconds: NotNegative
    source: str = ""


@dataclass(frozen=True, eq=False)
class Device:
    """An accelerator or processor: memory, bandwidth and peak rates of the data sheet, and its efficiency.

    Devices are compared by identity.
    """

    name: str
    kind: Literal["gpu", "apple", "cpu"]
    memory: Positive
    bandwidth: Positive
    flops: Annotated[Mapping[str, Positive], Field(min_length=1)]
    efficiency: Efficiency
    power: NotNegative = 0.0  # watts
    title: str = ""
    source: str = ""

    def peak(self, dtype: str) -> float:
        """Return the operations/s of the data sheet. For a missing dtype, the rate of its substitute."""
        for name in (dtype, *_INSTEAD.get(dtype, ("bf16", "fp16", "fp32"))):
            if name in self.flops:
                return self.flops[name]
        raise PlanError(f"{self.name} has no peak for {dtype}: add flops: {{{dtype}: ...}} to its entry")

    def has(self, dtype: str) -> bool:
        """Return whether the chip has instructions for this dtype."""
        return dtype in self.flops

    def reachable(self, dtype: str, rows: float = 1e9) -> float:
        """Return the operations/s that a matmul with this many rows reaches."""
        shares = self.efficiency.gemm
        measured = dtype if self.has(dtype) else "bf16"
        return self.peak(dtype) * (shares.get(measured) or next(iter(shares.values())))(rows)


_INSTEAD = {"bf16": ("fp16", "fp32"), "fp16": ("bf16", "fp32"), "fp32": ("bf16",)}
"""Substitutes for a dtype that a chip lacks. Any other dtype is unpacked to 16 or 32 bits."""


@dataclass(frozen=True)
class Op:
    """The work of one operator that runs ``count`` times: operations, bytes moved, rows of the activation."""

    name: str
    kind: Kind
    flops: float
    nbytes: float
    dtype: str = "bf16"
    rows: float = 1e9
    count: float = 1


@dataclass(frozen=True)
class Cost:
    """Seconds of an operator. ``compute`` and ``memory`` overlap, ``overhead`` adds to them."""

    compute: float = 0.0
    memory: float = 0.0
    overhead: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.overhead


def operator_cost(op: Op, device: Device) -> Cost:
    """Return the cost of one operator (``count`` times) on a device by the roofline model."""
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


def total_seconds(ops: Iterable[Op], device: Device) -> float:
    """Return the seconds of operators that run one after another."""
    return sum(operator_cost(op, device).seconds for op in ops)


@dataclass(frozen=True)
class Link:
    """A connection of devices: bytes/s in one direction per device, latency in seconds, efficiency."""

    name: str
    bandwidth: Positive
    latency: NotNegative
    efficiency: Positive
    source: str = field(default="", compare=False)

    @property
    def rate(self) -> float:
        """Bytes/s that large transfers reach."""
        return self.bandwidth * self.efficiency


NO_LINK = Link("none", 1e12, 0.0, 1.0)
"""The link of a single device. Nothing is sent over it."""


def all_gather(nbytes: float, ranks: int, link: Link) -> float:
    """Return the seconds until each rank has all ``nbytes``. A reduce-scatter takes the same time."""
    return 0.0 if ranks < 2 else nbytes * (ranks - 1) / ranks / link.rate + link.latency * math.log2(ranks)


def all_reduce(nbytes: float, ranks: int, link: Link) -> float:
    """Return the seconds until ``nbytes`` are summed over all ranks: a reduce-scatter and an all-gather."""
    return 2 * all_gather(nbytes, ranks, link)


def send(nbytes: float, link: Link) -> float:
    """Return the seconds to send ``nbytes`` from one device to the next."""
    return nbytes / link.rate + link.latency
