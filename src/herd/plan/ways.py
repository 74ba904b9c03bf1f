"""The ways of running a model on a machine: weights × KV cache × context, with bytes, seconds and the loss of
quality.

A *form* says how weights are stored and multiplied; a *target* is a machine that can be asked for bytes and
seconds: this one, from its profile (`Here`), or one of the catalogue (`There`). Every way is tried; what does
not fit comes with the smallest change that makes it fit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..engine.memory import PREFILL_TOKENS
from ..engine.memory import nbytes as kv_nbytes
from ..errors import PlanError
from ..kernels.page_layout import BYTES
from ..llama.config import SIZES, ModelConfig
from ..quant.formats import scheme
from . import ops
from .machines import Machine
from .profile import Profile
from .roofline import Device, Op, seconds

CONTEXTS = (1_024, 32_768, 131_072)
BEHIND_KLD = "llama.cpp tools/perplexity/README.md, Llama 3 8B, mean KL divergence from 16 bits on Wikitext-2"


@dataclass(frozen=True)
class Form:
    """How weights lie and are multiplied. ``kld``: published mean KL divergence in nats from 16 bits, None:
    unknown."""

    name: str
    linears: float  # bytes a weight
    head: float
    dtype: str  # of the matmul, as profiles and data sheets name it
    head_dtype: str
    kld: float | None

    def nbytes(self, config: ModelConfig) -> int:
        """Bytes of all weights in memory, exact for the formats that are stored by Herd."""
        if self.packed:
            return _blocks_nbytes(self.name, config)
        head = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
        return round(self.linears * (config.n_params - head) + self.head * head)

    @property
    def packed(self) -> bool:
        return self.name in ("q8", "q4k", "q4")

    def loading_nbytes(self, config: ModelConfig) -> int:
        """Bytes on top while the weights are loaded."""
        return scheme(self.name).loading_nbytes(config) if self.packed else 0


@functools.cache
def _blocks_nbytes(name: str, config: ModelConfig) -> int:
    return scheme(name).resident_nbytes(config)


def _packed(name: str, kld: float) -> Form:
    parts = scheme(name)
    head = {"Q8_0": "q8", "Q4_K": "q4k", "Q4_0": "q4"}[parts.head.name]
    return Form(name, parts.linears.bits / 8, parts.head.bits / 8, name, head, kld)


BF16 = Form("bf16", 2.0, 2.0, "bf16", "bf16", 0.0)
GGUF_FORMS = (BF16, _packed("q8", 0.001355), _packed("q4k", 0.043136), _packed("q4", 0.071940))
"""What Herd runs on a processor. KLD of q4k is that of Q4_K_S, which is nearest."""
FP8 = Form("fp8", 1.0, 2.0, "fp8", "bf16", None)
INT8 = Form("int8", 1.0, 2.0, "bf16", "bf16", None)
W4 = Form("w4a16", 0.5625, 2.0, "bf16", "bf16", None)
GPU_FORMS = (BF16, FP8, INT8, W4)
"""What engines for accelerators run: w4a16 has a 16-bit scale for 32 weights of 4 bits; int8 is of weights
only."""


class Target(Protocol):
    """A machine that can be asked."""

    @property
    def name(self) -> str: ...

    @property
    def forms(self) -> Sequence[Form]: ...

    @property
    def capacity(self) -> float:
        """Bytes for weights, KV cache and activations together."""

    @property
    def devices(self) -> int:
        """Devices that share the weights."""

    def devices_for(self, found: Way) -> int | None:
        """The number of such devices that would hold ``found``; None where there cannot be more."""

    def kv_names(self, form: Form) -> Sequence[str]:
        """KV cache dtypes that go with a form, the usual one first."""

    def beside(self, config: ModelConfig, tokens: int, batch: int) -> float:
        """Bytes beside weights and KV cache."""

    def decode(self, config: ModelConfig, form: Form, kv: str, context: int, batch: int = 1) -> float:
        """Seconds of one decode step of ``batch`` sequences of ``context`` tokens."""

    def prefill(self, config: ModelConfig, form: Form, kv: str, tokens: int) -> float:
        """Seconds until a prompt's first token."""


def activation_nbytes(config: ModelConfig, tokens: int, width: float) -> float:
    """Bytes alive at once in a forward pass without gradients over ``tokens`` tokens, and fp32 logits of one:
    the residual stream and its norm, and in the FFN gate, up and their product."""
    D, F = config.dim, config.ffn_dim
    attention = 2 * config.n_heads * config.head_dim + 2 * config.n_kv_heads * config.head_dim
    return tokens * width * (2 * D + max(3 * F, 2 * attention)) + 4.0 * config.vocab_size


@dataclass(frozen=True)
class Here:
    """This machine, as profiled; ``free`` bytes may be used."""

    profile: Profile
    free: float
    factors: Mapping[str, float] = field(default_factory=dict)  # learned: see `score.factors`

    @property
    def name(self) -> str:
        return "this machine"

    @property
    def forms(self) -> Sequence[Form]:
        return [form for form in GGUF_FORMS if form.dtype in self.profile.gemm]

    @property
    def capacity(self) -> float:
        return self.free

    @property
    def devices(self) -> int:
        return 1

    def devices_for(self, found: Way) -> int | None:
        return None

    def kv_names(self, form: Form) -> Sequence[str]:
        return [kind for kind in ("bf16", "int8") if kind in self.profile.attention_decode]

    def beside(self, config: ModelConfig, tokens: int, batch: int) -> float:
        return self.profile.base + activation_nbytes(config, min(PREFILL_TOKENS, max(tokens, batch)), 4.0)

    def decode(self, config: ModelConfig, form: Form, kv: str, context: int, batch: int = 1) -> float:
        device = self._device(form)
        listed = ops.forward_ops(
            config, batch, context, batch * context, weights=_weights(form), kv_bytes=BYTES[kv]
        )
        slower = self.profile.read / self.profile.attention_decode[kv]
        return self.factors.get("decode", 1.0) * seconds(
            (self._here(op, form, slower) for op in listed), device
        )

    def prefill(self, config: ModelConfig, form: Form, kv: str, tokens: int) -> float:
        """Pieces of `PREFILL_TOKENS`, each attending to itself and to all before it."""
        device, total = self._device(form), 0.0
        for start in range(0, tokens, PREFILL_TOKENS):
            rows = min(PREFILL_TOKENS, tokens - start)
            listed = ops.forward_ops(
                config,
                rows,
                start + rows / 2,
                start + rows,
                head_rows=0,
                weights=_weights(form),
                kv_bytes=BYTES[kv],
            )
            body = [self._here(op, form, None) for op in listed if op.name not in ("head", "attention")]
            attention = sum(op.count * op.flops for op in listed if op.name == "attention")
            total += seconds(body, device) + attention / self.profile.attention_prefill[kv]
        head = ops.head_ops(config, 1, weights=_weights(form))
        total += seconds((self._here(op, form, None) for op in head), device)
        return self.factors.get("prefill", 1.0) * total

    def _device(self, form: Form) -> Device:
        return self.profile.device("plain" if form.dtype == "bf16" else "packed")

    def _here(self, op: Op, form: Form, decode_slower: float | None) -> Op:
        """An operator as it runs here: matmuls in the form's own kernel, streams at the rate measured for
        them."""
        if op.name == "head":
            return replace(op, dtype=form.head_dtype)
        if op.kind == "attention" and decode_slower is not None:
            return replace(op, kind="memory", flops=0.0, nbytes=op.nbytes * decode_slower)
        if op.kind == "memory":
            return replace(
                op, nbytes=2 * op.nbytes * self.profile.read / self.profile.pointwise
            )  # fp32, not bf16
        return op


@dataclass(frozen=True)
class There:
    """A machine of the catalogue, weights and heads divided over ``tp`` of its devices."""

    machine: Machine
    tp: int

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def forms(self) -> Sequence[Form]:
        if self.machine.device.kind != "gpu":
            return GGUF_FORMS
        return [form for form in GPU_FORMS if form.dtype == "bf16" or self.machine.device.has(form.dtype)]

    @property
    def capacity(self) -> float:
        device = self.machine.device
        share = {"gpu": 0.92, "apple": 0.75, "cpu": 0.9}[
            device.kind
        ]  # the rest is the driver's and the system's
        return device.memory * share * self.tp

    @property
    def devices(self) -> int:
        return self.tp

    def devices_for(self, found: Way) -> int | None:
        """Twice as many again and again, as tensor parallelism goes, as long as they divide the heads."""
        config = model_config(found.size)
        for tp in (1 << n for n in range(1, 8)):
            if self.tp < tp and not (config.n_heads % tp or config.ffn_dim % tp):
                wider = There(self.machine.of(tp), tp)
                beside = wider.beside(config, found.context, found.batch)
                if replace(found, beside_nbytes=round(beside)).resident <= wider.capacity:
                    return tp
        return None

    def kv_names(self, form: Form) -> Sequence[str]:
        return ("bf16", "int8")

    def beside(self, config: ModelConfig, tokens: int, batch: int) -> float:
        return self.tp * 0.5e9 + activation_nbytes(config, min(8192, max(tokens, batch)), 2.0)

    def decode(self, config: ModelConfig, form: Form, kv: str, context: int, batch: int = 1) -> float:
        return ops.decode_seconds(
            config,
            self.machine,
            batch=batch,
            context=context,
            weights=_weights(form),
            kv_bytes=BYTES[kv],
            tp=self.tp,
        )

    def prefill(self, config: ModelConfig, form: Form, kv: str, tokens: int) -> float:
        return ops.prefill_seconds(
            config, self.machine, tokens=tokens, weights=_weights(form), kv_bytes=BYTES[kv], tp=self.tp
        )


def there(machine: Machine, config: ModelConfig) -> There:
    """``machine`` with the largest tensor parallelism its number of devices and the model's heads allow."""
    tp = max(
        n
        for n in range(1, machine.count + 1)
        if not (config.n_heads % n or config.ffn_dim % n or n & (n - 1))
    )
    return There(machine, tp)


def _weights(form: Form) -> ops.Weights:
    return ops.Weights(form.linears, form.head, form.dtype)


# Ways
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way of running ``size``: bytes by part, and whether they fit; seconds only if they do."""

    size: str
    form: Form
    kv: str
    context: int
    batch: int
    weights_nbytes: int
    kv_nbytes: int
    beside_nbytes: int
    loading_nbytes: int
    capacity: int
    ttft: float | None = None  # of a prompt that fills the context
    step: float | None = None  # of a decode step with the context full

    @property
    def resident(self) -> int:
        """The most bytes at once: while it runs, or already while it is loaded, when there is no cache
        yet."""
        return self.weights_nbytes + self.beside_nbytes + max(self.kv_nbytes, self.loading_nbytes)

    @property
    def fits(self) -> bool:
        return self.resident <= self.capacity

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.step is None else self.batch / self.step


def model_config(size: str) -> ModelConfig:
    """A published size by name. `PlanError` with the known ones."""
    known = {name.lower(): config for name, config in SIZES.items()}
    if size.lower() not in known:
        raise PlanError(f"size {size!r} is not known: choose {', '.join(SIZES)}")
    return known[size.lower()]


def way(target: Target, size: str, form: Form, kv: str, context: int, batch: int = 1) -> Way:
    """One way, with its times if it fits. `PlanError` for a context beyond the model's."""
    config = model_config(size)
    if not 1 <= context <= config.max_context:
        raise PlanError(
            f"context {context:,} is not within the 1 to {config.max_context:,} of {size}: choose less"
        )
    found = Way(
        size,
        form,
        kv,
        context,
        batch,
        form.nbytes(config),
        kv_nbytes(config, batch, context, BYTES[kv]),
        round(target.beside(config, context, batch)),
        form.loading_nbytes(config),
        round(target.capacity),
    )
    if not found.fits:
        return found
    return replace(
        found,
        ttft=target.prefill(config, form, kv, context),
        step=target.decode(config, form, kv, context, batch),
    )


def ways(target: Target, size: str, contexts: Iterable[int] = CONTEXTS, batch: int = 1) -> list[list[Way]]:
    """A row for each form and KV dtype, a way for each context. A second KV dtype only where it makes more
    fit."""
    rows: list[list[Way]] = []
    for form in target.forms:
        before = -1
        for kv in target.kv_names(form):
            row = [way(target, size, form, kv, context, batch) for context in contexts]
            fitting = sum(found.fits for found in row)
            if fitting > before:
                rows.append(row)
            before = fitting
    return rows


def best(rows: list[list[Way]]) -> Way | None:
    """The way to take: of the forms that fit at most contexts, the one with the least loss that still speaks
    at reading speed (5 tokens/s), else the fastest."""
    able = [row for row in rows if row[0].fits]
    if not able:
        return None
    able = [row for row in able if row[0].kv == USUAL_KV] or able
    most = max(sum(found.fits for found in row) for row in able)
    able = [row for row in able if sum(found.fits for found in row) == most]
    fluent = [row for row in able if (row[0].tokens_per_s or 0.0) >= READING]
    if fluent:
        return min(fluent, key=lambda row: _loss(row[0]))[0]
    return max(able, key=lambda row: row[0].tokens_per_s or 0.0)[0]


USUAL_KV = "bf16"
"""What a quantized model's cache is kept in unless one asks for less."""
READING = 5.0
"""Tokens/s that a person reads."""


def _loss(found: Way) -> float:
    return found.form.kld if found.form.kld is not None else 0.02  # unknown: between 8 and 4 bits


def smallest_change(target: Target, size: str, context: int, batch: int = 1) -> str:
    """What would make ``size`` fit at ``context``: fewer bits, less context, or so much more memory. One
    line."""
    tried = [
        way(target, size, form, kv, context, batch) for form in target.forms for kv in target.kv_names(form)
    ]
    fitting = [found for found in tried if found.fits]
    if fitting:
        found = min(fitting, key=lambda f: (_loss(f), f.resident))
        return f"{found.form.name} weights{'' if found.kv == 'bf16' else ' and ' + found.kv + ' KV'} fit"
    least = min(tried, key=lambda f: f.resident)
    spare = least.capacity - least.weights_nbytes - least.beside_nbytes
    per_token = model_config(size).kv_nbytes_per_token(BYTES[least.kv]) * batch
    if spare >= max(1024 * per_token, least.loading_nbytes):
        tokens = int(spare // per_token // 1024 * 1024)
        count = target.devices_for(least)
        devices = "" if count is None else f"; {count} devices hold all of it"
        return f"a context of {tokens:,} fits in {least.form.name} with {least.kv} KV{devices}"
    more = least.resident - least.capacity
    count = target.devices_for(least)
    devices = "" if count is None else f", {count} devices instead of {target.devices}"
    return f"{more / 1e9:,.1f} GB more memory{devices} would hold it in {least.form.name}"
