"""Linear + cross-entropy and linear + KL over the vocabulary, without the (tokens x vocab) matrix.

The head's logits of N tokens over V words are N·V numbers: at V = 128,256 and fp32, 513 KB a token. Here they live one
chunk of tokens at a time; each chunk's gradient is formed while its logits are at hand, so backward only scales.
Idea: Liger Kernel (arXiv 2410.10989) and Cut Cross-Entropy (arXiv 2411.09009).

Shapes: N tokens, D model dim, V vocab.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target]; targets of -100 do not count. fp32 scalar."""
    return F.cross_entropy((hidden_ND @ weight_VD.T).float(), targets_N, reduction="sum", ignore_index=-100)


def linear_kl(
    student_ND: Tensor, student_weight_VD: Tensor, teacher_NE: Tensor, teacher_weight_VE: Tensor, mask_N: Tensor
) -> Tensor:
    """Sum over tokens where ``mask_N`` of KL(teacher || student) in nats; no gradient to the teacher. fp32 scalar."""
    with torch.no_grad():
        teacher = F.log_softmax((teacher_NE @ teacher_weight_VE.T).float(), dim=-1)
    student = F.log_softmax((student_ND @ student_weight_VD.T).float(), dim=-1)
    return ((teacher.exp() * (teacher - student)).sum(-1) * mask_N).sum()
