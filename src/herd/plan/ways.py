"""The ways of running a model on a machine: weight formats, KV caches and contexts.

A `WeightFormat` says how weights are stored and multiplied. A target is a machine with formulas for bytes and
seconds: this machine, from its profile (`MeasuredTarget`), or one of the catalogue (`CatalogueTarget`). Every
combination is tried. For a model that does not fit, `smallest_change` names the smallest change that makes it
fit.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .. import units
from ..engine.memory import PREFILL_TOKENS
from ..engine.memory import nbytes as kv_nbytes
from ..errors import PlanError
from ..kernels.page_layout import BYTES
from ..llama.config import ModelConfig
from ..quant.formats import tensor_nbytes
from ..quant.mixtures import TensorScheme, mixture
from . import ops
from .machines import Machine
from .profile import SHORT_NAMES, Profile
from .roofline import Device, Op, total_seconds

CONTEXTS = (1_024, 32_768, 131_072)
KLD_SOURCE = "llama.cpp tools/perplexity/README.md, Llama 3 8B, mean KL divergence from 16 bits on Wikitext-2"
UNKNOWN_KLD = 0.02
"""KL divergence in nats assumed for a format without a published figure: between 8 and 4 bits."""
USUAL_KV = "bf16"
"""Format of the KV cache unless the user asks for fewer bits."""
READING = 5.0
"""Reading speed of a person, in tokens per second."""


@dataclass(frozen=True)
class WeightFormat:
    """A format of weights: how they are stored and multiplied.

    ``kld`` is the published mean KL divergence from 16 bits in nats, or None if it is unknown.
    """

    name: str
    dtype: str  # of the matmul, as profiles and data sheets name it
    kld: float | None
    linears: float = 0.0  # bytes per weight; a file type's depend on the model
    head: float = 2.0
    head_dtype: str = "bf16"

    @property
    def packed(self) -> bool:
        """Whether it is one of GGUF's file types, as `herd quantize` writes them."""
        return self.dtype in SHORT_NAMES.values()

    @property
    def loss(self) -> float:
        """KL divergence from 16 bits in nats: published, or `UNKNOWN_KLD`."""
        return UNKNOWN_KLD if self.kld is None else self.kld

    def stored(self, config: ModelConfig, kv: str) -> ops.Weights:
        """Return the mean bytes per weight, and those per value of a KV cache of the dtype ``kv``."""
        linears, head = _mean_nbytes(self.name, config) if self.packed else (self.linears, self.head)
        return ops.Weights(linears, head, self.dtype, BYTES[kv])

    def nbytes(self, config: ModelConfig) -> int:
        """Return the bytes of all weights in memory, exact for the formats that Herd stores."""
        if self.packed:
            return _scheme(self.name, config).resident_nbytes(config)
        head = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
        return round(self.linears * (config.n_params - head) + self.head * head)

    def loading_nbytes(self, config: ModelConfig) -> int:
        """Return the bytes needed in addition while the weights are loaded."""
        return _scheme(self.name, config).loading_nbytes(config) if self.packed else 0


@functools.cache
def _scheme(name: str, config: ModelConfig) -> TensorScheme:
    return mixture(name, config)


@functools.cache
def _mean_nbytes(name: str, config: ModelConfig) -> tuple[float, float]:
    """Return the mean bytes per weight of the layers' matrices, and those of the head."""
    plan, shapes = _scheme(name, config), list(config.param_shapes())
    layers = [
        (param, shape) for param, shape in shapes if param.startswith("model.layers.") and len(shape) > 1
    ]
    nbytes = sum(tensor_nbytes(shape, plan.formats[param]) for param, shape in layers)
    return nbytes / sum(math.prod(shape) for _, shape in layers), plan.head.bits / 8


BF16 = WeightFormat("bf16", "bf16", 0.0, 2.0)
GGUF_FORMATS = (
    BF16,
    WeightFormat("Q8_0", "q8", 0.001355, head_dtype="q8"),
    WeightFormat("Q4_K_M", "q4k", 0.031273, head_dtype="q8"),
    WeightFormat("Q4_0", "q4", 0.071940, head_dtype="q8"),
)
"""Formats that Herd runs on a CPU. A head in Q6_K is assumed to be as fast as one in Q8_0."""
GPU_FORMATS = (
    BF16,
    WeightFormat("fp8", "fp8", None, 1.0),
    WeightFormat("int8", "bf16", None, 1.0),
    WeightFormat("w4a16", "bf16", None, 0.5625),
)
"""Formats that inference engines run on accelerators.

In int8 only the weights have 8 bits. w4a16 has a 16-bit scale for each 32 weights of 4 bits.
"""


def activation_nbytes(config: ModelConfig, tokens: int, width: float) -> float:
    """Return the bytes of activations that a forward pass over ``tokens`` tokens needs at once, with logits.

    These are, with ``width`` bytes per value, the residual stream, its norm, and the FFN's gate, up and their
    product, and fp32 logits of one token.
    """
    D, F = config.dim, config.ffn_dim
    attention = 2 * config.n_heads * config.head_dim + 2 * config.n_kv_heads * config.head_dim
    return tokens * width * (2 * D + max(3 * F, 2 * attention)) + 4.0 * config.vocab_size


@dataclass(frozen=True)
class MeasuredTarget:
    """This machine by its profile, with ``capacity`` free bytes. ``factors`` multiply the predicted times."""

    profile: Profile
    capacity: float
    factors: Mapping[str, float] = field(default_factory=dict)
    name = "this machine"
    tp = 1  # ranks of tensor parallelism

    @property
    def formats(self) -> Sequence[WeightFormat]:
        return [found for found in GGUF_FORMATS if found.dtype in self.profile.gemm]

    @property
    def kv_names(self) -> Sequence[str]:
        return [kind for kind in ("bf16", "int8") if kind in self.profile.attention_decode]

    def tp_for(self, way: Way) -> int | None:
        """Return None, because there is only this machine."""
        return None

    def working_nbytes(self, config: ModelConfig, tokens: int, batch: int) -> float:
        """Return the bytes of the process itself and of activations."""
        return self.profile.base + activation_nbytes(config, min(PREFILL_TOKENS, max(tokens, batch)), 4.0)

    def decode(
        self, config: ModelConfig, weights: WeightFormat, kv: str, context: int, batch: int = 1
    ) -> float:
        """Return the seconds of one decode step of ``batch`` sequences of ``context`` tokens."""
        listed = ops.forward_ops(config, batch, context, batch * context, weights=weights.stored(config, kv))
        slower = self.profile.read / self.profile.attention_decode[kv]
        found = (self._measured_op(op, weights, slower) for op in listed)
        return self.factors.get("decode", 1.0) * total_seconds(found, self._device(weights))

    def prefill(self, config: ModelConfig, weights: WeightFormat, kv: str, tokens: int) -> float:
        """Return the seconds until a prompt's first token.

        The prompt is read in chunks of `PREFILL_TOKENS`. Each chunk attends to itself and to all tokens
        before it.
        """
        device, stored, total = self._device(weights), weights.stored(config, kv), 0.0
        for start in range(0, tokens, PREFILL_TOKENS):
            rows = min(PREFILL_TOKENS, tokens - start)
            keys = start + rows / 2
            listed = ops.forward_ops(config, rows, keys, start + rows, head_rows=0, weights=stored)
            rest = (op for op in listed if op.name not in ("head", "attention"))
            body = [self._measured_op(op, weights, None) for op in rest]
            attention = sum(op.count * op.flops for op in listed if op.name == "attention")
            total += total_seconds(body, device) + attention / self.profile.attention_prefill[kv]
        head = [self._measured_op(op, weights, None) for op in ops.head_ops(config, 1, weights=stored)]
        return self.factors.get("prefill", 1.0) * (total + total_seconds(head, device))

    def _device(self, weights: WeightFormat) -> Device:
        return self.profile.device("plain" if weights.dtype == "bf16" else "packed")

    def _measured_op(self, op: Op, weights: WeightFormat, decode_slower: float | None) -> Op:
        """Return the operator at measured rates: a matmul at its kernel's rate, others at stream rates."""
        if op.name == "head":
            return replace(op, dtype=weights.head_dtype)
        if op.kind == "attention" and decode_slower is not None:
            return replace(op, kind="memory", flops=0.0, nbytes=op.nbytes * decode_slower)
        if op.kind == "memory":  # in fp32, not bf16: twice the bytes
            return replace(op, nbytes=2 * op.nbytes * self.profile.read / self.profile.pointwise)
        return op


@dataclass(frozen=True)
class CatalogueTarget:
    """A machine of the catalogue, with weights and heads divided over ``tp`` of its devices."""

    machine: Machine
    tp: int
    kv_names = ("bf16", "int8")

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def formats(self) -> Sequence[WeightFormat]:
        if self.machine.device.kind != "gpu":
            return GGUF_FORMATS
        device = self.machine.device
        return [found for found in GPU_FORMATS if found.dtype == "bf16" or device.has(found.dtype)]

    @property
    def capacity(self) -> float:
        """Bytes for weights, KV cache and activations together. The driver or the system takes the rest."""
        device = self.machine.device
        return device.memory * {"gpu": 0.92, "apple": 0.75, "cpu": 0.9}[device.kind] * self.tp

    def tp_for(self, way: Way) -> int | None:
        """Return the number of devices (a power of two) that ``way`` needs. None: no number suffices."""
        config = way.config
        for tp in (1 << n for n in range(1, 8)):
            if self.tp < tp and not (config.n_heads % tp or config.ffn_dim % tp):
                wider = CatalogueTarget(self.machine.with_devices(tp), tp)
                working = round(wider.working_nbytes(config, way.context, way.batch))
                if replace(way, working_nbytes=working).resident <= wider.capacity:
                    return tp
        return None

    def working_nbytes(self, config: ModelConfig, tokens: int, batch: int) -> float:
        """Return the bytes of CUDA and other libraries (half a GB per device) and of activations."""
        return self.tp * 0.5e9 + activation_nbytes(config, min(8192, max(tokens, batch)), 2.0)

    def decode(
        self, config: ModelConfig, weights: WeightFormat, kv: str, context: int, batch: int = 1
    ) -> float:
        """Return the seconds of one decode step of ``batch`` sequences of ``context`` tokens."""
        stored = weights.stored(config, kv)
        return ops.decode_seconds(config, self.machine, stored, batch=batch, context=context, tp=self.tp)

    def prefill(self, config: ModelConfig, weights: WeightFormat, kv: str, tokens: int) -> float:
        """Return the seconds until a prompt's first token."""
        return ops.prefill_seconds(
            config, self.machine, weights.stored(config, kv), tokens=tokens, tp=self.tp
        )


Target = MeasuredTarget | CatalogueTarget


def catalogue_target(machine: Machine, config: ModelConfig) -> CatalogueTarget:
    """Return ``machine`` with the largest tensor parallelism that its devices and the model's heads allow."""
    powers = (1 << n for n in range(machine.count.bit_length()))
    return CatalogueTarget(machine, max(n for n in powers if not (config.n_heads % n or config.ffn_dim % n)))


@dataclass(frozen=True)
class Way:
    """One way of running a model: bytes by part, and seconds if it fits."""

    config: ModelConfig
    weights: WeightFormat
    kv: str
    context: int
    batch: int
    weights_nbytes: int
    kv_nbytes: int
    working_nbytes: int
    loading_nbytes: int
    capacity: int
    ttft: float | None = None  # of a prompt that fills the context
    step: float | None = None  # of a decode step with the context full

    @property
    def resident(self) -> int:
        """The most bytes in use at once, either while running or while loading (then without a cache)."""
        return self.weights_nbytes + self.working_nbytes + max(self.kv_nbytes, self.loading_nbytes)

    @property
    def fits(self) -> bool:
        return self.resident <= self.capacity

    @property
    def spare(self) -> int:
        """Bytes that remain for the KV cache."""
        return self.capacity - self.weights_nbytes - self.working_nbytes

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.step is None else self.batch / self.step


def plan_way(
    target: Target, config: ModelConfig, weights: WeightFormat, kv: str, context: int, batch: int = 1
) -> Way:
    """Return one way, with its times if it fits. Raises `PlanError` if the context exceeds the model's."""
    if not 1 <= context <= config.max_context:
        raise PlanError(
            f"context {context:,} is out of range: give 1 to {config.max_context:,}, the model's context"
        )
    cache, working = (
        kv_nbytes(config, batch, context, BYTES[kv]),
        target.working_nbytes(config, context, batch),
    )
    nbytes = (weights.nbytes(config), cache, round(working), weights.loading_nbytes(config))
    found = Way(config, weights, kv, context, batch, *nbytes, round(target.capacity))
    if not found.fits:
        return found
    ttft = target.prefill(config, weights, kv, context)
    return replace(found, ttft=ttft, step=target.decode(config, weights, kv, context, batch))


def plan_ways(
    target: Target, config: ModelConfig, contexts: Iterable[int] | None = None, batch: int = 1
) -> list[list[Way]]:
    """Return a row for each weight format and KV dtype, with a way for each context.

    Default contexts: `CONTEXTS`, as far as the model has them. A second KV dtype is listed only if more
    contexts fit with it.
    """
    rows: list[list[Way]] = []
    if contexts is None:
        contexts = sorted({min(length, config.max_context) for length in CONTEXTS})
    for weights in target.formats:
        before = -1
        for kv in target.kv_names:
            row = [plan_way(target, config, weights, kv, context, batch) for context in contexts]
            fitting = sum(found.fits for found in row)
            if fitting > before:
                rows.append(row)
            before = fitting
    return rows


def best_way(rows: list[list[Way]]) -> Way | None:
    """Return the recommended way, or None if nothing fits.

    Of the formats that fit at the largest number of contexts, it is the one with the smallest loss of quality
    among those that reach reading speed, or the fastest if none reaches it.
    """
    able = [row for row in rows if row[0].fits]
    if not able:
        return None
    able = [row for row in able if row[0].kv == USUAL_KV] or able
    most = max(sum(found.fits for found in row) for row in able)
    first = [row[0] for row in able if sum(found.fits for found in row) == most]
    fluent = [found for found in first if (found.tokens_per_s or 0.0) >= READING]
    if fluent:
        return min(fluent, key=lambda found: found.weights.loss)
    return max(first, key=lambda found: found.tokens_per_s or 0.0)


def smallest_change(target: Target, config: ModelConfig, context: int, batch: int = 1) -> str:
    """Return the smallest change that makes a model fit: fewer bits, a shorter context, or more memory."""
    stored = itertools.product(target.formats, target.kv_names)
    tried = [plan_way(target, config, weights, kv, context, batch) for weights, kv in stored]
    fitting = [found for found in tried if found.fits]
    if fitting:
        found = min(fitting, key=lambda way: (way.weights.loss, way.resident))
        cache = "" if found.kv == USUAL_KV else f" and an {found.kv} KV cache"
        return f"it fits with {found.weights.name} weights{cache}"
    least = min(tried, key=lambda way: way.resident)
    per_token = config.kv_nbytes_per_token(BYTES[least.kv]) * batch
    count = target.tp_for(least)
    if least.spare >= max(1024 * per_token, least.loading_nbytes):
        tokens = int(least.spare // per_token // 1024 * 1024)
        devices = "" if count is None else f"; {count} devices have room for all of it"
        return f"a context of {tokens:,} fits in {least.weights.name} with {least.kv} KV{devices}"
    more = least.resident - least.capacity
    devices = "" if count is None else f" ({count} devices instead of {target.tp})"
    return f"with {units.nbytes(more)} more memory{devices} it would fit in {least.weights.name}"
