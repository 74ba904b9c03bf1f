"""Choose the grid of weights: the step and the lowest value of each group with the least error.

A step that just reaches the largest weight is not always the best: a slightly finer step that clips it can
fit all other weights better. So several initial steps are tried. Each determines the codes, and for these
codes the best step (and lowest value) is a weighted least squares problem with a closed solution. The best of
all is kept. The steps of a block's groups are rounded by the same search to integers times one number.

Source: llama.cpp's ``make_qx_quants``, ``make_qkx3_quants`` and ``make_qp_quants``.

Shapes: R rows, G groups per row, S weights per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """The numbers that codes stand for: ``lowest`` to ``highest``, or the sorted ``table``."""

    lowest: int
    highest: int
    table: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[int, ...]:
        """All levels, in the order of their codes."""
        return self.table or tuple(range(self.lowest, self.highest + 1))

    def codes(self, scaled: Tensor) -> Tensor:
        """Return the codes (uint8) of the levels that are nearest to some numbers."""
        if self.table:
            return self._look_up(
                scaled, torch.arange(len(self.table), dtype=torch.uint8, device=scaled.device)
            )
        return (scaled.round().clamp_(self.lowest, self.highest) - self.lowest).to(torch.uint8)

    def nearest(self, scaled: Tensor) -> Tensor:
        """Return the levels that are nearest to some numbers, in their dtype."""
        if self.table:
            return self._look_up(scaled, self._tensor(scaled.device))
        return scaled.round().clamp_(self.lowest, self.highest)

    def of(self, codes: Tensor) -> Tensor:
        """Return the levels of codes, in fp32."""
        if self.table:
            return self._tensor(codes.device)[codes.int()]
        return codes.float() + self.lowest if self.lowest else codes.float()

    def _tensor(self, device: torch.device) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float32, device=device)

    def _look_up(self, scaled: Tensor, values: Tensor) -> Tensor:
        """Return the item of ``values`` that belongs to the nearest level.

        Levels are integers, so the nearest one is the same for all numbers between two halves.
        """
        table = self._tensor(scaled.device)
        halves = torch.arange(2 * self.lowest, 2 * self.highest + 1, device=scaled.device) / 2 + 0.25
        nearest = torch.bucketize(halves, (table[1:] + table[:-1]) / 2)
        index = (scaled * 2).nan_to_num_().floor_().clamp_(
            2 * self.lowest, 2 * self.highest
        ) - 2 * self.lowest
        return values[nearest].index_select(0, index.flatten().int()).view(scaled.shape)


def best_step(x_RGS: Tensor, weights_RGS: Tensor, levels: Levels) -> Tensor:
    """Return the step, of either sign, with the least error of ``step * level``: (R, G).

    A negative step puts the number of largest magnitude at the lowest level, whichever sign it has.
    """
    largest_RG1 = x_RGS.gather(-1, x_RGS.abs().argmax(-1, keepdim=True))
    outermost = levels.lowest if levels.lowest < 0 else levels.highest
    nudge = 1.0 if levels.table else 0.1
    starts = [outermost + nudge * n for n in range(-9, 10)]
    if levels.table:  # whose two ends differ
        starts += [levels.highest + 2.0 * n for n in range(-3, 4)]
    best = torch.zeros_like(largest_RG1)
    best_gain = torch.full_like(largest_RG1, -1.0)
    for start in starts:
        inverse = torch.where(largest_RG1 == 0, 0, start / largest_RG1)
        level_RGS = levels.nearest(x_RGS * inverse)
        weighted = weights_RGS * level_RGS
        xl = (weighted * x_RGS).sum(-1, keepdim=True)
        ll = (weighted * level_RGS).sum(-1, keepdim=True)
        step = torch.where(ll > 0, xl / ll, 0)
        gain = step * xl  # decrease of the squared error, compared with all zeros
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, step, best)
    return best[..., 0]


def best_affine(x_RGS: Tensor, weights_RGS: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the step and the lowest value with the least error for codes 0..top, (R, G) each.

    Steps are >= 0 and lowest values <= 0, since the K formats cannot store others.
    """
    high = x_RGS.amax(-1, keepdim=True)
    low = x_RGS.amin(-1, keepdim=True).clamp_(max=0)
    span = high - low
    w = weights_RGS
    sum_w, sum_x = w.sum(-1, keepdim=True), (w * x_RGS).sum(-1, keepdim=True)
    best, best_low = span / top, low
    best_loss = torch.full_like(span, torch.inf)
    for nudge in range(21):
        inverse = torch.where(span > 0, (top - 1 + 0.1 * nudge) / span, 0)
        codes = ((x_RGS - low) * inverse).round_().clamp_(0, top)
        weighted = w * codes
        sum_l = weighted.sum(-1, keepdim=True)
        sum_ll = (weighted * codes).sum(-1, keepdim=True)
        sum_xl = (weighted * x_RGS).sum(-1, keepdim=True)
        det = sum_w * sum_ll - sum_l * sum_l
        step = (sum_w * sum_xl - sum_x * sum_l) / det
        offset = (sum_ll * sum_x - sum_l * sum_xl) / det
        # the format cannot store a lowest value above zero, so zero is then the best
        lifted = offset > 0
        step, offset = torch.where(lifted, sum_xl / sum_ll, step), torch.where(lifted, 0, offset)
        loss = (w * (codes * step + offset - x_RGS).square_()).sum(-1, keepdim=True)
        better = (loss < best_loss) & (step >= 0)  # False for NaN: a group of equal weights has no solution
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better, step, best)
        best_low = torch.where(better, offset, best_low)
    return best[..., 0], best_low[..., 0]


def inverse_step(step: Tensor) -> Tensor:
    """Return 1 / step, or 0 if the step is 0 or so small that its inverse overflows."""
    inverse = 1 / step
    return torch.where(inverse.isfinite(), inverse, 0)


def column_weights(x_RGS: Tensor, importance_D: Tensor | None, block: int) -> Tensor:
    """Return the weight of each number's squared error, (R, G, S).

    It is ``importance_D`` (the mean square of the inputs) times ``sqrt(mean square of the block + x²)``,
    because large weights matter more. Without importance it is the group's root mean square plus ``|x|``.
    """
    if importance_D is None:
        return x_RGS.square().mean(-1, keepdim=True).sqrt() + x_RGS.abs()
    R, _, S = x_RGS.shape
    squares = x_RGS.square()
    mean_RG1 = squares.view(R, -1, max(block, S)).mean(-1).repeat_interleave(max(block, S) // S, 1)[..., None]
    importance_1GS = importance_D.float().reshape(1, -1, S)
    # never zero: an input that is always zero in calibration may not be later
    importance_1GS = importance_1GS.clamp(min=float(importance_1GS.mean()) * 1e-4)
    return importance_1GS * (mean_RG1 + squares).sqrt_()
