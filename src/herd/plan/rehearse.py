"""Rehearse a recipe: train a few steps at its layer shapes on this machine, and predict the whole run.

Models of one layer and of two layers are trained with the trainer's forward, loss, backward and Adam, in the
recipe's dtype and with its recomputation and compilation, on whole sequences and on half sequences. The
difference of two layers and one is a layer's time. The difference of a whole sequence and a half gives the
time per token. The rest is the embedding, the head, and the cost of each pass over the weights. A layer too
large for the memory is split as tensor parallelism would split it: the same width, with a part of the heads
and of the FFN. The vocabulary is split too. The time of the whole model follows by counting. Its memory
follows from the trainer's formula, and the rehearsal checks this formula at its own size.

For another machine, `step.step_time` predicts the time from data sheets and published efficiencies.
"""

from __future__ import annotations

import itertools
import math
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template

from .. import units
from ..checkpoint import load_config
from ..data.batch import Batch
from ..dtypes import torch_dtype
from ..errors import PlanError, RecipeError
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..machine import available_memory, peak_memory, reset_peak_memory, resident_memory
from ..train import objectives, parallel
from ..train.config import TrainSettings
from ..train.memory import TrainBytes, kept_nbytes, train_nbytes
from ..train.optim import gradient_norm
from ..train.recipe import Recipe
from .layout import Job, ParallelLayout
from .machines import Machine
from .memory import usable_memory
from .ops import forward_ops
from .roofline import total_seconds
from .step import model_flops_utilization, predict_step

SHARE = 0.4
"""Fraction of the free memory that the rehearsal may use."""
SECONDS = 3.0
"""Longest time of one rehearsed step, in seconds."""
STEPS = 5
"""Steps of each kind. The first is a warm-up and does not count."""


@dataclass(frozen=True)
class RehearsedOp:
    """The part of a model that is rehearsed, and its batch.

    The part has 1/``slices`` of a layer's heads and FFN and 1/``vocab_parts`` of the vocabulary. The batch
    has ``rows`` sequences of ``context`` tokens.
    """

    config: ModelConfig  # with one layer
    slices: int
    vocab_parts: int
    rows: int
    context: int


@dataclass(frozen=True)
class Rehearsal:
    """Measurements of a rehearsal.

    Times are seconds of forward and backward for one micro-batch of the recipe.
    """

    piece: RehearsedOp
    layer_seconds: float  # of a whole layer
    rest_seconds: float  # of everything else
    adam_seconds: float  # per parameter
    flops_rate: float  # model FLOP/s of a layer
    predicted_bytes: float  # of the rehearsed part
    measured_bytes: float
    accelerated: bool  # whether it ran on a GPU
    loss: float  # of the first step, which should be near the logarithm of the vocabulary


@dataclass(frozen=True)
class Outlook:
    """The prediction for a whole recipe on a machine."""

    machine: str
    step_seconds: float
    mfu: float | None
    nbytes: TrainBytes
    peak: float  # bytes by which a process grows, on a CPU including parts of the heap that cannot be reused
    fits: bool
    hours: float
    tokens_per_s: float


def model_shape(recipe: Recipe) -> ModelConfig:
    """Return the model's shape from the recipe, or from the checkpoint that training starts with."""
    return recipe.model.config() or load_config(str(recipe.model.start))


def cut_to_fit(
    config: ModelConfig, micro: int, context: int, free: float, most_flops: float = math.inf
) -> RehearsedOp:
    """Return the largest part of a model of which two layers can be trained in `SHARE` of ``free`` bytes.

    A step takes at most ``most_flops``, unless even the smallest part takes more. First the sequence is
    shortened, then the vocabulary is split, then the layer.
    """
    halvings = [1 << exponent for exponent in range(config.n_heads.bit_length())]
    slices = [s for s in halvings if config.n_heads % s == 0 and config.ffn_dim % s == 0]
    lengths = [context >> n for n in range(context.bit_length()) if context >> n >= min(context, 64)]
    for cuts, parts, rows, length in itertools.product(
        slices, (1, 2, 4, 8, 16, 32), dict.fromkeys((micro, 1)), lengths
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
            return RehearsedOp(piece.replace(n_layers=1), cuts, parts, rows, length)
    raise PlanError(
        f"not even one head of a layer of width {config.dim:,} fits into the {units.nbytes(free)} of free "
        "memory: use a larger machine"
    )


def run_rehearsal(recipe: Recipe, on_step: Callable[[str], None] = lambda line: None) -> Rehearsal:
    """Train one layer, then two, for a few steps each. ``on_step`` is called with a line for each step."""
    config, train = model_shape(recipe), recipe.train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory()
    micro = _micro_batch(recipe)
    most_flops = SECONDS * _matmul_rate(config.dim, train.dtype, device)
    piece = cut_to_fit(config, micro, train.context, free, most_flops)
    one, two = (_timed_steps(recipe, piece, layers, device, on_step) for layers in (1, 2))
    tokens, wanted = piece.rows * piece.context, micro * train.context
    # seconds = passes + tokens · each, for a layer and for the rest
    flops = layer_flops(piece.config, piece.context / 2)
    # On a busy machine a difference of two times can be arbitrarily wrong. So at least a tenth of the layer's
    # share of the FLOPs is assumed.
    least = 0.1 * one.whole * flops / piece.config.flops_per_token(piece.context / 2)
    layer_whole, layer_half = max(two.whole - one.whole, least), two.half - one.half
    layer_each = max(2 * (layer_whole - layer_half) / tokens, 0.1 * layer_whole / tokens)
    rest_each = max(2 * (one.whole - one.half) / tokens - layer_each, 0.0)
    layer_pass = max(layer_whole - layer_each * tokens, 0.0)
    rest_pass = max(one.whole - layer_whole - rest_each * tokens, 0.0)
    longer = layer_flops(piece.config, train.context / 2) / flops
    return Rehearsal(
        piece=piece,
        layer_seconds=piece.slices * (layer_pass + layer_each * wanted * longer),
        rest_seconds=piece.vocab_parts * (rest_pass + rest_each * wanted),
        adam_seconds=two.adam / two.params,
        flops_rate=3 * flops / layer_each,
        predicted_bytes=two.predicted,
        measured_bytes=two.peak,
        accelerated=device.type == "cuda",
        loss=two.loss,
    )


@dataclass(frozen=True)
class _Timed:
    """Seconds of forward and backward with whole and with half sequences, and of the optimizer."""

    whole: float
    half: float
    adam: float
    params: int
    predicted: float
    peak: float
    loss: float


def _matmul_rate(dim: int, dtype: str, device: torch.device) -> float:
    """Return the operations/s of a matmul of the model's width, used to limit the size of the rehearsal."""
    size = min(dim, 4096)
    left, right = (torch.ones(size, size, dtype=torch_dtype(dtype), device=device) for _ in range(2))
    times = []
    for _ in range(3):
        began = _now(device)
        left @ right
        times.append(_now(device) - began)
    return 2 * size**3 / min(times)


def _timed_steps(
    recipe: Recipe, piece: RehearsedOp, layers: int, device: torch.device, on_step: Callable[[str], None]
) -> _Timed:
    """Train a model of ``layers`` layers and return the times. The optimizer's time includes clipping."""
    train, cuda = recipe.train, device.type == "cuda"
    config = piece.config.replace(n_layers=layers)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        reset_peak_memory()
        before = resident_memory()
    model = LlamaLM(config).init_weights(train.seed).to(device)
    optimizer = recipe.optimizer.build(model)
    generator = torch.Generator().manual_seed(train.seed % (1 << 63))
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

    checkpointing, compiled = train.activation_checkpointing, train.compile and cuda
    with parallel.prepared(model, activation_checkpointing=checkpointing, compiled=compiled):
        for length, number in itertools.product(times, range(STEPS)):
            step(length)
            what = f"{layers} layer{'s' * (layers > 1)}, {length:,} tokens"
            on_step(f"{what}, step {number + 1}: loss {losses[-1]:.3f}")
    if not all(map(math.isfinite, losses)):
        raise PlanError(
            f"the rehearsal's loss is {losses[-1]} after {len(losses)} steps: lower "
            f"lr={recipe.optimizer.lr:g}"
        )
    peak = (torch.cuda.max_memory_allocated() if cuda else peak_memory()) - before
    predicted = _grown_nbytes(train, config, piece.rows, piece.context, cuda)
    # The least time of each kind is taken, because other work on the machine can only add time.
    whole, half = (min(found[1:]) for found in times.values())
    params = sum(p.numel() for p in model.parameters())
    return _Timed(whole, half, statistics.median(adams[1:]), params, predicted, peak, losses[0])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _grown_nbytes(train: TrainSettings, config: ModelConfig, rows: int, context: int, cuda: bool) -> int:
    """Return the bytes that training adds.

    On a CPU this counts memory that the process keeps after freeing it.
    """
    how: dict[str, Any] = {
        "dtype": train.dtype, "activation_checkpointing": train.activation_checkpointing
    }  # fmt: skip
    if cuda:
        return train_nbytes(config, rows, context, **how).total
    return kept_nbytes(config, rows, context, **how)


def layer_flops(config: ModelConfig, keys: float) -> float:
    """Return the forward FLOPs of one layer for one token that attends to ``keys`` others."""
    return config.replace(n_layers=2).flops_per_token(keys) - config.replace(n_layers=1).flops_per_token(keys)


# The whole run --------------------------------------------------------------------------------


def outlook_here(recipe: Recipe, rehearsal: Rehearsal) -> Outlook:
    """Predict the whole recipe on one device of this machine that does the work of all ranks."""
    config, train = model_shape(recipe), recipe.train
    micro = _micro_batch(recipe)
    step = config.n_layers * rehearsal.layer_seconds + rehearsal.rest_seconds
    step = train.batch_size // micro * step + rehearsal.adam_seconds * config.n_params
    nbytes = _train_nbytes(recipe, config, micro, shard=1, ranks=1)
    grown = _grown_nbytes(train, config, micro, train.context, rehearsal.accelerated)
    peak = nbytes.average + grown
    mfu = None
    if train.peak_flops and recipe.parallel.ranks == 1:
        flops = train.tokens_per_step * config.flops_per_token(train.context / 2, training=True)
        mfu = flops / step / train.peak_flops
    fits, hours = peak <= available_memory(), step * train.steps / 3600
    return Outlook("one device as here", step, mfu, nbytes, peak, fits, hours, train.tokens_per_step / step)


def outlook_on(recipe: Recipe, machine: Machine) -> Outlook:
    """Predict the whole recipe on another machine, with FSDP2 in groups of ``shard`` ranks as in training."""
    config, train, spec = model_shape(recipe), recipe.train, recipe.parallel
    if machine.count != spec.ranks:
        raise RecipeError(
            f"{recipe.name}: the recipe is for parallel.ranks={spec.ranks}, but {machine.name} has "
            f"{machine.count} devices: use {machine.with_devices(spec.ranks).name}, or change the recipe"
        )
    micro = _micro_batch(recipe)
    layout = ParallelLayout(
        dp=spec.ranks,
        micro=micro,
        recompute="full" if train.activation_checkpointing else "none",
        precision=train.dtype,
        shard="all" if spec.shard > 1 else "optimizer",
        replicas=spec.ranks // spec.shard,
    )
    job = Job(config, train.batch_size, train.context)
    step = predict_step(job, layout, machine).seconds
    if "teacher" in recipe.objective.parents():
        rows, teacher = micro * train.context, load_config(recipe.objective.parents()["teacher"])
        ops = forward_ops(teacher, rows, train.context / 2, rows, head_rows=rows)
        step += train.rows_of_rank(spec.ranks) // micro * total_seconds(ops, machine.device)
    nbytes = _train_nbytes(recipe, config, micro, shard=spec.shard, ranks=spec.ranks)
    mfu, peak = model_flops_utilization(job, machine, step), float(nbytes.total)
    fits, hours = peak <= usable_memory(machine.device.memory), step * train.steps / 3600
    return Outlook(machine.name, step, mfu, nbytes, peak, fits, hours, job.tokens / step)


def _micro_batch(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size or recipe.train.rows_of_rank(recipe.parallel.ranks)


def _train_nbytes(recipe: Recipe, config: ModelConfig, micro: int, *, shard: int, ranks: int) -> TrainBytes:
    train = recipe.train
    average = bool(recipe.schedule.average_every)
    return train_nbytes(
        config, micro, train.context, dtype=train.dtype, average=average, shard=shard, ranks=ranks,
        activation_checkpointing=train.activation_checkpointing,
    )  # fmt: skip


def slurm_script(recipe: Recipe, path: Path, machine: Machine, hours: float) -> str:
    """Return a Slurm batch script for a recipe on a machine.

    Without Slurm, its last command runs on one node. Slurm sends a signal five minutes before the end. The
    trainer then finishes its step and saves its state. The job is queued again, and the same command resumes
    the run.
    """
    # The predicted time plus a tenth and half an hour, but at most a week, the limit of many clusters.
    days, rest = divmod(math.ceil(min(hours * 1.1 + 0.5, 7 * 24)), 24)
    text = Path(__file__).with_name("slurm.sh.jinja").read_text(encoding="utf-8")
    script = Template(text, trim_blocks=True, keep_trailing_newline=True)
    each, limit = min(machine.per_node, machine.count), f"{days}-{rest:02d}:00:00"
    recipe_file = shlex.quote(str(path))
    return script.render(
        name=recipe.name, path=recipe_file, machine=machine, each=each, limit=limit, hours=hours
    )
