"""A quantized checkpoint: ``model.gguf`` and ``herd.json`` in a folder. Load it, import into it, export from it.

What is in the GGUF file is everything there is: weights in blocks, the model's shape, the tokenizer. `load` maps the
file and puts the blocks, as they lie there, into packed layers: nothing is unpacked, and only q and k are copied (their
rows stand in another order). The lineage's hash is that of the whole file; a file that has changed is refused
(`verified.py`).

`gguf_convert.py` makes such folders and files of others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..quant import blocks
from ..quant.formats import BF16, F16, F32, FORMATS, PLAIN, Format
from ..quant.linear import assemble_model
from . import gguf_names as names
from .gguf import FILE, GGUF, TensorEntry
from .gguf_write import Plan, Value, hash_file, write_gguf
from .journal import Journal
from .lineage import load_lineage
from .memory import require_memory
from .verified import verified_hash
from .weights import Progress

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 14, "Q6_K": 18, "BF16": 32}
"""llama.cpp's number for "mostly this format"; 1024: see the tensors."""
PIECE_ROWS = 1024


def is_gguf_folder(folder: Path) -> bool:
    """Whether a folder's weights are in ``model.gguf``. `CheckpointError` if it has plain weights as well."""
    if not (folder / FILE).exists():
        return False
    others = [*folder.glob("*.safetensors"), *folder.glob("config.json")]
    if others:
        raise CheckpointError(f"{folder}: has both {FILE} and {others[0].name}; delete the stale one")
    return True


def load_gguf(folder: Path, *, dtype: torch.dtype | None, device: str | torch.device) -> LlamaLM:
    """The model of a quantized folder, its blocks lying in the mapped file (on the CPU). ``dtype`` is what it computes
    in: fp32 by default, or the stored one where nothing is packed. Raises `CheckpointError`."""
    file = GGUF(folder / FILE)
    config = names.config_from_gguf(file)
    wanted = names.check_tensors(file, config)
    if torch.device(device).type == "cpu":
        require_memory(config, sum(entry.nbytes for entry in wanted.values()), folder)
    require_hash(folder)
    return load_model(file, config, wanted, dtype or compute_dtype(wanted), device)


def load_model(
    file: GGUF,
    config: ModelConfig,
    wanted: Mapping[str, TensorEntry],
    dtype: torch.dtype,
    device: str | torch.device,
) -> LlamaLM:
    """The model of a checked file, each weight as it is stored."""
    slow = sorted({e.format.name for e in wanted.values() if _runs_slowly(e.format)})
    if slow:
        warnings.warn(
            f"{file.path}: {', '.join(slow)} runs slowly here; import it with --dtype bf16", stacklevel=4
        )
    done: list[str] = []

    def rows_of(name: str) -> Tensor:
        # the tensor before has been repacked or unpacked by now; what still lies in the file is read again when needed
        if done:
            file.forget(done.pop())
        entry = wanted[name]
        require_finite(file, entry)
        done.append(entry.name)
        return names.from_pairs(name, file.rows(entry.name), config)

    return assemble_model(
        config, {name: entry.format for name, entry in wanted.items()}, rows_of, dtype, device
    )


def require_hash(folder: Path) -> None:
    """`CheckpointError` when the file is not the one ``herd.json`` speaks of. A folder without it is believed."""
    lineage = load_lineage(folder)
    if lineage is None or lineage.weights_hash is None:
        return
    if verified_hash(folder / FILE, hash_file) != lineage.weights_hash:
        raise CheckpointError(
            f"{folder / FILE}: is not the file herd.json speaks of: damaged or replaced; restore it, or import it anew"
        )


def require_finite(file: GGUF, entry: TensorEntry) -> None:
    """`CheckpointError` when a weight, or a block's scale, is not finite."""
    if not blocks.all_finite(file.rows(entry.name), entry.format):
        raise CheckpointError(
            f"{file.path}: {entry.name} has values that are not finite; the checkpoint is damaged"
        )


def compute_dtype(wanted: Mapping[str, TensorEntry]) -> torch.dtype:
    """fp32 where anything is packed, otherwise the stored type of the matrices (the widest of several)."""
    formats = {entry.format for entry in wanted.values() if len(entry.shape) > 1}
    return _DTYPES[formats.pop()] if len(formats) == 1 and formats <= set(_DTYPES) else torch.float32


def unpacked(
    file: GGUF, config: ModelConfig, wanted: Mapping[str, TensorEntry], dtype: torch.dtype
) -> Callable[[str], Tensor]:
    """get(name): a parameter unpacked into ``dtype``, in our order; its pages are let go afterwards."""

    def get(name: str) -> Tensor:
        entry = wanted[name]
        require_finite(file, entry)
        rows = names.from_pairs(name, file.rows(entry.name), config)
        weight = blocks.decode(rows, entry.format, dtype).view(entry.shape)
        file.forget(entry.name)
        return weight

    return get


def file_plan(config: ModelConfig, formats: Mapping[str, Format]) -> tuple[Plan, dict[str, str]]:
    """The tensors of a file in order, and our name of each."""
    plan: dict[str, tuple[tuple[int, ...], Format]] = {}
    ours: dict[str, str] = {}
    if config.rope_scaling is not None:
        plan[names.ROPE_FREQS] = ((config.head_dim // 2,), F32)
    for name, shape in config.param_shapes():
        theirs = names.gguf_name(name)
        plan[theirs], ours[theirs] = (shape, formats[name]), name
    return plan, ours


def write_model(
    path: Path,
    config: ModelConfig,
    formats: Mapping[str, Format],
    rows_of: Callable[[str], Iterable[Tensor]],
    tokenizer: Tokenizer | None,
    *,
    name: str,
    licence: str | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> None:
    """Writes a whole model as one GGUF file, or goes on with it where ``journal`` says (see `write_gguf`).

    ``formats`` are by our names; ``rows_of(name)`` gives a parameter's bytes (rows, B) in our order, in pieces.
    """
    plan, ours = file_plan(config, formats)
    factors = names.rope_factors(config)

    def get(theirs: str) -> Iterable[Tensor]:
        if factors is not None and theirs == names.ROPE_FREQS:
            return [factors.view(torch.uint8)]
        return _in_pairs(ours[theirs], rows_of(ours[theirs]), config)

    write_gguf(path, list(_metadata(config, formats, tokenizer, name, licence)), plan, get, progress, journal)


def _in_pairs(name: str, pieces: Iterable[Tensor], config: ModelConfig) -> Iterator[Tensor]:
    if names.rotates(name):
        yield names.to_pairs(name, torch.cat(list(pieces)), config)
    else:
        yield from pieces


def encoded(weight: Tensor, format: Format, name: str) -> Iterator[Tensor]:
    """A weight's bytes in pieces of some rows. QuantError for values that are not finite or beyond the format."""
    for piece in weight.view(1, -1).split(1) if weight.ndim == 1 else weight.split(PIECE_ROWS):
        yield blocks.encode(piece, format, name)


def _metadata(
    config: ModelConfig,
    formats: Mapping[str, Format],
    tokenizer: Tokenizer | None,
    name: str,
    licence: str | None,
) -> Iterator[Value]:
    from .gguf_tokenizer import tokenizer_metadata

    yield "general.architecture", "s", "llama"
    yield "general.type", "s", "model"
    yield "general.name", "s", name
    yield "general.quantization_version", "I", 2
    yield "general.file_type", "I", _FILE_TYPES.get(formats["model.layers.0.mlp.up_proj.weight"].name, 1024)
    if licence:
        yield "general.license", "s", licence
    yield from names.model_metadata(config)
    if tokenizer is None:
        yield "tokenizer.ggml.model", "s", "none"
    else:
        yield from tokenizer_metadata(tokenizer, config.vocab_size)


def _runs_slowly(format: Format) -> bool:
    return format.name not in FORMATS and format.name not in PLAIN
