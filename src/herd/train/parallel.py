"""The ranks of a run: the same loop in one process or in many under ``torchrun``.

Parallelism stays outside the model. One device mesh of two dimensions, ("replicate", "shard"), describes both
kinds of data parallelism: PyTorch's FSDP2 divides every layer over the second and all-reduces its gradients
over the first. So (n, 1) is DDP, (1, n) is FSDP and (n, m) is HSDP, in one code path whose reductions have a
fixed order. (DDP's own reducer changes its buckets after the first step, so a resumed run would add in
another order than an uninterrupted one.)

FSDP2 keeps the root unit (embedding, last norm and head) gathered between forward and backward, so that the
loss can use the head.
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
from torch.utils.checkpoint import checkpoint

from ..errors import TrainingError
from ..llama.model import LlamaLM


@dataclass(frozen=True)
class Ranks:
    """This process among all: ``rank`` of ``world``. ``mesh`` is None in a single process."""

    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a vector over all ranks, in place, and return it."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def smallest(self, value: int) -> int:
        """Return the smallest of all ranks' values."""
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
    """Return this process's own accelerator, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start(shard: int = 1) -> Ranks:
    """Join the other processes that ``torchrun`` started, if there are any.

    Weights are divided over ``shard`` ranks: 1 is DDP, all of them FSDP.
    Raises `TrainingError` when the number of ranks is not a multiple of ``shard``.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % shard:
        raise TrainingError(
            f"{world} ranks cannot be divided into shards of {shard}: start another number of processes"
        )
    if world == 1:
        return Ranks()
    device = device_of_rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dimensions = ("replicate", "shard")
    return ranks_of(init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=dimensions))


def ranks_of(mesh: DeviceMesh) -> Ranks:
    """Return the ranks of a mesh made by `start`, or of another one with the same two dimensions."""
    if mesh.mesh_dim_names != ("replicate", "shard"):
        raise TrainingError(f"mesh dimensions {mesh.mesh_dim_names}: training needs ('replicate', 'shard')")
    return Ranks(dist.get_rank(), mesh.size(), mesh)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def distribute(model: LlamaLM, ranks: Ranks, dtype: torch.dtype = torch.float32) -> LlamaLM:
    """Divide the model over the mesh in place: each layer is a unit, and the rest is another.

    Parameters are gathered and used in ``dtype``. Gradients are reduced in fp32. Weights must be equal on all
    ranks. Does nothing in a single process or when it was done before.
    """
    if ranks.mesh is None or isinstance(model, FSDPModule):
        return model
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=ranks.mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "logits")
    return model


def postpone_reduction(model: nn.Module, last: bool) -> None:
    """All-reduce gradients between replicas only with the last micro-batch of a step.

    Shards reduce-scatter with each micro-batch. Otherwise every rank would store a full gradient.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


@contextmanager
def prepared(model: LlamaLM, *, activation_checkpointing: bool, compiled: bool) -> Iterator[None]:
    """Recompute layers in backward and compile them, as asked, until the block ends.

    Activation checkpointing keeps one residual (rows x context x dim) per layer instead of some 20 of that
    size, for a third more FLOPs (arXiv 1604.06174).
    """
    layers: list[nn.Module] = list(model.model.layers)
    try:
        for layer in layers:
            if activation_checkpointing:
                layer.forward = partial(
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )
            if compiled:
                layer.compile()
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
            layer._compiled_call_impl = None
