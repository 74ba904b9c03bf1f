"""Choose a format for every matrix, so that a model of a given size loses as little as possible.

An error ``e`` in a weight changes the predicted distribution by a KL divergence of about ``½ F e²``. ``F``,
the Fisher information, is the mean square of the weight's gradient when the tokens are drawn from the model's
own predictions. For the weight of output r and input d it is about the mean square gradient of the output
times the mean square of the input, so one backward pass over some text gives ``F`` of all matrices. Each
matrix is then rounded to every format, some of its rows only, and the predicted divergences are compared.

All matrices begin with the smallest format. The change that lowers the divergence most per byte is made
first, and so on until no change fits into the size.

Shapes: R rows (outputs), D columns (inputs), B batch, T time, V vocabulary.
Source: the factored Fisher information of K-FAC (arXiv 1503.05671), diagonal only.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import QuantError
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from . import blocks
from .formats import F32, FORMATS, Format, tensor_nbytes
from .mixtures import TensorScheme, tensor_scheme

SAMPLED_ROWS = 128
"""Rows of a matrix that are rounded to every format to measure its errors."""


class Sensitivity(NamedTuple):
    """The factors of a matrix's Fisher information: mean squares of output gradients and of inputs."""

    rows_R: Tensor
    columns_D: Tensor


def measure_sensitivity(
    model: LlamaLM, batches: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
) -> dict[str, Sensitivity]:
    """Return the sensitivity of every matrix by its parameter's name.

    ``batches`` are token ids (B, T). The gradients of parameters are not computed, and ``model`` is not
    changed. Raises `QuantError` without text.
    """
    if not batches:
        raise QuantError("sensitivity is measured on calibration text, and there is none")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    squares: dict[str, list[Tensor]] = {}
    model.requires_grad_(False)
    hooks = [layer.register_forward_hook(_adder(squares, name)) for name, layer in layers.items()]
    embedding = model.model.embed_tokens
    hooks.append(embedding.register_forward_hook(_embedding_adder(squares)))
    generator = torch.Generator().manual_seed(0)
    try:
        for done, ids_BT in enumerate(batches):
            logits_NV = model.logits(ids_BT).float().flatten(0, 1)
            drawn_N = torch.multinomial(logits_NV.detach().softmax(-1), 1, generator=generator)[:, 0]
            F.cross_entropy(logits_NV, drawn_N, reduction="sum").backward()  # type: ignore[no-untyped-call]
            if progress:
                progress(done + 1, len(batches))
    finally:
        for hook in hooks:
            hook.remove()
    n_tokens = sum(ids.numel() for ids in batches)
    out = {
        f"{name}.weight": Sensitivity(rows / n_tokens, columns / n_tokens)
        for name, (rows, columns) in squares.items()
    }
    if model.config.tie_embeddings:
        out["model.embed_tokens.weight"] = out.pop("lm_head.weight")
    return out


def _adder(squares: dict[str, list[Tensor]], name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    """Return a hook that adds up the squares of a layer's output gradients and inputs."""

    def forward(_: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        columns_D = inputs[0].detach().float().flatten(0, -2).square().sum(0)

        def backward(gradient: Tensor) -> None:
            _add(squares, name, gradient.float().flatten(0, -2).square().sum(0), columns_D)

        out.register_hook(backward)

    return forward


def _embedding_adder(
    squares: dict[str, list[Tensor]],
) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    """Return a hook that adds up the squares of the embedding's output gradients.

    Every row counts alike: an error of a row matters as often as its token occurs, 1 / V on average.
    """

    def forward(module: nn.Module, _: tuple[Tensor], out: Tensor) -> Tensor:
        out = out.detach().requires_grad_()
        n_rows = int(module.num_embeddings)  # type: ignore[arg-type]

        def backward(gradient: Tensor) -> None:
            frequency_R = torch.full((n_rows,), gradient.shape[0] * gradient.shape[1] / n_rows)
            _add(squares, "model.embed_tokens", frequency_R, gradient.float().flatten(0, -2).square().sum(0))

        out.register_hook(backward)
        return out

    return forward


def _add(squares: dict[str, list[Tensor]], name: str, rows: Tensor, columns: Tensor) -> None:
    if name in squares:
        squares[name][0] += rows
        squares[name][1] += columns
    else:
        squares[name] = [rows, columns]


def predicted_loss(weight_RD: Tensor, format: Format, sensitivity: Sensitivity) -> float:
    """Return the predicted KL divergence (nats per token) of rounding a matrix to ``format``."""
    step = max(1, len(weight_RD) // SAMPLED_ROWS)
    sample_RD = weight_RD[::step].float()
    rows_RB = blocks.encode(sample_RD, format, importance_D=sensitivity.columns_D)
    errors_R = (blocks.decode(rows_RB, format) - sample_RD).square() @ sensitivity.columns_D
    share = len(weight_RD) / len(sample_RD)
    return 0.5 * share * float(errors_R @ sensitivity.rows_R[::step])


def predicted_losses(
    config: ModelConfig,
    get: Callable[[str], Tensor],
    sensitivities: Mapping[str, Sensitivity],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[Format, float]]:
    """Return the predicted KL divergence of every matrix in every format that fits its rows."""
    matrices = [(name, shape) for name, shape in config.param_shapes() if len(shape) > 1]
    out: dict[str, dict[Format, float]] = {}
    for done, (name, shape) in enumerate(matrices):
        weight_RD = get(name)
        fitting = [format for format in FORMATS.values() if shape[-1] % format.block == 0]
        if not fitting:
            raise QuantError(
                f"{name}: its rows of {shape[-1]} weights do not divide into blocks of any format"
            )
        out[name] = {format: predicted_loss(weight_RD, format, sensitivities[name]) for format in fitting}
        if progress:
            progress(done + 1, len(matrices))
    return out


def allocate(
    config: ModelConfig, losses: Mapping[str, Mapping[Format, float]], bits: float
) -> tuple[TensorScheme, float]:
    """Return the scheme with the least predicted loss in at most ``bits`` per weight, and that loss.

    Raises `QuantError` if even the smallest formats need more.
    """
    shapes = dict(config.param_shapes())
    budget = int(bits * config.n_params / 8)
    choices = {name: _worthwhile(shapes[name], by_format) for name, by_format in losses.items()}
    place = dict.fromkeys(choices, 0)
    total = sum(tensor_nbytes(shape, F32) for name, shape in shapes.items() if name not in losses)
    total += sum(nbytes for (_, nbytes, _), *_ in choices.values())
    if total > budget:
        least = 8 * total / config.n_params
        raise QuantError(
            f"{bits:g} bits per weight are too few for this model; it needs at least {least:.2f}"
        )
    queue: list[tuple[float, str, int]] = []

    def offer_next(name: str) -> None:
        if place[name] + 1 < len(choices[name]):
            (_, size, loss), (_, next_size, next_loss) = choices[name][place[name] : place[name] + 2]
            heapq.heappush(queue, ((next_loss - loss) / (next_size - size), name, next_size - size))

    for name in choices:
        offer_next(name)
    while queue:
        _, name, nbytes = heapq.heappop(queue)
        if total + nbytes <= budget:  # otherwise another matrix's change may still fit
            place[name], total = place[name] + 1, total + nbytes
            offer_next(name)
    taken = {name: choices[name][place[name]] for name in choices}
    formats = {name: taken[name][0] if name in taken else F32 for name in shapes}
    return tensor_scheme(f"{bits:g}bpw", formats), sum(loss for _, _, loss in taken.values())


def _worthwhile(shape: Sequence[int], losses: Mapping[Format, float]) -> list[tuple[Format, int, float]]:
    """Return (format, bytes, loss) on the lower convex hull of loss over size, smallest first."""
    points = sorted((tensor_nbytes(shape, format), loss, format.name) for format, loss in losses.items())
    hull: list[tuple[int, float, str]] = []
    for point in points:
        if hull and point[1] >= min(loss for _, loss, _ in hull):
            continue  # larger and not better
        while hull and (
            point[0] == hull[-1][0]
            or (len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point))
        ):
            hull.pop()
        hull.append(point)
    return [(FORMATS[name], nbytes, loss) for nbytes, loss, name in hull]


def _slope(a: tuple[int, float, str], b: tuple[int, float, str]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else -math.inf
