"""Choose the grid of weights: the stored step and lowest value of each group with the least error.

A step that just reaches the largest weight is not always the best: a slightly finer step that clips it can
fit all other weights better. So several initial steps are tried. Each determines the codes, and for these
codes the best step (and lowest value) is a weighted least squares problem with a closed solution. The best of
all is kept. Then the steps are rounded as the format stores them: to half precision, or to 6 bits (Q4_K) or 8
bits (Q6_K) times one half-precision number for each 256 weights.

A weight's squared error is multiplied by ``importance_D`` (the mean square of its inputs) and by
``sqrt(mean square + w²)``, because large weights matter more. Without importance the factor is
``root mean square + |w|``. Both follow llama.cpp's ``quantize_row_*_impl``.

Shapes: R rows, D weights per row, N blocks, G groups per row, S weights per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q6_K, Q8_0, Format
from .packing import Grid, pack_scales


def best_grid(x_RD: Tensor, format: Format, importance_D: Tensor | None) -> Grid:
    """Return the best grid of a packed format for fp32 weights."""
    size = 16 if format == Q6_K else 32
    x_RGS = x_RD.reshape(x_RD.shape[0], -1, size)
    weights_RGS = _weights(x_RGS, importance_D)
    if format == Q4_K:
        return _q4k(x_RGS, weights_RGS)
    if format == Q6_K:
        return _q6k(x_RGS, weights_RGS)
    if format in (Q4_1, Q5_1):
        return _affine(x_RGS, weights_RGS, format, 15 if format == Q4_1 else 31)
    half = {Q4_0: 8, Q5_0: 16, Q8_0: 128}[format]
    step_RG = symmetric_step(x_RGS, weights_RGS, half).half()
    header_RNB = step_RG[..., None].contiguous().view(torch.uint8)
    step_RG = step_RG.float()
    return Grid(format, step_RG, -half * step_RG, 2 * half - 1, header_RNB)


def symmetric_step(x_RGS: Tensor, weights_RGS: Tensor, half: int) -> Tensor:
    """Return the step, of either sign, for codes -half..half - 1 with the least error: (R, G).

    A negative step puts the largest weight on the side with one more code, whichever sign it has.
    """
    largest_RG1 = x_RGS.gather(-1, x_RGS.abs().argmax(-1, keepdim=True))
    best_step = torch.zeros_like(largest_RG1)
    best_gain = torch.full_like(largest_RG1, -1.0)
    for nudge in range(-9, 10):
        inverse = torch.where(largest_RG1 == 0, 0, -(half + 0.1 * nudge) / largest_RG1)
        codes = (x_RGS * inverse).round_().clamp_(-half, half - 1)
        weighted = weights_RGS * codes
        xl = (weighted * x_RGS).sum(-1, keepdim=True)
        ll = (weighted * codes).sum(-1, keepdim=True)
        step = torch.where(ll > 0, xl / ll, 0)
        gain = step * xl  # decrease of the squared error, compared with all zeros
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_step = torch.where(better, step, best_step)
    return best_step[..., 0]


def affine_step(x_RGS: Tensor, weights_RGS: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the step and depth with the least error for codes 0..top, (R, G) each and >= 0.

    The lowest value is -depth.
    """
    high = x_RGS.amax(-1, keepdim=True)
    low = x_RGS.amin(-1, keepdim=True).clamp_(max=0)
    span = high - low
    w = weights_RGS
    sum_w, sum_x = w.sum(-1, keepdim=True), (w * x_RGS).sum(-1, keepdim=True)
    best_step, best_low = span / top, low
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
        # the format cannot store a lowest value above zero; zero is then the best
        lifted = offset > 0
        step, offset = torch.where(lifted, sum_xl / sum_ll, step), torch.where(lifted, 0, offset)
        loss = (w * (codes * step + offset - x_RGS).square_()).sum(-1, keepdim=True)
        better = (loss < best_loss) & (step >= 0)  # False for NaN: a group of equal weights has no solution
        best_loss = torch.where(better, loss, best_loss)
        best_step = torch.where(better, step, best_step)
        best_low = torch.where(better, offset, best_low)
    return best_step[..., 0], -best_low[..., 0]


def _weights(x_RGS: Tensor, importance_D: Tensor | None) -> Tensor:
    mean_square_RG1 = x_RGS.square().mean(-1, keepdim=True)
    if importance_D is None:
        return mean_square_RG1.sqrt() + x_RGS.abs()
    importance_1GS = importance_D.float().reshape(1, -1, x_RGS.shape[-1])
    # never zero: an input that is always zero in calibration may not be later
    importance_1GS = importance_1GS.clamp(min=float(importance_1GS.mean()) * 1e-4)
    return importance_1GS * (mean_square_RG1 + x_RGS.square()).sqrt()


def _affine(x_RGS: Tensor, weights_RGS: Tensor, format: Format, top: int) -> Grid:
    step_RG, depth_RG = affine_step(x_RGS, weights_RGS, top)
    step_RG, low_RG = step_RG.half(), (-depth_RG).half()
    header = torch.stack((step_RG, low_RG), dim=-1).view(torch.uint8)
    return Grid(format, step_RG.float(), low_RG.float(), top, header)


def _q4k(x_RGS: Tensor, weights_RGS: Tensor) -> Grid:
    step_RN8, depth_RN8 = (t.unflatten(-1, (-1, 8)) for t in affine_step(x_RGS, weights_RGS, 15))
    d_RN1, scales = _in_codes(step_RN8, 63)
    dmin_RN1, lows = _in_codes(depth_RN8, 63)
    header = torch.cat(
        (d_RN1.view(torch.uint8), dmin_RN1.view(torch.uint8), pack_scales(scales, lows)), dim=-1
    )
    step_RG = (d_RN1.float() * scales.float()).flatten(-2)
    low_RG = -(dmin_RN1.float() * lows.float()).flatten(-2)
    return Grid(Q4_K, step_RG, low_RG, 15, header)


def _in_codes(values_RN8: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return a half-precision unit per block and codes 0..top whose product approximates numbers >= 0."""
    unit_RN1 = (values_RN8.amax(-1, keepdim=True) / top).half()
    inverse = torch.where(unit_RN1 == 0, 0, 1 / unit_RN1.float())
    return unit_RN1.contiguous(), (values_RN8 * inverse).round_().clamp_(0, top).to(torch.uint8)


def _q6k(x_RGS: Tensor, weights_RGS: Tensor) -> Grid:
    step_RNG = symmetric_step(x_RGS, weights_RGS, 32).unflatten(-1, (-1, 16))
    largest_RN1 = step_RNG.gather(-1, step_RNG.abs().argmax(-1, keepdim=True))
    unit_RN1 = (largest_RN1 / -128).half().contiguous()
    inverse = torch.where(unit_RN1 == 0, 0, 1 / unit_RN1.float())
    scales = (step_RNG * inverse).round_().clamp_(-128, 127).to(torch.int8)
    header = torch.cat((scales.view(torch.uint8), unit_RN1.view(torch.uint8)), dim=-1)
    step_RG = (unit_RN1.float() * scales.float()).flatten(-2)
    return Grid(Q6_K, step_RG, -32 * step_RG, 63, header)
