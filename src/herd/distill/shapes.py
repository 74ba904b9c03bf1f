"""Plan the shapes that a student may have within a budget.

A shape is a smaller `ModelConfig`: fewer layers, FFN neurons, channels, query heads per KV group, or tokens
of the vocabulary (the "axes"). KV heads and the head dim stay. Which shape is best is only known after some
training (rankings of untrained students change within a few hundred steps, Minitron, arXiv 2407.14679). So
those with the lowest `predicted_loss_increase`, one for each set of axes, are trained for a short time and
compared (the race, `shrink.py`).

A budget of memory includes the KV cache of a full context. In a small model the cache is larger than the
weights, so the formats of weights and cache are part of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ..engine.memory import nbytes as cache_nbytes
from ..errors import ConfigError, PlanError
from ..kernels.page_layout import BYTES
from ..llama.config import ModelConfig
from ..plan.quantity import CONTEXT, COUNT, Quantity
from ..plan.ways import GGUF_FORMATS, Target, WeightFormat

AXIS_COSTS = {"n_layers": 0.55, "ffn_dim": 0.3, "n_heads": 0.35, "dim": 0.8, "vocab_size": 0.03}
"""c where removing a small fraction x of an axis costs c · x nats per token, after the student was trained.

Layers: the perplexity of TinyLlama grows by a factor of 1.058 without 2 of its 22 layers and of 1.081 without
3, that of GPT-2 by 1.09 without 2 of 12. The widths follow Minitron's order: removing FFN neurons costs less
than heads, and heads less than channels. Removing tokens of the vocabulary costs little: texts only become
longer.
"""
MIN_KEPT = {"n_layers": 0.5, "ffn_dim": 0.4, "dim": 0.6}
"""Smallest fraction of an axis that is kept. Below it, shrinking in two steps gives better students."""
CACHE_LOSS = {"bf16": 0.0, "int8": 0.002}
"""KL divergence in nats from rounding keys and values."""
BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Budget:
    """The limit that a student must meet. ``kind`` is "params", "memory" (bytes) or "speed" (tokens/s).

    ``context`` is the number of tokens of the full KV cache for memory, and of those already read for speed.
    """

    kind: str
    limit: float
    context: int = 0

    @staticmethod
    def parse(text: str, max_context: int) -> Budget:
        """Read ``params=95M``, ``memory=150MB,context=8k`` or ``speed=20tok/s``. Raises `PlanError`."""
        fields = dict(part.strip().partition("=")[::2] for part in text.split(","))
        known = [kind for kind in ("params", "memory", "speed") if kind in fields]
        if len(known) != 1 or fields.keys() - {known[0], "context"}:
            raise PlanError(f"--to {text!r}: write params=95M, memory=150MB,context=8k or speed=20tok/s")
        kind, option = known[0], f"--to {known[0]}="
        value = fields[kind].removesuffix("tok/s") if kind == "speed" else fields[kind]
        suffixes = {"params": COUNT, "memory": BYTE_UNITS, "speed": {"": 1}}[kind]
        example = {"params": "95M", "memory": "150MB", "speed": "20tok/s"}[kind]
        limit = Quantity(1e-3, 1e18, suffixes, example).parse(value, option)
        context = max_context
        if "context" in fields:
            context = int(
                Quantity(1, max_context, CONTEXT, "8k", whole=True).parse(fields["context"], "--to context=")
            )
        return Budget(kind, limit, context)


@dataclass(frozen=True)
class Shape:
    """A student: its configuration, the formats it will run in, and how much higher its loss will be."""

    config: ModelConfig
    weights: str
    kv: str
    loss_increase: float

    def label(self, teacher: ModelConfig) -> str:
        """Return a short name of what is smaller than in the teacher."""
        short = {"vocab_size": "v", "n_layers": "l", "dim": "d", "ffn_dim": "f", "n_heads": "h"}
        changed = [f"{letter}{getattr(self.config, name)}" for name, letter in short.items()
                   if getattr(self.config, name) != getattr(teacher, name)]  # fmt: skip
        return "-".join(changed) or "teacher"


def predicted_loss_increase(teacher: ModelConfig, student: ModelConfig) -> float:
    """Return the loss that a trained student adds, in nats per token: the sum of c · x / (1 - x)."""
    total = 0.0
    for name, cost in AXIS_COSTS.items():
        removed = 1 - getattr(student, name) / getattr(teacher, name)
        total += cost * removed / (1 - removed)
    return total


def resident_nbytes(config: ModelConfig, weights: WeightFormat, kv: str, context: int) -> int:
    """Return the bytes of the weights and of the KV cache of one sequence that fills ``context``."""
    return weights.nbytes(config) + cache_nbytes(config, 1, context, BYTES[kv])


def plan_shapes(
    teacher: ModelConfig, budget: Budget, vocab_sizes: Sequence[int], count: int, target: Target | None = None
) -> list[Shape]:
    """Return the ``count`` most promising shapes within a budget: at most one for each set of changed axes.

    Vocabularies of different sizes count as different. ``vocab_sizes`` are those allowed, the teacher's own
    among them if the vocabulary may stay whole. ``target`` is the machine for a budget of speed. Raises
    `PlanError` if no shape fits.
    """
    best: dict[tuple[object, ...], Shape] = {}
    for shape in _fitting(teacher, budget, vocab_sizes, target):
        axes = tuple(name for name in AXIS_COSTS if getattr(shape.config, name) != getattr(teacher, name))
        key = (axes, shape.config.vocab_size)
        if key not in best or shape.loss_increase < best[key].loss_increase:
            best[key] = shape
    if not best:
        smaller = (
            config.replace(ffn_dim=_ffn_sizes(teacher)[-1])
            for config in _smaller(teacher, vocab_sizes, packed=False)
        )
        least = min(config.n_params for config in smaller)
        raise PlanError(
            f"no student meets {budget.kind}={budget.limit:,.0f}: the smallest has {least:,} of the "
            f"{teacher.n_params:,} parameters, because at least {MIN_KEPT['n_layers']:.0%} of the layers, "
            f"{MIN_KEPT['ffn_dim']:.0%} of the FFN and {MIN_KEPT['dim']:.0%} of the width are kept. Raise "
            "the budget, allow a smaller --vocab, or shrink twice"
        )
    return sorted(best.values(), key=lambda shape: shape.loss_increase)[:count]


def _fitting(
    teacher: ModelConfig, budget: Budget, vocab_sizes: Sequence[int], target: Target | None
) -> Iterator[Shape]:
    """Yield the shape with the largest FFN within the budget for every combination of the other axes."""
    formats: Iterable[tuple[WeightFormat, str]] = [(GGUF_FORMATS[0], "bf16")]
    if budget.kind == "memory":
        formats = [(weights, kv) for weights in GGUF_FORMATS for kv in CACHE_LOSS]
    if budget.kind == "speed":
        assert target is not None
        formats = [(weights, "bf16") for weights in target.formats]

    def fits(config: ModelConfig, weights: WeightFormat, kv: str) -> bool:
        if budget.kind == "params":
            return config.n_params <= budget.limit
        if budget.kind == "memory":
            return resident_nbytes(config, weights, kv, budget.context) <= budget.limit
        assert target is not None
        return 1 / target.decode(config, weights, kv, budget.context) >= budget.limit

    for weights, kv in formats:
        for smaller in _smaller(teacher, vocab_sizes, packed=weights.packed):
            sized = [smaller.replace(ffn_dim=size) for size in _ffn_sizes(teacher)]
            config = _first_that_fits(sized, partial(fits, weights=weights, kv=kv))
            if config is not None:
                added = predicted_loss_increase(teacher, config) + weights.loss + CACHE_LOSS[kv]
                yield Shape(config, weights.name, kv, added)


def _smaller(teacher: ModelConfig, vocab_sizes: Sequence[int], *, packed: bool) -> Iterator[ModelConfig]:
    """Yield the teacher's shape with every allowed vocabulary, depth, number of heads and width."""
    group = teacher.n_heads // teacher.n_kv_heads
    for vocab in vocab_sizes:
        for layers in range(
            teacher.n_layers, max(2, math.ceil(MIN_KEPT["n_layers"] * teacher.n_layers)) - 1, -1
        ):
            for per_group in range(group, max(1, math.ceil(group / 2)) - 1, -1):
                for dim in _dims(teacher):
                    try:
                        config = teacher.replace(
                            vocab_size=vocab, n_layers=layers, n_heads=per_group * teacher.n_kv_heads, dim=dim
                        )
                    except ConfigError:  # a width that does not divide by the heads
                        continue
                    if not (packed and dim % 32):
                        yield config


def _dims(teacher: ModelConfig) -> Iterator[int]:
    """Yield the teacher's width and smaller multiples of 32, the weights in a block of GGUF."""
    yield teacher.dim
    step = 32 if teacher.dim <= 2048 else 256
    for dim in range(teacher.dim // step * step, 0, -step):
        if MIN_KEPT["dim"] * teacher.dim <= dim < teacher.dim:
            yield dim


def _ffn_sizes(teacher: ModelConfig) -> list[int]:
    """Return the teacher's FFN size and smaller ones, descending."""
    step = 64 if teacher.ffn_dim <= 4096 else 256
    smaller = range((teacher.ffn_dim - 1) // step * step, 0, -step)
    return [teacher.ffn_dim, *(size for size in smaller if size >= MIN_KEPT["ffn_dim"] * teacher.ffn_dim)]


def _first_that_fits(
    configs: Sequence[ModelConfig], fits: Callable[[ModelConfig], bool]
) -> ModelConfig | None:
    """Return the first configuration that fits, or None, by bisection. Sizes are in descending order."""
    low, high = 0, len(configs)
    while low < high:
        middle = (low + high) // 2
        if fits(configs[middle]):
            high = middle
        else:
            low = middle + 1
    return configs[low] if low < len(configs) else None
