"""A rehearsal: a few real steps at the true layer shapes of a recipe on whatever machine is here, before a
run is paid for.

One block, then two, are trained for real: the trainer's own forward, loss, backward and Adam, in the recipe's
dtype, with its recomputation and compilation, on a whole sequence and on half of one. What the second block
adds is a block's time; what the second half adds is a token's; the rest is embedding, head, and what each
pass over the weights costs. A block too large for the memory here is cut as tensor parallelism would cut it:
the same width, a part of the heads and of the FFN; so is the vocabulary. The whole model's time follows by
counting, its memory by the trainer's own formula, which the rehearsal checks at its own size.

For another machine than this one the time is `step.step_time`'s, with data sheets and published shares; where
this machine *is* one of the target's, what was measured here corrects them. The only file of the room that
needs torch.
"""

from __future__ import annotations

import itertools
import math
import shlex
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dtypes import torch_dtype
from ..errors import PlanError, RecipeError
from ..llama.config import ModelConfig
from ..train.config import TrainSettings
from ..train.memory import TrainBytes, kept_nbytes, train_nbytes
from ..train.recipe import Recipe
from .layout import Job, ParallelLayout, check
from .machines import Machine
from .memory import usable
from .ops import forward_ops
from .roofline import seconds
from .step import mfu, step_time

SHARE = 0.4
"""Of the memory that is free, for the rehearsal."""
SECONDS = 3.0
"""What one rehearsed step may take."""
STEPS = 5
"""Steps of each kind; the first does not count."""


@dataclass(frozen=True)
class Piece:
    """What is rehearsed: ``slices`` of a block's heads and FFN (1: whole), a part of the vocabulary,
    tokens."""

    config: ModelConfig  # of one block
    slices: int
    vocab_parts: int
    rows: int
    context: int


@dataclass(frozen=True)
class Rehearsal:
    """What was measured here. Seconds are of forward and backward of one micro-batch of the recipe."""

    piece: Piece
    block_seconds: float  # of a whole block
    rest_seconds: float  # of everything else
    adam_seconds: float  # for each parameter
    flops_rate: float  # model FLOP/s of a block's tokens here
    predicted_bytes: float  # of the piece
    measured_bytes: float | None
    accelerated: bool  # on a GPU, whose memory is its own
    loss: float  # of the first step: near the logarithm of the vocabulary


@dataclass(frozen=True)
class Outlook:
    """A recipe on its target: seconds of a step, MFU, bytes of a rank, hours to the end."""

    machine: str
    step_seconds: float
    mfu: float | None
    nbytes: TrainBytes
    peak: float  # bytes a process grows by: on a CPU with what its heap cannot use again
    fits: bool
    hours: float
    tokens_per_s: float


def shape(recipe: Recipe) -> ModelConfig:
    """The model's shape, from the recipe or from the checkpoint it starts with."""
    config = recipe.model.config()
    if config is not None:
        return config
    from ..checkpoint import load_config

    return load_config(str(recipe.model.start))


def teacher_shape(recipe: Recipe) -> ModelConfig | None:
    """The teacher's shape, where the recipe distils."""
    teacher = recipe.objective.parents().get("teacher")
    if teacher is None:
        return None
    from ..checkpoint import load_config

    return load_config(teacher)


def cut(config: ModelConfig, micro: int, context: int, free: float, most_flops: float = math.inf) -> Piece:
    """The largest piece of a model whose two blocks fit into ``free`` bytes with all training state, and take
    no more than ``most_flops`` a step. The sequence is shortened first, then the vocabulary, then the
    block."""
    slices = [s for s in _powers(config.n_heads) if config.ffn_dim % s == 0]
    lengths = [
        context >> halved for halved in range(context.bit_length()) if context >> halved >= min(context, 64)
    ]
    for cuts, parts, rows, length in itertools.product(
        slices, (1, 2, 4, 8, 16, 32), {micro: 0, 1: 0}, lengths
    ):
        piece = config.replace(
            n_layers=2,
            n_heads=config.n_heads // cuts,
            n_kv_heads=max(1, config.n_kv_heads // cuts),
            ffn_dim=config.ffn_dim // cuts,
            vocab_size=-(-config.vocab_size // parts),
        )
        flops = rows * length * piece.flops_per_token(length / 2, training=True)
        smallest = (rows, length, parts, cuts) == (1, lengths[-1], 32, slices[-1])
        if train_nbytes(piece, rows, length).total <= SHARE * free and (flops <= most_flops or smallest):
            return Piece(piece.replace(n_layers=1), cuts, parts, rows, length)
    raise PlanError(
        f"not even one head of a block of width {config.dim:,} fits the {free / 1e9:.1f} GB that are free here: take "
        "a larger machine"
    )


def rehearse(recipe: Recipe, on_step: Callable[[str], None] | None = None) -> Rehearsal:
    """Train one block, then two, for a few steps; on_step is told what is done."""
    import torch

    from ..machine import available_memory

    config, train = shape(recipe), recipe.train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory()
    micro = train.micro_batch_size or train.rows_of_rank(recipe.parallel.ranks)
    piece = cut(config, micro, train.context, free, SECONDS * _rate(config.dim, train.dtype, device))
    tell = on_step or (lambda _: None)
    one, two = (_measure(recipe, piece, layers, device, tell) for layers in (1, 2))
    tokens, wanted = piece.rows * piece.context, micro * train.context
    # seconds = passes + tokens · each, for a block and for the rest
    block_whole, block_half = two.whole - one.whole, two.half - one.half
    block_each = max(2 * (block_whole - block_half) / tokens, 0.1 * block_whole / tokens)
    rest_each = max(2 * (one.whole - one.half) / tokens - block_each, 0.0)
    block_pass = max(block_whole - block_each * tokens, 0.0)
    rest_pass = max(one.whole - block_whole - rest_each * tokens, 0.0)
    longer = _block_flops(piece.config, train.context / 2) / _block_flops(piece.config, piece.context / 2)
    return Rehearsal(
        piece=piece,
        block_seconds=piece.slices * (block_pass + block_each * wanted * longer),
        rest_seconds=piece.vocab_parts * (rest_pass + rest_each * wanted),
        adam_seconds=two.adam / two.params,
        flops_rate=3 * _block_flops(piece.config, piece.context / 2) / block_each,
        predicted_bytes=two.predicted,
        measured_bytes=two.peak,
        accelerated=device.type == "cuda",
        loss=two.loss,
    )


@dataclass(frozen=True)
class _Measured:
    """``whole``, ``half``: seconds of forward and backward of the piece's rows, and of rows of half the
    length."""

    whole: float
    half: float
    adam: float
    params: int
    predicted: float
    peak: float | None
    loss: float


def _rate(dim: int, dtype: str, device: Any) -> float:
    """Operations/s of one matmul of the model's width: how much can be rehearsed in little time."""
    import torch

    left, right = (
        torch.ones(min(dim, 4096), min(dim, 4096), dtype=torch_dtype(dtype), device=device) for _ in range(2)
    )
    times = []
    for _ in range(3):
        began = _now(device)
        left @ right
        times.append(_now(device) - began)
    return 2 * left.shape[0] ** 3 / min(times)


def _measure(
    recipe: Recipe, piece: Piece, layers: int, device: Any, tell: Callable[[str], None]
) -> _Measured:
    """Seconds of forward and backward, and of what follows (norm, clipping, Adam), of a model of so many
    blocks."""
    import torch

    from ..data.batch import Batch
    from ..llama.model import LlamaLM
    from ..train import objectives, parallel
    from ..train.optim import gradient_norm

    train = recipe.train
    config = piece.config.replace(n_layers=layers)
    before = _reset_peak(device)
    model = LlamaLM(config).init_weights(train.seed).to(device)
    optimizer = recipe.optimizer.build(model)
    generator = torch.Generator().manual_seed(train.seed)
    times: dict[int, list[float]] = {piece.context: [], piece.context // 2: []}
    adams, losses = [], []

    def step(length: int) -> None:
        tokens = torch.randint(0, config.vocab_size, (piece.rows, length + 1), generator=generator).to(device)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        began = _now(device)
        with torch.autocast(device.type, torch_dtype(train.dtype), enabled=train.dtype != "fp32"):
            result = objectives.batch_loss(model, objectives.lm, batch)
        result.total.backward()
        middle = _now(device)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, 1 / max(1.0, gradient_norm(grads)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times[length].append(middle - began)
        adams.append(_now(device) - middle)
        losses.append(result.total.item() / (piece.rows * length))

    with parallel.prepared(
        model,
        activation_checkpointing=train.activation_checkpointing,
        compiled=train.compile and device.type == "cuda",
    ):
        for length in times:
            for number in range(STEPS):
                step(length)
                tell(
                    f"{layers} block{'s' * (layers > 1)}, {length:,} tokens, step {number + 1}: loss {losses[-1]:.3f}"
                )
    if not all(map(math.isfinite, losses)):
        raise PlanError(
            f"the rehearsal's loss is {losses[-1]} after {len(losses)} steps: lower lr={recipe.optimizer.lr:g}"
        )
    peak = _peak(device, before)
    predicted = _grown(train, config, piece.rows, piece.context, device.type == "cuda")
    whole, half = (
        min(found[1:]) for found in times.values()
    )  # other work only adds, and differences are taken
    params = sum(p.numel() for p in model.parameters())
    return _Measured(whole, half, statistics.median(adams[1:]), params, predicted, peak, losses[0])


def _now(device: Any) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: Any) -> int:
    """Bytes held now, with the high-water mark set back to them where the system allows; memory that was
    freed before is given back, so that it is not taken for this one's."""
    import ctypes

    import psutil
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def _peak(device: Any, before: int) -> float | None:
    """Bytes above ``before`` at the highest."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() - before
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    high = next((line for line in lines if line.startswith("VmHWM")), None)
    return None if high is None else 1024.0 * int(high.split()[1]) - before


def _grown(train: TrainSettings, config: ModelConfig, rows: int, context: int, accelerated: bool) -> int:
    """Bytes that training adds: on a CPU, to a process that keeps freed memory."""
    if accelerated:
        return train_nbytes(
            config, rows, context, dtype=train.dtype, activation_checkpointing=train.activation_checkpointing
        ).total
    return kept_nbytes(
        config, rows, context, dtype=train.dtype, activation_checkpointing=train.activation_checkpointing
    )


def _block_flops(config: ModelConfig, keys: float) -> float:
    """Forward FLOPs of one block for one token."""
    return config.replace(n_layers=2).flops_per_token(keys) - config.replace(n_layers=1).flops_per_token(keys)


def _powers(most: int) -> list[int]:
    """Powers of two that divide ``most``."""
    return [1 << exponent for exponent in range(most.bit_length()) if most % (1 << exponent) == 0]


# What it means for the whole run
# ------------------------------------------------------------------------------------


def here(recipe: Recipe, rehearsal: Rehearsal) -> Outlook:
    """The whole recipe on this machine, all its ranks one after another: what one device of this kind would
    take."""
    config, train, ranks = shape(recipe), recipe.train, recipe.parallel.ranks
    micro = train.micro_batch_size or train.rows_of_rank(ranks)
    micros = train.batch_size // micro
    step = micros * (config.n_layers * rehearsal.block_seconds + rehearsal.rest_seconds)
    step += rehearsal.adam_seconds * config.n_params
    nbytes = train_nbytes(
        config,
        micro,
        train.context,
        dtype=train.dtype,
        activation_checkpointing=train.activation_checkpointing,
        average=bool(recipe.schedule.average_every),
    )
    from ..machine import available_memory

    peak = nbytes.average + _grown(train, config, micro, train.context, rehearsal.accelerated)
    tokens = train.tokens_per_step
    rate = tokens * config.flops_per_token(train.context / 2, training=True) / step
    share = rate / train.peak_flops if train.peak_flops and ranks == 1 else None
    return Outlook(
        "one device as here",
        step,
        share,
        nbytes,
        peak,
        peak <= available_memory(),
        step * train.steps / 3600,
        tokens / step,
    )


def target(recipe: Recipe, machine: Machine) -> Outlook:
    """The whole recipe on another machine, as the trainer lays it out: FSDP2 within ``shard``, replicas of
    that."""
    config, train, spec = shape(recipe), recipe.train, recipe.parallel
    if machine.count != spec.ranks:
        raise RecipeError(
            f"{recipe.name}: the recipe is for parallel.ranks={spec.ranks}, {machine.name} has {machine.count}: "
            f"use {machine.of(spec.ranks).name}, or change the recipe"
        )
    micro = train.micro_batch_size or train.rows_of_rank(spec.ranks)
    layout = ParallelLayout(
        dp=spec.ranks,
        micro=micro,
        recompute="full" if train.activation_checkpointing else "none",
        precision=train.dtype,
        shard="all" if spec.shard > 1 else "optimizer",
        replicas=spec.ranks // spec.shard,
    )
    job = Job(config, train.batch_size, train.context)
    check(layout, job)
    step = step_time(job, layout, machine).seconds
    teacher = teacher_shape(recipe)
    if teacher is not None:
        rows = micro * train.context
        forward = seconds(forward_ops(teacher, rows, train.context / 2, rows, head_rows=rows), machine.device)
        step += train.rows_of_rank(spec.ranks) // micro * forward
    nbytes = train_nbytes(
        config,
        micro,
        train.context,
        dtype=train.dtype,
        activation_checkpointing=train.activation_checkpointing,
        average=bool(recipe.schedule.average_every),
        shard=spec.shard,
        ranks=spec.ranks,
    )
    return Outlook(
        machine.name,
        step,
        mfu(job, machine, step),
        nbytes,
        float(nbytes.total),
        nbytes.total <= usable(machine.device.memory),
        step * train.steps / 3600,
        job.tokens / step,
    )


def script(recipe: Recipe, path: Path, machine: Machine, hours: float) -> str:
    """A Slurm batch script for a recipe on a machine; without Slurm its last command runs as it stands on one
    node.

    Slurm asks five minutes before the end; the trainer then finishes its step and saves, and the job is put
    back in the queue, where the same command goes on."""
    nodes, each = machine.nodes, min(machine.per_node, machine.count)
    days, rest = divmod(math.ceil(min(hours * 1.1 + 0.5, 7 * 24)), 24)
    quoted = shlex.quote(str(path))
    if machine.count == 1:
        command = f"python -m herd train {quoted}"
    elif nodes == 1:
        command = f"torchrun --standalone --nproc-per-node={each} -m herd train {quoted}"
    else:
        command = (
            f'torchrun --nnodes={nodes} --nproc-per-node={each} --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d '
            f'--rdzv-endpoint="$head:29500" -m herd train {quoted}'
        )
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={recipe.name}",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        *([f"#SBATCH --gpus-per-node={each}"] if machine.device.kind == "gpu" else []),
        f"#SBATCH --time={days}-{rest:02d}:00:00",
        "#SBATCH --signal=TERM@300",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={recipe.name}-%j.log",
        f"# Predicted: {hours:,.1f} h on {machine.name}.",
        "set -euo pipefail",
        *(['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'] if nodes > 1 else []),
        f"srun {command}",
    ]
    return "\n".join(lines) + "\n"
