"""The optimizer's state as the loop sees it, the gradient's norm, and the mean of the decay's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments(params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return Adam's moments by name, ``exp_avg/NAME`` and ``exp_avg_sq/NAME``: the tensors themselves."""
    return {
        f"{key}/{name}": optimizer.state[param][key]
        for name, param in params.items()
        for key in ("exp_avg", "exp_avg_sq")
    }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the number of updates that Adam's moments have seen (for bias correction)."""
    for state in optimizer.state.values():
        state["step"].fill_(float(updates))


def gradient_norm(grads: Iterable[Tensor]) -> float:
    """Return the 2-norm of all gradients together (a collective if they are DTensors)."""
    norm = torch.nn.utils.get_total_norm(list(grads), 2.0)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class Average:
    """The running mean of weights sampled during the decay (Polyak; Llama 3 section 3.4.3), in fp32.

    ``mean`` is the mean of ``count`` samples by parameter name, and empty before the first.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Add a sample: mean += (weights - mean) / count."""
        self.count += 1
        if self.count == 1:
            self.mean = {name: weight.detach().clone() for name, weight in weights.items()}
            return
        means = list(self.mean.values())
        torch._foreach_lerp_(means, [weights[name].detach() for name in self.mean], 1 / self.count)

    def empty_like(self, weights: Mapping[str, Tensor], count: int) -> None:
        """Allocate the mean of ``count`` samples, to be loaded from disk."""
        self.count = count
        self.mean = {name: torch.empty_like(weight) for name, weight in weights.items()} if count else {}

    @torch.no_grad()
    def copy_to(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the mean into ``weights``."""
        for name, mean in self.mean.items():
            weights[name].copy_(mean)
