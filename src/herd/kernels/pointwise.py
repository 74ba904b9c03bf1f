"""RMSNorm, rotary positions and SwiGLU, the operators between the matmuls, with one pass over memory each.

In eager mode on a CPU these chains of small operators cost as much as a matmul, in time and in kept
temporaries. Native kernels fuse each into one pass forward and one backward. Elsewhere (on a GPU, in float64,
under torch.compile, which fuses them itself) the plain torch functions below run. The kernels are tested
against them.

Shapes: B batch, T time, D model dim, H heads, K head dim, F ffn dim, N = B·T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import build
from .recompute import offer

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return weight · x / sqrt(mean(x²) + eps) over the last dim.

    Statistics are in fp32, the result in x's dtype (or autocast's).
    """
    if _native(x, weight_D) and weight_D.dtype == x.dtype:
        narrow = _narrow(x)
        if not torch.is_grad_enabled():
            return _normed(x, weight_D, eps, narrow)[0].view(x.shape)
        y = _RMSNorm.apply(x, weight_D, eps, narrow)
        x, weight_D = x.detach(), weight_D.detach()
        return offer(y, lambda: _normed(x, weight_D, eps, narrow)[0].view(x.shape))
    return plain_rms_norm(x, weight_D, eps)


def rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """Rotate each channel pair (i, i + K/2).

    ``cos`` and ``sin`` (B or 1, T, 1, K) contain every angle in both halves.
    """
    if _native(x_BTHK, cos_BT1K) and cos_BT1K.shape[0] in (1, x_BTHK.shape[0]):
        turn = _Rotate.apply if torch.is_grad_enabled() else _turned
        return turn(x_BTHK, cos_BT1K, sin_BT1K)
    return plain_rotate(x_BTHK, cos_BT1K, sin_BT1K)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up (arXiv 2002.05202)."""
    if _native(gate, up) and gate.dtype == up.dtype:
        if not torch.is_grad_enabled():
            return _swiglu(gate, up)
        y, gate, up = _SwiGLU.apply(gate, up), gate.detach(), up.detach()
        return offer(y, lambda: _swiglu(gate, up))
    return plain_swiglu(gate, up)


def plain_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` in plain torch."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * wide.to(x.dtype)


def plain_rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """Compute `rotate` in plain torch."""
    half = x_BTHK.shape[-1] // 2
    swapped = torch.cat((-x_BTHK[..., half:], x_BTHK[..., :half]), dim=-1)
    return x_BTHK * cos_BT1K + swapped * sin_BT1K


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `swiglu` in plain torch."""
    return F.silu(gate) * up


def _native(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    for x in tensors:  # a loop, because a generator costs more and this runs six times per layer and token
        if type(x) not in _PLAIN or not x.is_cpu or x.dtype not in NATIVE_DTYPES:
            return False
    return build.ready()


_PLAIN = (Tensor, torch.nn.Parameter)  # DTensors and fake tensors take the plain path


def _narrow(x: Tensor) -> bool:
    """Return whether autocast would round the result to bf16 at the next matmul anyway."""
    if x.dtype != torch.float32 or not torch.is_autocast_enabled("cpu"):
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16


def _rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


def _normed(x: Tensor, weight_D: Tensor, eps: float, narrow: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.herd_native.rms_norm(_rows(x), weight_D.contiguous(), eps, narrow)


def _turned(x_BTHK: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    sign = -1.0 if back else 1.0
    return torch.ops.herd_native.rotate(x_BTHK.contiguous(), cos.contiguous(), sin.contiguous(), sign)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, narrow: bool) -> Tensor:
        y_ND, rstd_N = _normed(x, weight_D, eps, narrow)
        ctx.save_for_backward(x, weight_D, rstd_N)
        return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight_D, rstd_N = ctx.saved_tensors
        x_ND, dy_ND = _rows(x), _rows(dy)
        dx_ND, dw_UD = torch.ops.herd_native.rms_norm_backward(dy_ND, x_ND, weight_D.contiguous(), rstd_N)
        return dx_ND.view(dy.shape), dw_UD.sum(0).to(weight_D.dtype), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BTHK, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, sin, back=True), None, None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.herd_native.swiglu(gate.contiguous(), up.contiguous())


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.herd_native.swiglu_backward(dy.contiguous(), gate.contiguous(), up.contiguous())
