"""Straight-through rounding: train weights while every forward sees them as a block format stores them.

The optimizer changes full-precision weights. Forward and backward use the nearest values of the format, and
the gradient with respect to these is applied to the full-precision weights unchanged (Bengio et al., arXiv
1308.3432). So a weight that should be on the other side of a rounding threshold moves there, and the blocks
that are written at the end decode to exactly the weights that were trained.

The grids (steps and lowest values of all groups) are fitted once, to the weights that training starts from. A
short training moves weights by a small part of a step, so refitting would gain little. A state therefore
needs no grids: an interrupted run fits the same ones again. Each step only rounds, which is a few passes over
the weights.

Shapes: R rows, D weights per row, B bytes of a packed row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import blocks
from .codec import Grid
from .formats import F32, Format, require_fit


class StraightThrough:
    """The rounding of a model's parameters to their ``formats``, by name. Parameters in F32 are not rounded.

    It is built from the weights that training starts from, and needs twice their memory during a step. Raises
    `QuantError` for rows that do not divide into blocks.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], formats: Mapping[str, Format]) -> None:
        self.formats = dict(formats)
        for name, format in formats.items():
            require_fit(params[name].shape, format, name)
        self._params = {name: params[name] for name in formats}
        self._rounded = {
            name: torch.empty_like(param.data) for name, param in self._params.items() if formats[name] != F32
        }
        self._grids = {
            name: blocks.fit_grid(self._params[name].data, formats[name])
            for name in self._rounded
            if formats[name].packed
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model compute with rounded weights until the block ends. Gradients accumulate as usual."""
        kept = {name: self._params[name].data for name in self._rounded}
        try:
            for name, rounded in self._rounded.items():
                self._round(name, kept[name], rounded)
                self._params[name].data = rounded
            yield
        finally:
            for name, weight in kept.items():
                self._params[name].data = weight

    def rows(self, name: str) -> list[Tensor]:
        """Return the blocks (R, B) uint8 of the parameter ``name`` as rounded, for `write_gguf_folder`."""
        weight, format = self._params[name].data, self.formats[name]
        if name in self._grids:
            return [grid.pack(grid.codes(weight[rows])) for rows, grid in self._pieces(name)]
        return [blocks.encode(weight.reshape(-1, weight.shape[-1]), format, name)]

    def signature(self) -> dict[str, int]:
        """Return the number of parameters in each format: a run must not be resumed with others."""
        return dict(Counter(format.name for format in self.formats.values()))

    def _round(self, name: str, weight: Tensor, out: Tensor) -> None:
        """Write the nearest values of the format to ``out``."""
        if name in self._grids:
            for rows, grid in self._pieces(name):
                out[rows] = grid.nearest(weight[rows])
        else:
            format = self.formats[name]
            rows_RB = blocks.encode(weight.reshape(-1, weight.shape[-1]), format, name)
            out.copy_(blocks.decode(rows_RB, format, out.dtype).view(out.shape))

    def _pieces(self, name: str) -> Iterator[tuple[slice, Grid]]:
        """Yield rows that fit into the CPU's cache, and their grid."""
        grid, n_rows = self._grids[name], self._params[name].shape[0]
        for rows in blocks.pieces(n_rows, self._params[name].shape[-1]):
            yield rows, grid.of_rows(rows)
