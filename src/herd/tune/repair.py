"""Repair a merge that rounding has damaged: a short quantization-aware training towards base + adapter.

The merged weights are trained as the packed format stores them (`quant.straight_through`), with base +
adapter as the teacher: the loss is the KL divergence over the whole vocabulary, on every token of the
examples that the adapter was trained on. So weights move over rounding thresholds until the packed model
answers like the tuned one. All weights are trained, which takes the memory and the time of full fine-
tuning with a teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import units
from ..data.packing import DialogStream
from ..dtypes import fast_dtype
from ..errors import DataError, QuantError
from ..llama.config import ModelConfig
from ..llama.lora import merged_parameter
from ..llama.model import LlamaLM
from ..machine import available_memory
from ..quant.formats import Scheme
from ..quant.straight_through import StraightThrough
from ..text import Rendered
from ..train import AdamW, Cosine, TrainConfig, train
from ..train.memory import MASTER, train_nbytes
from ..train.objectives import distil

RATE = 1e-4
"""Learning rate. A step of Q4_0 is 0.01 to 0.03 in most models: a weight can move by some tenths of it."""
ROWS, CONTEXT = 4, 512


def repair_steps(tokens: int) -> int:
    """Return the number of updates of a repair on ``tokens`` tokens."""
    return max(2, tokens // (ROWS * CONTEXT))


def repaired_rows(
    tuned: LlamaLM,
    plan: Scheme,
    examples: Sequence[list[int]],
    folder: Path,
    *,
    tokens: int,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Callable[[str], Sequence[Tensor]]:
    """Return a function that returns the blocks (R, B) of each parameter of the repaired merge.

    ``tuned`` is the base with its adapter. ``examples`` are token ids, repeated until ``tokens`` are read.
    ``folder`` receives the state of the training. Raises `QuantError` if the memory does not suffice, and
    `DataError` without examples.
    """
    config = tuned.config
    _require_memory(config)
    context = min(CONTEXT, config.max_context)
    pieces = [
        ids[start : start + context + 1]
        for ids in examples
        for start in range(0, max(1, len(ids) - 1), context)
    ]
    rendered = [Rendered(ids, [True] * len(ids)) for ids in pieces if len(ids) > 1]
    if not rendered:
        raise DataError("a repair trains on the tuning data, which cannot be read; use --gptq or more bits")
    student = LlamaLM(config)
    with torch.no_grad():
        for name, _ in config.param_shapes():
            student.get_parameter(name).copy_(merged_parameter(tuned, name))
    rounding = StraightThrough(dict(student.named_parameters()), plan.plan(config))
    steps = repair_steps(tokens)
    settings = TrainConfig(
        steps=steps, batch_size=ROWS, context=context, dtype=fast_dtype(),  # type: ignore[arg-type]
        optimizer=AdamW(lr=RATE, weight_decay=0.0),
        schedule=Cosine(warmup_steps=max(1, steps // 10), decay_steps=0),
    )  # fmt: skip
    stream = DialogStream(rendered, context, 0, pad_id=0)
    train(student, stream, distil(tuned), settings, folder, rounding=rounding, on_step=on_step)
    return rounding.rows


def _require_memory(config: ModelConfig) -> None:
    """Raise `QuantError` if training with rounded weights beside the teacher does not fit into memory."""
    needed = train_nbytes(config, ROWS, min(CONTEXT, config.max_context), dtype=fast_dtype()).total
    needed += 2 * MASTER * config.n_params  # rounded weights and their grids
    free = available_memory()
    if needed > free:
        raise QuantError(
            f"a repair needs {units.nbytes(needed)} of memory and {units.nbytes(free)} are free; use --gptq, "
            "or a format with more bits"
        )
