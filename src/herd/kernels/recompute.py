"""Recompute cheap activations instead of keeping them: a third less memory for under 1 % of the time.

A matmul keeps its input for its weight's gradient. Where that input came from one pass over a tensor that is
kept anyway (RMSNorm of the residual, SwiGLU of gate and up), keeping it too is waste: reading its source
again in backward costs as much as reading it. So `rms_norm` and `swiglu` offer a way to make their result
again, and inside `cheaply()` autograd's saved-tensor hooks keep that instead of the result. Modules stay
unchanged. Other tensors are kept as usual. Idea: arXiv 2205.05198 (selective recomputation), for single
operators.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Place = tuple[int, int, torch.dtype]  # of a tensor's numbers: address, count, dtype


@dataclass
class _Recipe:
    """A way to compute a tensor again, once for all its users in backward, e.g. q, k and v projections."""

    make: Callable[[], Tensor]
    users: int = 0
    waiting: int = 0
    made: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.made is None:
            self.made, self.waiting = self.make(), self.users
        tensor = self.made
        self.waiting -= 1
        if self.waiting <= 0:
            self.made = None
        return tensor


_offers: list[dict[Place, _Recipe]] = []  # innermost `cheaply()` last


def offer(result: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Register how ``result`` can be computed again from tensors that autograd keeps anyway, and return it.

    ``make`` must return the same bits and must not keep a reference to ``result``.
    """
    if _offers and result.requires_grad:
        offers, place = _offers[-1], _place(result)
        offers[place] = _Recipe(make)
        weakref.finalize(result, offers.pop, place, None)  # its memory may soon belong to another tensor
    return result


@contextmanager
def cheaply() -> Iterator[None]:
    """Let autograd keep, until the block ends, the ways to compute offered tensors instead of the tensors."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    offers: dict[Place, _Recipe] = {}

    def pack(tensor: Tensor) -> Tensor | tuple[_Recipe, torch.Size, tuple[int, ...]]:
        recipe = offers.get(_place(tensor)) if offers and type(tensor) is Tensor else None
        if recipe is None:
            return _keep(tensor)
        recipe.users += 1
        return recipe, tensor.shape, tensor.stride()

    def unpack(kept: Tensor | tuple[_Recipe, torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        recipe, shape, stride = kept
        return recipe.tensor().as_strided(shape, stride)

    _offers.append(offers)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _offers.pop()


def _keep(tensor: Tensor) -> Tensor:
    return tensor.detach()  # detached, because an operator that keeps its own result would never be freed


def _place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype
