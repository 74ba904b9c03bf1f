"""What training holds in memory, by formula and without torch: for the planner, receipts and recipes.

Per parameter: the fp32 weight, its fp32 gradient and Adam's two fp32 moments, 16 bytes; 4 more
while the decay's weights are averaged. All of it is split over the shards. Copies in the compute dtype come on
top: FSDP2 gathers the root (embedding and head) and about two blocks at a time; alone, autocast keeps a bf16 copy
of every matrix.

Per token of a micro-batch, what backward needs of each block (D model dim, q = H·K, kv = G·K, F ffn dim), in values of
the compute dtype:

    input of both norms   2 D
    q and k after rotation, v, attention's output   2 (q + kv)
    gate, up   2 F

The norms' outputs and SwiGLU's are made again in backward (`kernels.recompute`; torch.compile does likewise).
With recomputation only the block's input, D, is kept, and one block's activations at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dtypes import nbytes_per_value
from ..llama.config import ModelConfig

MASTER = 4  # bytes of fp32


@dataclass(frozen=True)
class TrainBytes:
    """Bytes on one rank, by what they are for."""

    weights: int
    gradients: int
    moments: int
    average: int
    gathered: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All of them together: the predicted peak."""
        return sum((self.state, self.gathered, self.activations, self.loss))

    @property
    def state(self) -> int:
        """What stays from step to step, and the gradients."""
        return self.weights + self.gradients + self.moments + self.average


def state_nbytes(config: ModelConfig, *, average: bool = False) -> int:
    """Bytes of a state on disk: weights, both moments, and the mean of the decay's weights; fp32."""
    return config.n_params * MASTER * (4 if average else 3)


def activation_nbytes(
    config: ModelConfig,
    rows: int,
    context: int,
    *,
    dtype: str = "fp32",
    activation_checkpointing: bool = False,
) -> int:
    """Bytes that backward needs of one micro-batch of ``rows`` x ``context`` tokens, without the loss."""
    block, residual = (
        _block_nbytes(config, rows * context, dtype),
        rows * context * nbytes_per_value(dtype) * config.dim,
    )
    kept = config.n_layers * residual + block if activation_checkpointing else config.n_layers * block
    return kept + 2 * residual


def _block_nbytes(config: ModelConfig, tokens: int, dtype: str) -> int:
    """What backward needs of one block."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return tokens * nbytes_per_value(dtype) * 2 * (config.dim + q + kv + config.ffn_dim)


def loss_nbytes(config: ModelConfig, rows: int, context: int, *, dtype: str = "fp32") -> int:
    """Bytes of the fused loss: a chunk of logits, and the hidden states' and the head's gradients, made in forward."""
    tokens = rows * context
    gradients = tokens * config.dim * nbytes_per_value(dtype) + config.vocab_size * config.dim * MASTER
    return _chunk_nbytes(config, tokens, dtype) + gradients


LOSS_CHUNK_BYTES = 128 << 20
"""Logits of one chunk in fp32; `herd.kernels.loss.CHUNK_BYTES` without importing torch."""


def loss_chunk_tokens(config: ModelConfig) -> int:
    """Tokens of one chunk of the loss (a test holds this equal to the kernel's): at least as many as D."""
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
    """Bytes by which a process on a CPU grows that keeps freed memory (`kernels.memory`), as training does.

    glibc cannot give an aligned block out again at its own size, so its heap has holes: a second chunk of logits and
    the temporaries of a block and a half come on top. Measured with glibc 2.36 on six shapes, within 100 MB, and
    on one (256 wide, 8 layers, fp32, recomputed) that took 280 MB more; tensors alone, as without keeping, are
    `train_nbytes`.
    """
    held = train_nbytes(
        config, rows, context, dtype=dtype, activation_checkpointing=activation_checkpointing, average=average
    )
    tokens = rows * context
    return held.total + _chunk_nbytes(config, tokens, dtype) + _block_nbytes(config, tokens, dtype) * 3 // 2


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
    """Bytes on each of ``ranks`` ranks, weights split over ``shard``, micro-batches of ``rows`` x ``context``."""
    params = -(-config.n_params // shard)
    block = sum(
        _product(shape) for name, shape in config.param_shapes() if name.startswith("model.layers.0.")
    )
    root = config.n_params - config.n_layers * block
    if ranks > 1:
        gathered = nbytes_per_value(dtype) * (root + 2 * block)
    else:
        gathered = (
            0
            if dtype == "fp32"
            else nbytes_per_value(dtype) * (config.n_layers * block + config.vocab_size * config.dim)
        )
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


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out
