"""The tensors of a state on disk: PyTorch's distributed checkpoint (DCP) over raw files with checksums.

DCP assigns parts of tensors to ranks for writing, and rearranges them for another number of ranks when they
are read. Its own file format wraps every part in a zip archive, which costs 0.4 ms each, and does not notice
a flipped bit. Here each rank writes its parts one after another into one file, and the index keeps a CRC-32
of each, which is checked when the part is read.

The index (``.metadata``) is a pickle, as in DCP itself: states are trusted local files.
"""

from __future__ import annotations

import os
import pickle
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..errors import TrainingError

INDEX = ".metadata"


@dataclass(frozen=True)
class TensorChunk:
    """One part of one tensor: its position in a file, checksum, dtype and shape."""

    file: str
    offset: int
    nbytes: int
    crc: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class RawFiles(StorageWriter, StorageReader):
    """DCP's storage in ``folder``: a file ``rank-N.bin`` per rank, and the index of the first rank.

    Reading raises `TrainingError` for a part that is short or whose checksum is wrong.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.chunks: dict[Any, TensorChunk] = {}

    # What DCP asks of every storage, and this one does not need.

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Do nothing: no state is kept from one save or load to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder exists."""

    def prepare_local_plan(self, plan: Any) -> Any:
        """Return the plan unchanged."""
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Accept folders only."""
        return Path(checkpoint_id).is_dir()

    # Writing

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """Give each rank its file. A plan for reading does not use it."""
        return [replace(plan, storage_data=f"rank-{rank}.bin") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts with their checksums, and flush the file to the disk."""
        results, offset = [], 0
        with (self.folder / plan.storage_data).open("wb") as file:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                if not isinstance(tensor, Tensor):
                    raise TrainingError(f"{item.index.fqn} is not a tensor; a state holds tensors only")
                tensor = tensor.detach().cpu().contiguous()
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                crc, shape = zlib.crc32(data), tuple(tensor.shape)
                chunk = TensorChunk(plan.storage_data, offset, len(data), crc, tensor.dtype, shape)
                file.write(data)
                offset += chunk.nbytes
                results.append(WriteResult(item.index, chunk.nbytes, chunk))
            file.flush()
            os.fsync(file.fileno())
        return _finished(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index of all ranks' parts."""
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        (self.folder / INDEX).write_bytes(pickle.dumps(metadata))

    # Reading

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        return pickle.loads((self.folder / INDEX).read_bytes())

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Store the positions of the parts."""
        self.chunks = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Check each part, and copy the requested region of it into its tensor."""
        for item in plan.items:
            stored = self._read(self.chunks[item.storage_index], item.storage_index.fqn)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                stored = stored.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(stored)
            planner.commit_tensor(item, target)
        return _finished(None)

    def _read(self, chunk: TensorChunk, name: str) -> Tensor:
        with (self.folder / chunk.file).open("rb") as file:
            file.seek(chunk.offset)
            data = bytearray(file.read(chunk.nbytes))
        if len(data) != chunk.nbytes:
            raise TrainingError(f"{chunk.file} ends inside {name}")
        if zlib.crc32(data) != chunk.crc:
            raise TrainingError(f"{name} in {chunk.file} does not match its checksum")
        flat = torch.frombuffer(data, dtype=chunk.dtype) if data else torch.empty(0, dtype=chunk.dtype)
        return flat.reshape(chunk.shape)


def _finished(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future
