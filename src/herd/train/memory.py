"""The memory that training needs, by formula and without torch: for the planner, receipts and recipes.

Per parameter there are the fp32 weight, its fp32 gradient and Adam's two fp32 moments: 16 bytes, and 4 more
while the decay's weights are averaged. All of it is divided over the shards. Copies in the compute dtype come
on top: FSDP2 gathers the root (embedding and head) and about two layers at a time. A single process keeps, in
bf16, autocast's copy of every matrix.

Per token of a micro-batch, backward needs of each layer (D model dim, q = H·K, kv = G·K, F ffn dim), in
values of the compute dtype:

    the inputs of both norms   2 D
    q and k after rotation, v, attention's output   2 (q + kv)
    gate, up   2 F

The norms' outputs and SwiGLU's are computed again in backward (by `kernels.recompute` or torch.compile). With
activation checkpointing only the layer's input, D, is kept, and the activations of one layer at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..dtypes import nbytes_per_value
from ..llama.config import ModelConfig

MASTER = 4  # bytes of fp32


@dataclass(frozen=True)
class TrainBytes:
    """Bytes on one rank by purpose."""

    weights: int
    gradients: int
    moments: int
    average: int
    gathered: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """The sum, which is the predicted peak."""
        return sum((self.state, self.gathered, self.activations, self.loss))

    @property
    def state(self) -> int:
        """What is kept from step to step, and the gradients."""
        return self.weights + self.gradients + self.moments + self.average


def state_nbytes(config: ModelConfig, *, average: bool = False) -> int:
    """Return the bytes of a state on disk.

    A state has weights, both moments and, with ``average``, the mean of the decay's weights, in fp32.
    """
    return config.n_params * MASTER * (4 if average else 3)


def activation_nbytes(
    config: ModelConfig,
    rows: int,
    context: int,
    *,
    dtype: str = "fp32",
    activation_checkpointing: bool = False,
) -> int:
    """Return the bytes that backward needs of a micro-batch, without the loss."""
    layer = _layer_nbytes(config, rows * context, dtype)
    residual = rows * context * nbytes_per_value(dtype) * config.dim
    kept = config.n_layers * residual + layer if activation_checkpointing else config.n_layers * layer
    return kept + 2 * residual


def _layer_nbytes(config: ModelConfig, tokens: int, dtype: str) -> int:
    """Return the bytes that backward needs of one layer."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return tokens * nbytes_per_value(dtype) * 2 * (config.dim + q + kv + config.ffn_dim)


def loss_nbytes(config: ModelConfig, rows: int, context: int, *, dtype: str = "fp32") -> int:
    """Return the bytes of the fused loss: a chunk of logits, and the gradients of hidden states and head."""
    tokens = rows * context
    gradients = tokens * config.dim * nbytes_per_value(dtype) + config.vocab_size * config.dim * MASTER
    return _chunk_nbytes(config, tokens, dtype) + gradients


LOSS_CHUNK_BYTES = 128 << 20
"""Logits of one chunk in fp32: `herd.kernels.loss.CHUNK_BYTES`, without importing torch."""

LOSS_TILE = 1 << 22
"""Weights of a packed head that are unpacked at a time: `herd.kernels.loss.TILE`."""


def loss_chunk_tokens(config: ModelConfig) -> int:
    """Return the tokens of one chunk of the loss, at least D.

    A test checks that the kernel has the same number.
    """
    tokens = max(LOSS_CHUNK_BYTES // (4 * config.vocab_size), config.dim)
    return tokens // 128 * 128 or tokens


def _chunk_nbytes(config: ModelConfig, tokens: int, dtype: str) -> int:
    return min(tokens, loss_chunk_tokens(config)) * config.vocab_size * nbytes_per_value(dtype)


def kept_nbytes(
    config: ModelConfig,
    rows: int,
    context: int,
    *,
    dtype: str = "fp32",
    activation_checkpointing: bool = False,
    average: bool = False,
) -> int:
    """Return the bytes by which a training process on a CPU grows, if it keeps freed memory.

    glibc cannot hand out an aligned block again at its own size, so its heap has holes: a second chunk of
    logits and the temporaries of a layer and a half come on top. With glibc 2.36 this was within 100 MB on
    six shapes, and 280 MB too low on one (256 wide, 8 layers, fp32, activation checkpointing). `train_nbytes`
    counts the tensors alone.
    """
    held = train_nbytes(
        config, rows, context, dtype=dtype, activation_checkpointing=activation_checkpointing, average=average
    )
    tokens = rows * context
    return held.total + _chunk_nbytes(config, tokens, dtype) + _layer_nbytes(config, tokens, dtype) * 3 // 2


def adapter_nbytes(
    config: ModelConfig,
    frozen: int,
    trained: int,
    rows: int,
    context: int,
    *,
    dtype: str = "fp32",
    packed: bool = False,
) -> int:
    """Return the bytes of all tensors at the peak of training ``trained`` parameters of adapters.

    ``frozen`` are the bytes of the base. With ``packed`` its blocks are unpacked a tile at a time, and each
    layer's activations are computed again in backward. The peak is in the loss, or in the backward of the
    last layer, where three tensors of the feed-forward's width and three residuals come on top of its
    activations. Weights and moments of the adapters are fp32, and so is the residual stream.
    """
    tokens, width = rows * context, nbytes_per_value(dtype)
    residual = MASTER * tokens * config.dim
    inner = _layer_nbytes(config, tokens, dtype) - 2 * tokens * width * config.dim
    kept = config.n_layers * (residual if packed else 2 * residual + inner)
    layer = 3 * tokens * width * config.ffn_dim + 3 * residual
    if packed:
        layer += 2 * tokens * width * config.dim + inner
    vectors = config.vocab_size * config.dim
    copied = 0 if dtype == "fp32" else width * vectors  # by autocast
    head = 3 * MASTER * min(LOSS_TILE, vectors) if packed else copied
    chunk = min(tokens, loss_chunk_tokens(config))
    hidden = residual + 2 * tokens * config.dim * width  # before and after the last norm, and the gradient
    loss = chunk * (config.vocab_size * width + 2 * config.dim * MASTER) + hidden + head
    return frozen + 3 * MASTER * trained + max(kept + max(loss, layer), MASTER * trained)


def train_nbytes(
    config: ModelConfig,
    rows: int,
    context: int,
    *,
    dtype: str = "fp32",
    activation_checkpointing: bool = False,
    average: bool = False,
    shard: int = 1,
    ranks: int = 1,
) -> TrainBytes:
    """Return the bytes on each of ``ranks`` ranks, with weights divided over ``shard`` of them.

    A micro-batch has ``rows`` rows of ``context`` tokens.
    """
    params = -(-config.n_params // shard)
    layer_shapes = (shape for name, shape in config.param_shapes() if name.startswith("model.layers.0."))
    layer = sum(map(math.prod, layer_shapes))
    root = config.n_params - config.n_layers * layer
    gathered = 0
    if ranks > 1:
        gathered = nbytes_per_value(dtype) * (root + 2 * layer)
    elif dtype != "fp32":
        gathered = nbytes_per_value(dtype) * (config.n_layers * layer + config.vocab_size * config.dim)
    return TrainBytes(
        weights=MASTER * params,
        gradients=MASTER * params,
        moments=2 * MASTER * params,
        average=MASTER * params if average else 0,
        gathered=gathered,
        activations=activation_nbytes(
            config, rows, context, dtype=dtype, activation_checkpointing=activation_checkpointing
        ),
        loss=loss_nbytes(config, rows, context, dtype=dtype),
    )
