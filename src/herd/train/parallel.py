"""Ranks: the same loop in one process or in many under ``torchrun``; parallelism stays outside the model.

One device mesh of two dimensions, ("replicate", "shard"), holds both data parallelisms: PyTorch's FSDP2 shards every
block over the second and all-reduces its gradients over the first. So (n, 1) is DDP, (1, n) is FSDP and (n, m) is HSDP,
in one code path whose reductions have a fixed order: DDP's own reducer lays out its buckets anew after the first step,
and a resumed run would then add in another order than an uninterrupted one.

FSDP2 keeps the root unit (embedding, last norm and head) gathered between forward and backward, so that the loss can
use the head.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ..errors import TrainingError
from ..llama.model import LlamaLM


@dataclass(frozen=True)
class Ranks:
    """Who this process is among all: ``rank`` of ``world``; ``mesh`` is None in a single process."""

    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The same vector summed over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""
        if self.mesh is None:
            return value
        tensor = torch.tensor(value, device=self.mesh.device_type)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh is not None:
            dist.barrier()


def device_of_rank() -> torch.device:
    """This process's own accelerator when there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start(shard: int | None = 1) -> Ranks:
    """Join the other processes that ``torchrun`` started; alone, and at no cost, when there are none.

    ``shard``: over how many ranks weights are split; 1 is DDP, None is all of them (FSDP).
    Raises `TrainingError` when the number of ranks is not a multiple of ``shard``.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shard = world if shard is None else shard
    if shard < 1 or world % shard:
        raise TrainingError(
            f"{world} ranks cannot be cut into shards of {shard}: start another number of processes"
        )
    if world == 1:
        return Ranks()
    device = device_of_rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return ranks_of(
        init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=("replicate", "shard"))
    )


def ranks_of(mesh: DeviceMesh | None) -> Ranks:
    """The ranks of a mesh made by `start`, or of one's own with the same two dimensions."""
    if mesh is None:
        return Ranks()
    if mesh.mesh_dim_names != ("replicate", "shard"):
        raise TrainingError(
            f"mesh dimensions are {mesh.mesh_dim_names}; training needs ('replicate', 'shard')"
        )
    return Ranks(dist.get_rank(), mesh.size(), mesh)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def distribute(model: LlamaLM, ranks: Ranks, dtype: torch.dtype = torch.float32) -> LlamaLM:
    """Spread the model over the mesh, in place: each block a unit, embedding, last norm and head another.

    ``dtype`` is what parameters are gathered and computed in; gradients are reduced in fp32. Weights must be equal on
    all ranks. Does nothing in a single process or when it was done before.
    """
    if ranks.mesh is None or isinstance(model, FSDPModule):
        return model
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype != torch.float32
        else None
    )
    shard = partial(fully_shard, mesh=ranks.mesh, mp_policy=policy or MixedPrecisionPolicy())
    for block in model.model.layers:
        shard(block)
    shard(model)
    register_fsdp_forward_method(model, "logits")
    return model


def postpone_reduction(model: nn.Module, last: bool) -> None:
    """Replicas need each other's gradients once a step: all-reduce only with the last micro-batch. Shards
    reduce-scatter with each, or every rank would hold a full gradient."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights whole and on the CPU, on every rank (a collective when they are spread)."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in model.state_dict().items()
    }


@contextmanager
def prepared(model: LlamaLM, *, activation_checkpointing: bool, compiled: bool) -> Iterator[None]:
    """Blocks recomputed in backward and / or compiled, while the block lasts; parameter names stay what they are.

    Recomputation keeps one residual (rows x context x dim) a block instead of some 20 of them, for a third more FLOPs
    (arXiv 1604.06174).
    """
    blocks: list[nn.Module] = list(model.model.layers)
    try:
        for block in blocks:
            if activation_checkpointing:
                block.forward = partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
            if compiled:
                block.compile()
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
            block._compiled_call_impl = None
