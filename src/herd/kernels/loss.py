"""Linear layer and loss over the vocabulary in one, without the (tokens x vocabulary) matrix of logits.

The head's logits of N tokens over V words are N·V numbers: at V = 128,256 in fp32, 513 KB per token. Here
they exist for one chunk of tokens at a time, and each chunk's gradient is formed in place while its logits
are in memory, so nothing is computed twice and backward only scales. Tokens that are not trained (target
-100) are dropped before the first matmul, so a dialog costs as much as its trained tokens. Idea: Liger Kernel
(arXiv 2410.10989) and Cut Cross-Entropy (arXiv 2411.09009).

The matmuls run in the inputs' dtype (or autocast's), softmax and sums in fp32 (float64 for float64 inputs).
The weight's gradient is summed in fp32. Backward can run only once, because it uses up the gradients that
forward made.

Shapes: N tokens (N' of them trained), C tokens of a chunk, P the same padded, D model dim, E the teacher's, V
vocabulary (v of them in a tile).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .softmax import cross_entropy_, distil_, reverse_distil_

IGNORED = -100
ROWS = 64
"""Chunks are padded to a multiple of this many tokens."""
CHUNK_BYTES = 128 << 20
"""fp32 logits of one chunk: larger chunks gain little speed, smaller ones lose some in every matmul."""
TILE = 1 << 22
"""Weights of a packed head that are unpacked at a time: 16 MiB in fp32."""


class PackedHead(Protocol):
    """A frozen head whose weight (V, D) is stored quantized and unpacked a few rows at a time."""

    in_features: int
    out_features: int

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight, unpacked.

        ``start`` is a multiple of 16, and so is ``stop`` unless it is the number of rows.
        """


Weight = Tensor | PackedHead
W = TypeVar("W", bound=Weight)


def weight_of(head: nn.Module) -> Weight:
    """Return the argument of the losses below for ``head``: its weight, or a packed head itself."""
    return cast("Weight", head if hasattr(head, "weight_rows") else head.weight)


class DistilLoss(NamedTuple):
    """Sums over trained tokens, fp32 scalars. ``total`` carries the gradient, the others are for the log."""

    total: Tensor
    ce: Tensor
    kl: Tensor


class SampledTargets(NamedTuple):
    """A teacher's distribution for every token, as draws from it with replacement.

    ``ids_NJ`` (int64) are the distinct words that were drawn, ``weights_NJ`` the fraction of the draws that
    each received (0 for padding), ``log_p_NJ`` the teacher's log-probability of each. The weights of a token
    sum to 1, and on average over the draws they are the teacher's distribution.
    """

    ids_NJ: Tensor
    weights_NJ: Tensor
    log_p_NJ: Tensor


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Weight, targets_N: Tensor) -> Tensor:
    """Return the sum over tokens of -log softmax(hidden @ weight.T)[target], an fp32 scalar.

    Targets of -100 do not count. Gradients flow to ``hidden_ND`` and to a ``weight_VD`` that is a tensor.
    Their memory is allocated in forward, and memory for all logits never.
    """
    return _fused_loss(hidden_ND, weight_VD, targets_N, partial(_cross_entropy_chunk, targets_N)).total


def linear_distil(
    student_ND: Tensor,
    student_weight_VD: Weight,
    targets_N: Tensor,
    teacher_NE: Tensor,
    teacher_weight_VE: Weight,
    tau: float = 1.0,
    kl_weight: float = 1.0,
    *,
    reverse: bool = False,
) -> DistilLoss:
    """Return the sum over tokens of kl_weight · tau² · KL(teacher || student) + (1 - kl_weight) · CE.

    With ``reverse`` the divergence is KL(student || teacher). The student's logits are computed once for
    both. tau² keeps the gradient's size at any temperature ``tau`` (Hinton et al., arXiv 1503.02531). The
    teacher gets no gradient. Tokens with target -100 do not count. Both parts are returned unweighted, in
    nats.
    """
    teacher = _autocast(teacher_NE.detach()), _autocast(_detached(teacher_weight_VE))
    chunk_loss = partial(_distil_chunk, targets_N, *teacher, tau, kl_weight, reverse)
    return _fused_loss(student_ND, student_weight_VD, targets_N, chunk_loss, kl_weight)


def linear_sampled_distil(
    student_ND: Tensor,
    student_weight_VD: Weight,
    targets_N: Tensor,
    sampled: SampledTargets,
    kl_weight: float = 1.0,
    *,
    reverse: bool = False,
) -> DistilLoss:
    """Return the loss of `linear_distil` at tau 1, estimated from draws of the teacher's distribution.

    Loss and gradient are unbiased: their mean over the draws is that of the whole distribution (arXiv
    2503.16870). KL(teacher || student) is estimated by the mean over draws of log p - log q, and KL(student
    || teacher) by the mean of r log r - r + 1 with r = q / p. The second has a much larger variance. No
    tensor of the teacher's has the size of its vocabulary.
    """
    chunk_loss = partial(_sampled_chunk, targets_N, sampled, kl_weight, reverse)
    return _fused_loss(student_ND, student_weight_VD, targets_N, chunk_loss, kl_weight)


ChunkLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""``loss(logits_CV, rows_C, with_gradient)`` returns the sums of cross-entropy and of KL of the tokens
``rows_C``. With ``with_gradient`` the logits become the gradient of the weighted sum of both."""


def _fused_loss(
    hidden_ND: Tensor, weight_VD: Weight, targets_N: Tensor, chunk_loss: ChunkLoss, kl_weight: float = 0.0
) -> DistilLoss:
    """Return kl_weight · KL + (1 - kl_weight) · CE and its two parts, summed over the trained tokens."""
    hidden_ND, weight_VD = _autocast(hidden_ND), _autocast(weight_VD)
    sums = partial(_sums, hidden_ND.detach(), _detached(weight_VD), targets_N, chunk_loss, kl_weight)
    return DistilLoss(*_FusedLoss.apply(hidden_ND, weight_VD, sums, *_needs(hidden_ND, weight_VD)))


def _sums(
    hidden_ND: Tensor,
    weight_VD: Weight,
    targets_N: Tensor,
    chunk_loss: ChunkLoss,
    kl_weight: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total, cross-entropy, KL, and the gradients of the hidden states and the weight.

    A gradient that is not needed is empty.
    """
    grads = _Gradients(hidden_ND, weight_VD, need_hidden, need_weight)
    ce, kl = (torch.zeros((), dtype=_wide(hidden_ND), device=hidden_ND.device) for _ in range(2))
    for rows_C in _chunks(_trained(targets_N), weight_VD):
        hidden_PD = _padded(hidden_ND[_index(rows_C)])
        logits_PV = _logits(hidden_PD, weight_VD)
        chunk_ce, chunk_kl = chunk_loss(logits_PV[: len(rows_C)], rows_C, need_hidden or need_weight)
        ce += chunk_ce
        kl += chunk_kl
        grads.add(rows_C, hidden_PD, logits_PV)
        del logits_PV  # before the next chunk's are made
    return kl_weight * kl + (1 - kl_weight) * ce, ce, kl, *grads.finish()


def _cross_entropy_chunk(
    targets_N: Tensor, logits_CV: Tensor, rows_C: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    ce_C = cross_entropy_(logits_CV, targets_N[rows_C], with_gradient)
    return ce_C.sum(), ce_C.new_zeros(())


def _distil_chunk(
    targets_N: Tensor,
    teacher_NE: Tensor,
    teacher_weight_VE: Weight,
    tau: float,
    kl_weight: float,
    reverse: bool,
    logits_CV: Tensor,
    rows_C: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """See `ChunkLoss`. The gradient comes with the KL, so it is computed in any case."""
    teacher_PV = _logits(_padded(teacher_NE[_index(rows_C)]), teacher_weight_VE)
    loss_ = reverse_distil_ if reverse else distil_
    ce_C, kl_C = loss_(logits_CV, teacher_PV[: len(rows_C)], targets_N[rows_C], tau, kl_weight)
    return ce_C.sum(), tau * tau * kl_C.sum()


def _sampled_chunk(
    targets_N: Tensor,
    sampled: SampledTargets,
    kl_weight: float,
    reverse: bool,
    logits_CV: Tensor,
    rows_C: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    targets_C1 = targets_N[rows_C, None]
    ids_CJ = sampled.ids_NJ[rows_C]
    dtype = _wide(logits_CV)
    weights_CJ, log_p_CJ = (x[rows_C].to(dtype) for x in (sampled.weights_NJ, sampled.log_p_NJ))
    score_C1, scores_CJ = (logits_CV.gather(1, ids).to(dtype) for ids in (targets_C1, ids_CJ))
    ce_C1 = cross_entropy_(logits_CV, targets_C1[:, 0], with_gradient)[:, None]
    log_ratio_CJ = scores_CJ - (ce_C1 + score_C1) - log_p_CJ  # log q - log p
    if reverse:
        ratio_CJ = log_ratio_CJ.exp()
        slope_CJ = weights_CJ * ratio_CJ * log_ratio_CJ  # of the loss by log q
        kl = (slope_CJ - weights_CJ * (ratio_CJ - 1)).sum()
    else:
        slope_CJ = -weights_CJ
        kl = (slope_CJ * log_ratio_CJ).sum()
    if with_gradient:  # logits_CV is now softmax - onehot(target)
        slope_C1 = kl_weight * slope_CJ.sum(1, keepdim=True)
        if reverse:
            logits_CV *= (1 - kl_weight - slope_C1).to(logits_CV.dtype)
        _add_at(logits_CV, targets_C1, -slope_C1)
        _add_at(logits_CV, ids_CJ, kl_weight * slope_CJ)
    return ce_C1.sum(), kl


def _add_at(to_CV: Tensor, ids_CJ: Tensor, values_CJ: Tensor) -> None:
    """Add values to some words of every row in place. (`scatter_add_` takes 600 times as long on a CPU.)"""
    rows_CJ = torch.arange(len(ids_CJ), device=ids_CJ.device)[:, None].expand_as(ids_CJ)
    to_CV.index_put_((rows_CJ, ids_CJ), values_CJ.to(to_CV.dtype), accumulate=True)


class _Gradients:
    """The gradients of all chunks: rows of the hidden states, and a sum for the weight in fp32."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Weight, need_hidden: bool, need_weight: bool) -> None:
        self.weight_VD, self.n_tokens = weight_VD, hidden_ND.shape[0]
        self.hidden_grad_ND = torch.zeros_like(hidden_ND) if need_hidden else hidden_ND.new_empty(0)
        self.weight_grad_VD: Tensor | None = None
        self.need_hidden, self.need_weight = need_hidden, need_weight

    def add(self, rows_C: Tensor, hidden_PD: Tensor, grad_PV: Tensor) -> None:
        grad_PV[len(rows_C) :] = 0  # padding
        if self.need_hidden:
            self.hidden_grad_ND[_index(rows_C)] = _times_weight(grad_PV, self.weight_VD)[: len(rows_C)]
        if self.need_weight:
            self._add_weight(grad_PV, hidden_PD)

    def _add_weight(self, grad_PV: Tensor, hidden_PD: Tensor) -> None:
        if self.weight_grad_VD is None:
            self.weight_grad_VD = (grad_PV.T @ hidden_PD).to(_wide(hidden_PD))
        elif self.weight_grad_VD.dtype == grad_PV.dtype:
            self.weight_grad_VD.addmm_(grad_PV.T, hidden_PD)
        else:  # a tile of the vocabulary at a time, so that the whole product never exists in bf16
            tiles = zip(self.weight_grad_VD.split(8192), grad_PV.split(8192, dim=1), strict=True)
            for sum_vD, grad_Pv in tiles:
                sum_vD += grad_Pv.T @ hidden_PD

    def finish(self) -> tuple[Tensor, Tensor]:
        if not self.need_weight or not isinstance(self.weight_VD, Tensor):
            return self.hidden_grad_ND, self.hidden_grad_ND.new_empty(0)
        if self.weight_grad_VD is None:
            return self.hidden_grad_ND, torch.zeros_like(self.weight_VD)
        return self.hidden_grad_ND, self.weight_grad_VD.to(self.weight_VD.dtype)


def _logits(hidden_PD: Tensor, weight_VD: Weight) -> Tensor:
    """Return hidden @ weight.T (P, V), a tile of the vocabulary at a time if the weight is packed."""
    if isinstance(weight_VD, Tensor):
        return hidden_PD @ weight_VD.T
    logits_PV = hidden_PD.new_empty(len(hidden_PD), weight_VD.out_features)
    for words, rows_vD in _unpacked(weight_VD, hidden_PD.dtype):
        logits_PV[:, words] = hidden_PD @ rows_vD.T
    return logits_PV


def _times_weight(grad_PV: Tensor, weight_VD: Weight) -> Tensor:
    """Return grad @ weight (P, D), in the same tiles, which are added in fp32 or wider."""
    if isinstance(weight_VD, Tensor):
        return grad_PV @ weight_VD
    out_PD = grad_PV.new_zeros(len(grad_PV), weight_VD.in_features, dtype=_wide(grad_PV))
    for words, rows_vD in _unpacked(weight_VD, grad_PV.dtype):
        out_PD += grad_PV[:, words] @ rows_vD
    return out_PD.to(grad_PV.dtype)


def _unpacked(head: PackedHead, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight of a packed head as slices of the vocabulary with their rows (v, D)."""
    at_once = max(16, TILE // head.in_features // 16 * 16)
    for start in range(0, head.out_features, at_once):
        words = slice(start, min(start + at_once, head.out_features))
        yield words, head.weight_rows(words.start, words.stop).to(dtype)


def _trained(targets_N: Tensor) -> Tensor:
    """Return the indices of the trained tokens."""
    return (targets_N != IGNORED).nonzero().flatten()


def _index(rows_C: Tensor) -> Tensor | slice:
    """Return the chunk's rows as an index: a slice if they are consecutive, because that copies nothing."""
    first, n = int(rows_C[0]), rows_C.numel()
    return slice(first, first + n) if int(rows_C[-1]) - first == n - 1 else rows_C


def _padded(hidden_CD: Tensor) -> Tensor:
    """Append rows of zeros up to a multiple of `ROWS`.

    In instruct tuning every step has another number of trained tokens, and oneDNN keeps a program of about a
    megabyte for each number that it meets.
    """
    missing = -len(hidden_CD) % ROWS
    return torch.cat((hidden_CD, hidden_CD.new_zeros(missing, hidden_CD.shape[1]))) if missing else hidden_CD


def _chunks(rows: Tensor, weight_VD: Weight) -> tuple[Tensor, ...]:
    """Divide the trained tokens into chunks."""
    return rows.split(_chunk_tokens(weight_VD)) if rows.numel() else ()


def _chunk_tokens(weight_VD: Weight) -> int:
    """Return the tokens of a chunk.

    They have `CHUNK_BYTES` of fp32 logits, but are at least D: there the logits are as large as the weight.
    """
    V, D = (
        weight_VD.shape if isinstance(weight_VD, Tensor) else (weight_VD.out_features, weight_VD.in_features)
    )
    tokens = max(CHUNK_BYTES // (4 * V), D)
    return tokens // 128 * 128 or tokens


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _needs(hidden_ND: Tensor, weight_VD: Weight) -> list[bool]:
    """Return whether each of the two needs a gradient."""
    tensors = (hidden_ND, weight_VD)
    return [torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in tensors]


def _detached(weight_VD: W) -> W:
    return weight_VD.detach() if isinstance(weight_VD, Tensor) else weight_VD  # type: ignore[return-value]


def _autocast(x: W) -> W:
    """Cast like autocast casts a matmul's input, with gradients. A packed head is returned unchanged."""
    if not isinstance(x, Tensor):
        return x
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))  # type: ignore[return-value]
    return x


class _FusedLoss(torch.autograd.Function):
    """A loss whose gradients are formed in forward by ``sums(need_hidden, need_weight)``.

    Backward only scales them.
    """

    @staticmethod
    @torch.compiler.disable
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Weight, sums: Callable[..., tuple[Tensor, ...]], *needs: bool
    ) -> tuple[Tensor, ...]:
        *losses, hidden_grad_ND, weight_grad_VD = sums(*needs)
        ctx.save_for_backward(hidden_grad_ND, weight_grad_VD)
        ctx.needs = needs
        ctx.mark_non_differentiable(*losses[1:])
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * 5
        # In place, to save a second (V, D). Autograd's version check refuses a second backward.
        grads = [
            grad.mul_(grad_total.to(grad.dtype)) if needed else None
            for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
        ]
        return (*grads, None, None, None)
