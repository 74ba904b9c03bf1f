"""Write a GGUF file, with its tensors in chunks of a few rows.

The gguf package's `GGUFWriter` encodes the header (metadata and the table of tensors). Its methods for tensor
data take whole arrays, so `stream.write_tensors` writes the data: it writes an embedding of 128,256 rows in
chunks and can continue an interrupted file. Whoever calls `write_gguf` makes the file appear only when
complete (`files.whole_folder`, `journal.resumable_file`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import require_free_space, whole_file
from ..quant.formats import F32, Format
from .gguf import DEFAULT_ALIGNMENT
from .journal import Journal
from .stream import Progress, advance_of, write_tensors

Value = tuple[str, str, Any]
"""(key, type, value). Types have GGUF's names: "UINT32", "STRING", or "[STRING" for an array of texts."""
Plan = Mapping[str, tuple[tuple[int, ...], Format]]
"""Shape (rows first) and format of each tensor, by its name in the file and in file order."""


def write_gguf(
    path: Path,
    metadata: Iterable[Value],
    plan: Plan,
    pieces_of: Callable[[str], Iterable[Tensor]],
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> None:
    """Write a GGUF file.

    ``pieces_of(name)`` yields a tensor's bytes (uint8) and is called once per tensor.

    Tensors that ``journal`` counts as done are kept, unless the header has changed since. Raises
    `CheckpointError` if the chunks have a wrong total size. Errors of ``pieces_of`` and of the disk
    propagate.
    """
    sizes = {
        name: math.prod(shape) // format.block * format.block_bytes for name, (shape, format) in plan.items()
    }
    header = _header(path.with_name("header.tmp"), list(metadata), plan, sizes)
    if journal and journal.done and not _begins_with(path, header):  # for example another tokenizer
        journal.restart()
    write_tensors(
        path,
        header,
        sizes,
        pieces_of,
        advance_of(progress, sum(sizes.values())),
        n_written=journal.done if journal else 0,
        alignment=DEFAULT_ALIGNMENT,
        journal=journal,
    )


def write_fp32_gguf(file: Path, metadata: Iterable[Value], tensors: Mapping[str, Tensor]) -> None:
    """Write a GGUF file of fp32 tensors. It appears when it is complete. Raises `StorageError`."""
    plan = {name: (tuple(tensor.shape), F32) for name, tensor in tensors.items()}
    require_free_space(file, sum(tensor.nbytes for tensor in tensors.values()) + 1_000_000)
    with whole_file(file) as temporary:
        write_gguf(temporary, metadata, plan, lambda name: [tensors[name].view(torch.uint8)])


def _header(scratch: Path, metadata: Sequence[Value], plan: Plan, sizes: Mapping[str, int]) -> bytes:
    """Return the bytes before the tensors. `GGUFWriter` writes them to a temporary file."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer = GGUFWriter(scratch, "llama")  # this adds general.architecture
    for key, kind, value in metadata:
        type_ = GGUFValueType[kind.removeprefix("[")]
        of_array = (GGUFValueType.ARRAY, type_) if kind.startswith("[") else (type_, None)
        writer.add_key_value(key, value, *of_array)
    for name, (shape, format) in plan.items():
        stored = GGMLQuantizationType(format.code)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return scratch.read_bytes()
    finally:
        scratch.unlink(missing_ok=True)


def _begins_with(path: Path, header: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header
    except OSError:
        return False
