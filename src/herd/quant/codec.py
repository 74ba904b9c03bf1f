"""The base of all packed formats: how a block of weights is stored in bytes, and how its grid is fitted.

In every format a weight is ``step * level + low``. Its code selects one of the format's levels. The step, and
the lowest value of formats that have one, belong to a group of weights. They are half-precision numbers ``d``
and ``m`` of the block. In formats of 256 weights, they are ``d`` and ``-m`` times small integers of the
group.

A format is a subclass of `Codec`: the fields of its block, its levels, and four functions that convert codes
and integer scales to fields and back.

Shapes: R rows, D weights per row, N blocks per row, G groups per block or per row, S weights, B bytes.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bits import half_bytes, halves
from .formats import TYPES, Format
from .grids import Levels, best_affine, best_step, column_weights, inverse_step

Fields = Mapping[str, Tensor]
"""The bytes (R, N, B) of a block's fields by name."""


class Codec(ABC):
    """A packed format: how its blocks are read and written."""

    name: ClassVar[str]
    struct: ClassVar[Mapping[str, int]]
    """The fields of a block and their bytes, in order."""
    levels: ClassVar[Levels]
    scales: ClassVar[Levels | None] = None
    """The integers that multiply ``d`` and ``m``, or None if a block has one group."""
    group: ClassVar[int] = 32
    """Number of weights with the same step."""

    @abstractmethod
    def unpack_codes(self, fields: Fields) -> Tensor:
        """Return the codes, (R, N, S) uint8."""

    @abstractmethod
    def pack_codes(self, codes_RNS: Tensor) -> Fields:
        """Return the fields that contain the codes."""

    def unpack_scales(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        """Return the groups' steps as integers, and their lowest values if there are any: (R, N, G)."""
        raise NotImplementedError

    def pack_scales(self, scales_RNG: Tensor, lows_RNG: Tensor | None) -> Fields:
        """Return the fields that contain the codes of the groups' integers, both uint8."""
        raise NotImplementedError

    @property
    def format(self) -> Format:
        """The format's number and sizes."""
        return TYPES[self.name]

    @property
    def affine(self) -> bool:
        """Whether groups have a lowest value. Otherwise the grid contains zero."""
        return "m" in self.struct

    def half_positions(self) -> Iterator[int]:
        """Yield the positions of half-precision numbers in a block, in bytes."""
        position = 0
        for field, size in self.struct.items():
            if field in ("d", "m"):
                yield position
            position += size

    def split(self, blocks_RB: Tensor) -> Fields:
        """Return the fields of blocks, as views."""
        blocks_RNB = blocks_RB.reshape(blocks_RB.shape[0], -1, self.format.block_bytes)
        return dict(zip(self.struct, blocks_RNB.split(list(self.struct.values()), dim=-1), strict=True))

    def join(self, fields: Fields) -> Tensor:
        """Undo `split`: return the blocks, (R, B) uint8."""
        return torch.cat([fields[field] for field in self.struct], dim=-1).flatten(1)

    def decode(self, blocks_RB: Tensor) -> Tensor:
        """Return the weights, (R, D) fp32."""
        fields = self.split(blocks_RB)
        step_RNG, low_RNG = self._steps(fields)
        out = self.levels.of(self.unpack_codes(fields)).unflatten(-1, (step_RNG.shape[-1], -1))
        out = out * step_RNG[..., None]
        if low_RNG is not None:
            out += low_RNG[..., None]
        return out.flatten(1)

    def encode(self, x_RD: Tensor, importance_D: Tensor | None) -> Tensor:
        """Return the blocks (R, B) uint8 of weights, with columns weighted by ``importance_D``."""
        grid = self.fit(x_RD, importance_D)
        return grid.pack(grid.codes(x_RD))

    def fit(self, x_RD: Tensor, importance_D: Tensor | None) -> Grid:
        """Return the best grid for fp32 weights."""
        R, D = x_RD.shape
        x_RGS = x_RD.reshape(R, -1, self.group)
        weights_RGS = column_weights(x_RGS, importance_D, self.format.block)
        low_RG = None
        if self.affine:
            step_RG, low_RG = best_affine(x_RGS, weights_RGS, self.levels.highest)
        else:
            step_RG = best_step(x_RGS, weights_RGS, self.levels)
        header = self._header(step_RG, low_RG, weights_RGS.sum(-1), D // self.format.block)
        if self.scales is not None and self.affine:
            header = self._nudge_scales(header, x_RGS, weights_RGS)
        step_RNG, low_RNG = self._steps(header)
        low_RNG = torch.zeros_like(step_RNG) if low_RNG is None else low_RNG
        return Grid(self, step_RNG.flatten(1), low_RNG.flatten(1), header)

    def _nudge_scales(self, header: Fields, x_RGS: Tensor, weights_RGS: Tensor) -> Fields:
        """Return the header with each group's integers changed by one if its error is then smaller.

        Step and lowest value were rounded to integers separately, but their errors can cancel out.
        """
        assert self.scales
        scales_RNG, lows_RNG = self.unpack_scales(header)
        assert lows_RNG is not None
        best, best_low = scales_RNG.float(), lows_RNG.float()
        x_RNGS, weights_RNGS = (t_RGS.view(*best.shape, self.group) for t_RGS in (x_RGS, weights_RGS))
        best_loss = torch.full_like(best, torch.inf)
        for change, low_change in itertools.product((0, -1, 1), repeat=2):
            scale = (scales_RNG.float() + change).clamp_(0, self.scales.highest)
            low = (lows_RNG.float() + low_change).clamp_(0, self.scales.highest)
            step = halves(header["d"]) * scale
            lifted = x_RNGS + (halves(header["m"]) * low)[..., None]
            error = self.levels.nearest(lifted * inverse_step(step)[..., None]) * step[..., None] - lifted
            loss = (weights_RNGS * error.square_()).sum(-1)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best, best_low = torch.where(better, scale, best), torch.where(better, low, best_low)
        return {**header, **self.pack_scales(self.scales.codes(best), self.scales.codes(best_low))}

    def _header(self, step_RG: Tensor, low_RG: Tensor | None, weights_RG: Tensor, n_blocks: int) -> Fields:
        """Return the fields of the grid: steps and lowest values, rounded as they are stored."""
        if self.scales is None:
            d = {"d": half_bytes(step_RG[..., None])}
            return d if low_RG is None else d | {"m": half_bytes(low_RG[..., None])}
        weights_RNG = weights_RG.unflatten(1, (n_blocks, -1))

        def in_units(values_RG: Tensor) -> tuple[Tensor, Tensor]:
            assert self.scales
            values_RNG = values_RG.unflatten(1, (n_blocks, -1))
            unit_RN1 = best_step(values_RNG, weights_RNG, self.scales)[..., None].half()
            return half_bytes(unit_RN1), self.scales.codes(values_RNG * inverse_step(unit_RN1.float()))

        d_RN2, scales_RNG = in_units(step_RG)
        if low_RG is None:
            return {"d": d_RN2} | dict(self.pack_scales(scales_RNG, None))
        m_RN2, lows_RNG = in_units(-low_RG)
        return {"d": d_RN2, "m": m_RN2} | dict(self.pack_scales(scales_RNG, lows_RNG))

    def _steps(self, fields: Fields) -> tuple[Tensor, Tensor | None]:
        """Return the groups' steps and lowest values, (R, N, G) fp32."""
        step_RNG = halves(fields["d"])
        low_RNG = halves(fields["m"]) if self.affine else None
        if self.scales is not None:
            scales_RNG, lows_RNG = self.unpack_scales(fields)
            step_RNG = step_RNG * scales_RNG.float()
            if low_RNG is not None and lows_RNG is not None:
                low_RNG = -(low_RNG * lows_RNG.float())
        return step_RNG, low_RNG


@dataclass(frozen=True)
class Grid:
    """The values of weights: ``step_RG * level + low_RG``, in groups of D / G weights.

    ``header`` has the fields of steps and lowest values.
    """

    codec: Codec
    step_RG: Tensor
    low_RG: Tensor
    header: Fields

    def codes(self, x_RD: Tensor) -> Tensor:
        """Return the nearest code of every weight, (R, D) uint8."""
        x_RGS = x_RD.float().reshape(x_RD.shape[0], self.step_RG.shape[1], -1)
        inverse_RG = inverse_step(self.step_RG)
        return self.codec.levels.codes((x_RGS - self.low_RG[..., None]) * inverse_RG[..., None]).flatten(1)

    def nearest(self, x_RD: Tensor) -> Tensor:
        """Return the nearest value of every weight, (R, D) fp32: the one that its code is decoded to."""
        x_RGS = x_RD.float().reshape(x_RD.shape[0], self.step_RG.shape[1], -1)
        step_RG1, low_RG1 = self.step_RG[..., None], self.low_RG[..., None]
        lifted_RGS = x_RGS - low_RG1 if self.codec.affine else x_RGS
        level_RGS = self.codec.levels.nearest(lifted_RGS * inverse_step(step_RG1)).mul_(step_RG1)
        return (level_RGS.add_(low_RG1) if self.codec.affine else level_RGS).flatten(1)

    def of_rows(self, rows: slice) -> Grid:
        """Return the grid of some rows."""
        header = {field: part_RNB[rows] for field, part_RNB in self.header.items()}
        return Grid(self.codec, self.step_RG[rows], self.low_RG[rows], header)

    def values(self, codes_RD: Tensor) -> Tensor:
        """Return the weights of these codes, (R, D) fp32."""
        level_RGS = self.codec.levels.of(codes_RD).reshape(codes_RD.shape[0], self.step_RG.shape[1], -1)
        return (level_RGS * self.step_RG[..., None] + self.low_RG[..., None]).flatten(1)

    def pack(self, codes_RD: Tensor) -> Tensor:
        """Return the blocks (R, B) uint8 of codes."""
        block = self.codec.format.block
        codes_RNS = codes_RD.view(codes_RD.shape[0], codes_RD.shape[1] // block, block)
        return self.codec.join({**self.header, **self.codec.pack_codes(codes_RNS)})
