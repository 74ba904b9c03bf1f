"""GPTQ: choose codes that compensate for each other's errors, in the same block formats.

Rounding each weight to its nearest point is best for the weights, but not for the output of the layer. For
the layer's real inputs x, the error of the output is ``tr(E H E^T)`` with ``H = sum of x x^T``. GPTQ makes it
smaller by rounding one column at a time and changing the remaining columns to compensate. Columns with the
largest inputs are rounded first, while most others can still compensate for them.

In other tools this order scatters groups over the row, and each use of the weights needs a lookup. Here the
scales of all blocks are fixed beforehand (weighted by the same inputs), so the order of rounding does not
matter for the format, and the result consists of ordinary GGUF blocks.

The model is processed one layer at a time, each calibrated on the output of the quantized layers before it.
Within a layer the order is: q, k and v; o; gate and up; down. Memory: one layer in fp32, its largest H three
times, and the hidden states of the calibration text.

Shapes: R rows, D columns (inputs), N tokens, B batch, T time, G groups per row.
Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1; order and fixed groups: ``act_order`` and
``static_groups`` of its reference code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..llama.config import ModelConfig
from ..llama.model import DecoderLayer, LlamaLM
from ..llama.streamed import StreamedModel
from . import blocks
from .calibration import STAGES
from .formats import Format, Scheme, require_fit

COLUMNS = 128
"""Columns that are rounded before the rest of the matrix is updated with one large product."""
ROWS = 2048
"""Rows that are processed at a time. Rows are independent, so this only limits memory."""
DAMPING = 0.01
"""Fraction of the mean of H's diagonal that is added to it (as in the paper). More if H is still singular."""


def quantize_matrix(weight_RD: Tensor, moments_DD: Tensor, format: Format, name: str = "weight") -> Tensor:
    """Return blocks (R, B) uint8 of a matrix, given ``moments_DD``, the mean of x x^T over its inputs.

    Raises `QuantError` for rows with an incomplete block and for values that are not finite.
    """
    require_fit(weight_RD.shape, format, name)
    if not bool(torch.isfinite(weight_RD).all() and torch.isfinite(moments_DD).all()):
        raise QuantError(
            f"{name}: it or its inputs have values that are not finite; the checkpoint is damaged"
        )
    importance_D = moments_DD.diagonal().clone()
    order_D = importance_D.argsort(descending=True, stable=True)
    factor_DD = _inverse_factor(moments_DD[order_D][:, order_D], name)
    parts = weight_RD.split(ROWS)
    return torch.cat([_round_rows(part.float(), importance_D, order_D, factor_DD, format) for part in parts])


def _inverse_factor(moments_DD: Tensor, name: str) -> Tensor:
    """Return the upper Cholesky factor of the inverse of H, damped until it exists.

    Row j has the changes of the remaining columns for an error in column j.
    """
    diagonal = moments_DD.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:  # the inputs are all zero, so there are no errors to compensate
        return torch.eye(len(diagonal), device=moments_DD.device)
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped_DD = moments_DD.float() / mean
        damped_DD.diagonal().add_(damping)
        lower_DD, info = torch.linalg.cholesky_ex(damped_DD)
        if int(info) == 0:
            upper_DD, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_DD), upper=True)
            if int(info) == 0:
                return upper_DD
    raise QuantError(f"{name}: the moments of its inputs are singular; calibrate with more text")


def _round_rows(
    weight_RD: Tensor, importance_D: Tensor, order_D: Tensor, factor_DD: Tensor, format: Format
) -> Tensor:
    """Return the blocks of some rows, whose columns are rounded in ``order_D``."""
    grid = blocks.fit_grid(weight_RD, format, importance_D)
    size = weight_RD.shape[1] // grid.step_RG.shape[1]
    step_RD = grid.step_RG.repeat_interleave(size, dim=1)[:, order_D]
    low_RD = grid.low_RG.repeat_interleave(size, dim=1)[:, order_D]
    left_RD = weight_RD[:, order_D].clone()
    level_RD = torch.empty_like(left_RD)
    levels = grid.codec.levels
    for start in range(0, left_RD.shape[1], COLUMNS):
        stop = min(start + COLUMNS, left_RD.shape[1])
        errors = torch.empty_like(left_RD[:, start:stop])
        for j in range(start, stop):
            w_R, step_R, low_R = left_RD[:, j], step_RD[:, j], low_RD[:, j]
            level_R = levels.nearest(torch.where(step_R == 0, 0, (w_R - low_R) / step_R))
            level_RD[:, j] = level_R
            error_R = (w_R - (level_R * step_R + low_R)) / factor_DD[j, j]
            left_RD[:, j:stop] -= error_R[:, None] * factor_DD[j, j:stop]
            errors[:, j - start] = error_R
        left_RD[:, stop:] -= errors @ factor_DD[start:stop, stop:]
    in_place_RD = torch.empty_like(level_RD)
    in_place_RD[:, order_D] = level_RD
    return grid.pack(levels.codes(in_place_RD))


class Gptq:
    """A quantization of a model while it is written: ``rows`` returns each parameter's blocks in file order.

    ``get(name)`` reads a parameter of the original. ``batches`` are token ids (B, T) for calibration. Layers
    are calibrated, embeddings and head are rounded to the nearest points.
    """

    def __init__(
        self, config: ModelConfig, get: Callable[[str], Tensor], scheme: Scheme, batches: Sequence[Tensor]
    ) -> None:
        if not batches:
            raise QuantError("GPTQ needs calibration text, and there is none")
        self._config, self._get, self._batches = config, get, list(batches)
        self._model = StreamedModel(LlamaLM.on_meta(config), lambda name: get(name).float())
        self._formats = scheme.plan(config)
        self._hidden: list[Tensor] = []
        self._ready: dict[str, Tensor] = {}
        self._next_layer = 0

    def rows(self, name: str) -> Iterable[Tensor]:
        """Return the blocks of the parameter ``name``, in pieces."""
        if not name.startswith("model.layers."):
            return self._rounded(name)
        while name not in self._ready:
            self._quantize_next_layer()
        return [self._ready.pop(name)]

    def _rounded(self, name: str) -> Iterator[Tensor]:
        """Yield nearest points. The embeddings of the calibration text become the first hidden states."""
        weight, format = self._get(name), self._formats[name]
        if weight.ndim == 1:
            yield blocks.encode(weight.view(1, -1), format, name)
            return
        if name == "model.embed_tokens.weight":
            self._hidden = [
                blocks.decode(blocks.encode(weight[ids.flatten()], format, name), format).view(*ids.shape, -1)
                for ids in self._batches
            ]
        for piece in weight.split(ROWS):
            yield blocks.encode(piece, format, name)

    @torch.no_grad()
    def _quantize_next_layer(self) -> None:
        number = self._next_layer
        if not self._hidden or number >= self._config.n_layers:
            raise QuantError(f"GPTQ must read parameters in file order: layer {number} is out of order")
        with self._model.layer(number) as block:
            self._quantize(block, f"model.layers.{number}.")
            self._hidden = [self._model.run(block, x_BTD) for x_BTD in self._hidden]
        self._next_layer += 1

    def _quantize(self, block: DecoderLayer, prefix: str) -> None:
        """Store the blocks of a layer's parameters, and give the layer the weights that they stand for."""
        for name, weight in block.named_parameters():
            if weight.ndim == 1:
                self._ready[prefix + name] = blocks.encode(
                    weight.view(1, -1), self._formats[prefix + name], name
                )
        for stage in STAGES:
            moments_DD = self._moments(block, block.get_submodule(stage[0]))
            for module in stage:
                name = f"{prefix}{module}.weight"
                linear, format = block.get_submodule(module), self._formats[name]
                weight_RD = linear.get_parameter("weight")
                if format.packed:
                    rows_RB = quantize_matrix(weight_RD, moments_DD, format, name)
                else:
                    rows_RB = blocks.encode(weight_RD, format, name)
                weight_RD.copy_(blocks.decode(rows_RB, format))
                self._ready[name] = rows_RB

    def _moments(self, block: DecoderLayer, module: nn.Module) -> Tensor:
        """Return the mean of x x^T over the inputs of ``module``, (D, D) fp32. The forward stops there."""
        total: list[Tensor] = []
        count = 0

        def add_inputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal count
            x_ND = inputs[0].flatten(0, -2)
            count += x_ND.shape[0]
            if total:
                total[0].addmm_(x_ND.T, x_ND)
            else:
                total.append(x_ND.T @ x_ND)
            raise _InputsSeen

        handle = module.register_forward_pre_hook(add_inputs)
        try:
            for x_BTD in self._hidden:
                try:
                    self._model.run(block, x_BTD)
                except _InputsSeen:
                    continue
        finally:
            handle.remove()
        return total[0] / count


class _InputsSeen(Exception):
    """A signal that stops the forward after the inputs of a module have been added."""
