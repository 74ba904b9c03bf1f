"""Load GGUF files, and write quantized checkpoints: a folder with ``model.gguf`` and ``herd.json``.

The GGUF file contains everything: weights in blocks, the model's shape, the tokenizer. Loading maps the file
and puts the blocks into quantized layers without unpacking. Only q and k are copied, because their rows are
permuted. The lineage has the hash of the whole file, and a file that has changed is refused (`verified.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dtypes import DTYPES, short_name, torch_dtype
from ..errors import CheckpointError, TokenizerError
from ..files import require_free_space
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..quant import blocks
from ..quant.formats import F32, FORMATS, PLAIN, Format, tensor_nbytes
from ..quant.linear import assemble_model, packed_weights
from ..quant.mixtures import file_type
from . import gguf_config
from .chat_format import require_vocabulary_fits
from .gguf import FILE, GGUF, TensorEntry
from .gguf_write import Value, write_gguf
from .journal import Journal, key_of, new_folder
from .lineage import Lineage, licence_notice, load_lineage
from .memory import require_memory
from .names import from_pairs, gguf_name, rotates, to_pairs
from .paths import require_replaceable, write_kept
from .stream import Progress
from .verified import hash_file, verified_hash

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

PIECE_ROWS = 1024
RowsOf = Callable[[str], Iterable[Tensor]]
"""A function that yields a parameter's bytes by its name, in chunks of shape (rows, bytes)."""


@dataclass(frozen=True)
class FileContent:
    """A model to write as a GGUF file, with Herd's names of parameters and order of rows.

    ``name`` and ``licence`` are written into the file. ``rows_of`` is called once per parameter, in order.
    """

    config: ModelConfig
    formats: Mapping[str, Format]
    rows_of: RowsOf
    tokenizer: Tokenizer | None
    name: str
    licence: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the file: its tensors, and an allowance for the vocabulary."""
        shapes = self.config.param_shapes()
        return sum(tensor_nbytes(shape, self.formats[name]) for name, shape in shapes) + 16_000_000


class GGUFSource:
    """A checked GGUF file of a Llama, read one tensor at a time, with Herd's names and order of rows.

    Raises `CheckpointError` if the file is invalid or not a Llama.
    """

    def __init__(self, file: Path | GGUF, pre: str | None = None) -> None:
        self.pre = pre
        self.file = file if isinstance(file, GGUF) else GGUF(file)
        self.config = gguf_config.config_from_gguf(self.file)
        self.wanted: dict[str, TensorEntry] = gguf_config.check_tensors(self.file, self.config)

    @property
    def formats(self) -> dict[str, Format]:
        """The format of every parameter."""
        return {name: entry.format for name, entry in self.wanted.items()}

    @property
    def name(self) -> str:
        """The model's name: what the file says, or the file's own."""
        return self.file.get("general.name", str) or self.file.path.stem

    @property
    def licence(self) -> str | None:
        """The notice of Meta's licence for a shape that Meta has released, else what the file says."""
        return licence_notice(self.config) or self.file.get("general.license", str)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(entry.nbytes for entry in self.wanted.values())

    @property
    def compute_dtype(self) -> torch.dtype:
        """The stored dtype of the matrices, or fp32 if a matrix is quantized or there are several dtypes."""
        names = {entry.format.name for entry in self.wanted.values() if len(entry.shape) > 1}
        return torch_dtype(names.pop()) if len(names) == 1 and names <= PLAIN.keys() else torch.float32

    def rows(self, name: str) -> Tensor:
        """Return a parameter's bytes (R, B).

        Raises `CheckpointError` if weights or scales are not finite.
        """
        entry = self.wanted[name]
        theirs, format = entry.name, entry.format
        if not blocks.all_finite(self.file.rows(theirs), format):
            raise CheckpointError(
                f"{self.file.path}: {theirs} has values that are not finite; fetch it again"
            )
        stored = self.file.rows(theirs)
        if not rotates(name):
            return stored
        # A bias is stored as one row. Its channels are permuted like rows.
        return from_pairs(name, stored.view(entry.shape[0], -1), self.config.head_dim).view(stored.shape)

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a parameter unpacked into ``dtype``, and release its memory pages."""
        entry = self.wanted[name]
        weight = blocks.decode(self.rows(name), entry.format, dtype).view(entry.shape)
        self.file.forget(entry.name)
        return weight

    def key(self, **choices: object) -> str:
        """Return a name for a conversion of this file, for its journal."""
        return key_of([self.file.path], **choices)

    def content(self, name: str) -> FileContent:
        """Return what a copy of this file is written from, under another name."""
        return FileContent(self.config, self.formats, lambda param: [self.rows(param)], self.tokenizer, name)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Return the file's tokenizer if it can be read. Otherwise warn and return None."""
        from .gguf_tokenizer import has_tokenizer, read_tokenizer

        if not has_tokenizer(self.file):
            warnings.warn(f"{self.file.path}: has no tokenizer; the copy will have none", stacklevel=4)
            return None
        try:
            tokenizer = read_tokenizer(self.file, pre=self.pre, compare_merges=True)
        except TokenizerError as error:
            warnings.warn(f"its tokenizer cannot be used here: {error}", stacklevel=4)
            return None
        require_vocabulary_fits(tokenizer, self.config.vocab_size, self.file.path)
        return tokenizer


def load_gguf(file: GGUF, *, dtype: torch.dtype | None, device: str | torch.device) -> LlamaLM:
    """Return the model in a GGUF file, on the CPU with its blocks mapped from the file.

    ``dtype`` is the compute dtype (default: fp32, or the stored dtype if nothing is quantized).
    """
    source = GGUFSource(file)
    if torch.device(device).type == "cpu":
        require_memory(source.config, source.nbytes, file.path)
    _require_hash(file.path)
    slow = sorted({f.name for f in source.formats.values() if f.name not in FORMATS and f.name not in PLAIN})
    if slow:
        warnings.warn(
            f"{source.file.path}: {', '.join(slow)} runs slowly here; import it with --dtype bf16",
            stacklevel=4,
        )
    before: list[str] = []

    def rows_of(name: str) -> Tensor:
        # The previous tensor is repacked or unpacked by now. If it is needed again, it is read again.
        if before:
            source.file.forget(before.pop())
        before.append(source.wanted[name].name)
        return source.rows(name)

    return assemble_model(source.config, source.formats, rows_of, dtype or source.compute_dtype, device)


def _require_hash(file: Path) -> None:
    """Raise `CheckpointError` if the file's hash differs from ``herd.json``.

    Without that file, do nothing.
    """
    lineage = load_lineage(file)
    if lineage is None or lineage.weights_hash is None:
        return
    if verified_hash(file, hash_file) != lineage.weights_hash:
        raise CheckpointError(
            f"{file}: is not the file that herd.json describes: damaged or replaced; "
            "restore it, or import it again"
        )


def write_model(
    path: Path, model: FileContent, progress: Progress | None = None, journal: Journal | None = None
) -> None:
    """Write a model as one GGUF file, or continue at the position in ``journal`` (see `write_gguf`)."""
    config, factors = model.config, gguf_config.rope_factors(model.config)
    ours = {gguf_name(name): name for name, _ in config.param_shapes()}
    plan = {gguf_name(name): (shape, model.formats[name]) for name, shape in config.param_shapes()}
    if factors is not None:
        plan = {gguf_config.ROPE_FREQS: (tuple(factors.shape), F32)} | plan

    def pieces_of(theirs: str) -> Iterable[Tensor]:
        if factors is not None and theirs == gguf_config.ROPE_FREQS:
            return [factors.view(torch.uint8)]
        param = ours[theirs]
        if rotates(param):
            rows = torch.cat(list(model.rows_of(param))).view(plan[theirs][0][0], -1)
            return [to_pairs(param, rows, config.head_dim)]
        return model.rows_of(param)

    write_gguf(path, list(_metadata(model)), plan, pieces_of, progress, journal)


def encoded(
    weight: Tensor, format: Format, name: str, importance_D: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield a weight's bytes in this format, some rows at a time. Columns are weighted by ``importance_D``.

    Raises `QuantError` if a value is not finite or beyond the format's range.
    """
    for piece in weight.view(1, -1).split(1) if weight.ndim == 1 else weight.split(PIECE_ROWS):
        yield blocks.encode(piece, format, name, importance_D)


def _metadata(model: FileContent) -> Iterator[Value]:
    from .gguf_tokenizer import tokenizer_metadata

    yield "general.type", "STRING", "model"
    yield "general.name", "STRING", model.name
    yield "general.quantization_version", "UINT32", 2
    yield "general.file_type", "UINT32", file_type(model.config, model.formats)
    if model.licence:
        yield "general.license", "STRING", model.licence
    yield from gguf_config.model_metadata(model.config)
    if model.tokenizer is None:
        yield "tokenizer.ggml.model", "STRING", "none"
    else:
        yield from tokenizer_metadata(model.tokenizer, model.config.vocab_size)


def write_gguf_folder(
    out: Path,
    model: FileContent,
    lineage_of: Callable[[], Lineage | None],
    *,
    progress: Progress | None = None,
    key: str | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    remember: Callable[[dict[str, str]], None] | None = None,
) -> str:
    """Write a quantized folder and return its hash.

    With a ``key`` the work is resumable, and ``remember`` is called with the digests of the source that an
    earlier run has computed. ``lineage_of`` is called after all weights have been read. ``extra_files`` are
    written next to the file (a licence, sampling settings).
    """
    if model.tokenizer is not None:
        require_vocabulary_fits(model.tokenizer, model.config.vocab_size, out)
    require_replaceable(out)
    require_free_space(out, model.nbytes)
    with new_folder(out, key) as (temporary, journal):
        if journal and remember:
            remember(journal.part("source"))
        write_model(temporary / FILE, model, progress, journal)
        lineage, weights_hash = lineage_of(), hash_file(temporary / FILE)
        if lineage is not None:
            lineage.model_copy(update={"weights_hash": weights_hash}).write(temporary)
        write_kept(temporary, extra_files or {})
    return weights_hash


def save_quantized(
    folder: Path, model: LlamaLM, tokenizer: Tokenizer | None = None, *, lineage: Lineage | None = None
) -> str:
    """Write a quantized model from memory as a folder, with its blocks unchanged, and return the hash."""
    packed = {name: (format, rows) for name, format, rows in packed_weights(model)}
    formats: dict[str, Format] = {}
    for name, shape in model.config.param_shapes():
        if name in packed:
            formats[name] = packed[name][0]
        else:
            stored = DTYPES[short_name(model.get_parameter(name).dtype)].safetensors
            formats[name] = F32 if len(shape) == 1 else PLAIN[stored]

    def rows_of(name: str) -> Iterable[Tensor]:
        if name in packed:
            return [packed[name][1].cpu()]
        return encoded(model.get_parameter(name).detach().cpu(), formats[name], name)

    called = lineage.name if lineage else folder.name
    content = FileContent(model.config, formats, rows_of, tokenizer, called)
    return write_gguf_folder(folder, content, lambda: lineage)
