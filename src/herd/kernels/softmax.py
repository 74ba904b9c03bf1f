"""Losses of the rows of a chunk of logits, and their gradient, which is written over the logits.

The native kernel takes one row at a time, which stays in the cache during its three passes. The plain torch
functions do the same with blocks of rows. They serve other devices and float64, and the kernel is tested
against them.

Shapes: C tokens of a chunk, V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import build

BLOCK_BYTES = 1 << 20


def cross_entropy_(logits_CV: Tensor, targets_C: Tensor, with_gradient: bool = True) -> Tensor:
    """Return -log softmax(logits)[target] of every row, (C,) in fp32 (or float64).

    ``logits_CV`` must be contiguous and becomes softmax - onehot if ``with_gradient``. Every target must be a
    word.
    """
    if _native(logits_CV):
        _check(targets_C, logits_CV)
        return torch.ops.herd_native.cross_entropy_(logits_CV, targets_C.contiguous(), with_gradient)
    return plain_cross_entropy_(logits_CV, targets_C, with_gradient)


def plain_cross_entropy_(logits_CV: Tensor, targets_C: Tensor, with_gradient: bool = True) -> Tensor:
    """Compute `cross_entropy_` in plain torch."""
    losses = []
    for own_cV, targets_c in _blocks(logits_CV, targets_C):
        logits_cV = _wide(own_cV)
        picked_c1 = logits_cV.gather(1, targets_c[:, None])
        log_z_c1, sum_c1 = _exponentiate_(logits_cV)
        losses.append((log_z_c1 - picked_c1).squeeze(1))
        if with_gradient:
            logits_cV.div_(sum_c1)
            logits_cV.scatter_add_(1, targets_c[:, None], torch.full_like(sum_c1, -1.0))
            _store(logits_cV, own_cV)
    return torch.cat(losses)


def distil_(
    student_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor, tau: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and KL(teacher || student) at temperature ``tau`` of every row, each (C,).

    ``student_CV`` becomes the gradient of kl_weight · tau² · KL + (1 - kl_weight) · CE. The contents of
    ``teacher_CV`` are overwritten.
    """
    if _native(student_CV) and teacher_CV.dtype == student_CV.dtype:
        _check(targets_C, student_CV)
        return torch.ops.herd_native.distil_(student_CV, teacher_CV, targets_C.contiguous(), tau, kl_weight)
    return plain_distil_(student_CV, teacher_CV, targets_C, tau, kl_weight)


def plain_distil_(
    student_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor, tau: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Compute `distil_` in plain torch."""
    ces, kls = [], []
    for own_cV, teacher_cV, targets_c in _blocks(student_CV, teacher_CV, targets_C):
        student_cV, teacher_cV = _wide(own_cV), _wide(teacher_cV)
        plain_cV = student_cV.clone()
        ces.append(plain_cross_entropy_(plain_cV, targets_c, with_gradient=kl_weight != 1))

        log_q_cV = torch.log_softmax(student_cV / tau, dim=-1)
        log_p_cV = torch.log_softmax(teacher_cV / tau, dim=-1)
        p_cV = log_p_cV.exp()
        kls.append((p_cV * (log_p_cV - log_q_cV)).sum(-1))

        torch.sub(log_q_cV.exp_(), p_cV, out=student_cV)
        student_cV *= kl_weight * tau  # tau² of the loss, 1/tau of the softened logits
        if kl_weight != 1:
            student_cV.add_(plain_cV, alpha=1 - kl_weight)
        _store(student_cV, own_cV)
    return torch.cat(ces), torch.cat(kls)


def reverse_distil_(
    student_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor, tau: float, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and KL(student || teacher) of every row, each (C,). Otherwise as `distil_`."""
    ces, kls = [], []
    for own_cV, teacher_cV, targets_c in _blocks(student_CV, teacher_CV, targets_C):
        student_cV = _wide(own_cV)
        plain_cV = student_cV.clone()
        ces.append(plain_cross_entropy_(plain_cV, targets_c, with_gradient=kl_weight != 1))
        log_q_cV = torch.log_softmax(student_cV / tau, dim=-1)
        gap_cV = log_q_cV - torch.log_softmax(_wide(teacher_cV) / tau, dim=-1)
        q_cV = log_q_cV.exp_()
        kl_c1 = (q_cV * gap_cV).sum(-1, keepdim=True)
        kls.append(kl_c1.squeeze(1))
        gradient_cV = q_cV.mul_(gap_cV.sub_(kl_c1)).mul_(kl_weight * tau)
        if kl_weight != 1:
            gradient_cV.add_(plain_cV, alpha=1 - kl_weight)
        own_cV.copy_(gradient_cV)
    return torch.cat(ces), torch.cat(kls)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _store(result: Tensor, to: Tensor) -> None:
    if result is not to:
        to.copy_(result)


def _native(logits_CV: Tensor) -> bool:
    return (
        logits_CV.device.type == "cpu"
        and logits_CV.dtype in (torch.float32, torch.bfloat16)
        and build.ready()
    )


def _check(targets_C: Tensor, logits_CV: Tensor) -> None:
    """Raise torch's own IndexError for a target outside the vocabulary.

    The kernel uses targets as indices.
    """
    low, high = (int(x) for x in torch.aminmax(targets_C))
    if low < 0 or high >= logits_CV.shape[1]:
        raise IndexError(
            f"Target {low if low < 0 else high} is out of bounds for {logits_CV.shape[1]} classes."
        )


def _exponentiate_(logits_cV: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits by exp(logit - max). Return log of the normalizer and the sum, each (c, 1)."""
    max_c1 = logits_cV.amax(dim=-1, keepdim=True)
    sum_c1 = logits_cV.sub_(max_c1).exp_().sum(dim=-1, keepdim=True)
    return sum_c1.log() + max_c1, sum_c1


def _blocks(first_CV: Tensor, *others: Tensor):
    rows = max(1, BLOCK_BYTES // (first_CV.shape[1] * first_CV.element_size()))
    if first_CV.is_cuda:  # fewer launches matter more than the cache
        rows = max(1, first_CV.shape[0])
    return zip(*(x.split(rows) for x in (first_CV, *others)), strict=True)
