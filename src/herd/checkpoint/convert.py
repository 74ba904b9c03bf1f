"""Import folders in Hugging Face's layout, and export checkpoints for programs that read it.

Both directions rewrite a folder tensor by tensor, with one dtype, one shard size, the standard set of tensors
and one dialect of `config.json`. So they need only the memory of the largest tensor. Files that are not
derived from the model are copied byte for byte: the release's own tokenizer files, generation settings,
licence. Nothing is downloaded or executed.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CheckpointError, TokenizerError
from . import weights
from .adapter_config import refuse_adapter, warn_of_adapter_beside_model
from .chat_format import read_folder_tokenizer
from .folder import checkpoint_hash, write_checkpoint
from .gguf import gguf_file
from .gguf_folder import GGUFSource
from .hf import read_object
from .journal import key_of
from .lineage import Lineage, licence_notice, load_lineage
from .model_source import load_config, load_tokenizer
from .paths import CONFIG, KEPT_FILES, SIDE_FILES, read_kept
from .sources import model_name, resolve_model
from .stream import Progress

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


class ImportSource:
    """A folder of unquantized weights, read one tensor at a time.

    Every tensor is hashed when it is first read. ``hash`` equals the folder's `checkpoint_hash`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = resolve_model(folder)
        if gguf_file(self.folder):
            raise CheckpointError(f"{folder} is quantized already; give the folder it was made from")
        refuse_adapter(self.folder, "this")
        self.config = load_config(self.folder)
        self.wanted = weights.check_against(self.config, weights.read_index(self.folder), self.folder)
        self.lineage = load_lineage(self.folder)
        self.name = self.lineage.name if self.lineage else model_name(self.folder)
        self._digests: dict[str, str] = {}

    def get(self, name: str) -> Tensor:
        """Return the tensor as stored, mapped from its file. Its memory pages are released with it."""
        info = self.wanted[name]
        tensor = weights.read_tensor(info)
        if name not in self._digests:
            self._digests[name] = weights.tensor_digest(
                name, info.dtype, info.shape, weights.raw_bytes(tensor)
            )
        return tensor

    def key(self, **choices: object) -> str:
        """Return a name for a conversion of this folder, for its journal."""
        return key_of(sorted({info.file for info in self.wanted.values()}), **choices)

    def remember(self, digests: dict[str, str]) -> None:
        """Store the digests in a part of a journal. It may have the digests of an earlier run already."""
        self._digests = digests

    @property
    def hash(self) -> str:
        """The hash of all weights, as by `checkpoint_hash`. Reads the tensors that have not been read yet."""
        for name in self.wanted:
            if name not in self._digests:
                self.get(name)
        return weights.combine_digests(self._digests)

    def tokenizer(self) -> Tokenizer | None:
        """Return the folder's tokenizer. Returns None, with a warning, if there is none."""
        return load_tokenizer(self.folder)


class UnpackedSource(ImportSource):
    """A GGUF file whose weights are unpacked one tensor at a time, to quantize them in another format."""

    def __init__(self, file: Path) -> None:
        self.folder, self.lineage = file, load_lineage(file)
        self._gguf = GGUFSource(file)
        self.config, self.wanted = self._gguf.config, self._gguf.wanted  # type: ignore[assignment]
        self.name = self.lineage.name if self.lineage else model_name(file)
        self._digests = {}
        packed = sorted({format.name for format in self._gguf.formats.values() if format.packed})
        if packed:
            warnings.warn(
                f"{file}: is quantized already ({', '.join(packed)}), and rounding twice loses more than "
                "once; take the original if you have it",
                stacklevel=3,
            )

    def get(self, name: str) -> Tensor:
        """Return the tensor, unpacked."""
        return self._gguf.weight(name, self._gguf.compute_dtype)

    def key(self, **choices: object) -> str:
        """Return a name for a conversion of this file, for its journal."""
        return self._gguf.key(**choices)

    @property
    def hash(self) -> str:
        """The hash of the file, as by `checkpoint_hash`."""
        return checkpoint_hash(self.folder)


def open_source(model: str | Path) -> ImportSource:
    """Return a source of the weights of a folder or a GGUF file, to be read one tensor at a time."""
    file = gguf_file(resolve_model(model))
    return UnpackedSource(file) if file else ImportSource(model)


def import_hf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Rewrite a Llama in Hugging Face's layout (a folder, or ``hf:ORG/NAME``) as a checkpoint folder.

    ``dtype`` and ``name`` default to the source's. Returns the hash of the weights. Raises
    `CheckpointError`, with ``out`` unchanged, if the model cannot be run or a weight is not finite.
    """
    folder = resolve_model(source)
    return _rewrite(folder, Path(out), dtype, name or model_name(folder), progress, importing=True)


def export_hf(
    folder: str | Path, out: str | Path, *, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> str:
    """Copy a checkpoint folder for another program.

    A quantized folder is unpacked, into bf16 if ``dtype`` is None. Returns the hash of the written weights.
    Raises `CheckpointError`, with ``out`` unchanged, if the folder cannot be read.
    """
    source = resolve_model(folder)
    file = gguf_file(source)
    if file is None:
        name = model_name(source)
        return _rewrite(source, Path(out), dtype, name, progress, importing=False)
    packed, known, chosen = GGUFSource(file), load_lineage(source), dtype or torch.bfloat16
    lineage = Lineage(name=model_name(source), stage="imported", licence=packed.licence)
    return write_checkpoint(
        out,
        packed.config,
        lambda name: packed.weight(name, chosen),
        packed.tokenizer,
        dtype=chosen,
        lineage=known.child() if known else lineage,
        extra_files=read_kept(source, SIDE_FILES),
        progress=progress,
        key=packed.key(do="unpack", dtype=chosen),
    )


def _rewrite(
    folder: Path,
    out: Path,
    dtype: torch.dtype | None,
    name: str,
    progress: Progress | None,
    *,
    importing: bool,
) -> str:
    source, theirs = ImportSource(folder), read_object(folder / CONFIG)
    dtype = weights.common_dtype(source.wanted, folder) if dtype is None else dtype
    warn_of_adapter_beside_model(folder)
    licence = licence_notice(source.config) if importing else None
    kept = read_kept(folder, KEPT_FILES, licence)

    def get(tensor_name: str) -> Tensor:
        tensor = weights.read_tensor(source.wanted[tensor_name])
        weights.require_finite(tensor_name, tensor, folder)
        return tensor

    lineage = source.lineage or Lineage(name=name, stage="imported", licence=licence)
    if source.lineage and any(weights.STORABLE[info.dtype] != dtype for info in source.wanted.values()):
        lineage = source.lineage.child()  # rounded weights descend from the exact ones
    return write_checkpoint(
        out,
        source.config,
        get,
        usable_tokenizer(folder),
        dtype=dtype,
        lineage=lineage,
        extra_files=kept,
        progress=progress,
        key=source.key(do="rewrite", dtype=dtype, config=source.config, kept=sorted(kept.items())),
        config_json={key: theirs.get(key) for key in ("bos_token_id", "eos_token_id")},
    )


def usable_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the folder's tokenizer if it can be read. Otherwise warn and return None."""
    try:
        return read_folder_tokenizer(folder)
    except TokenizerError as error:
        warnings.warn(f"{folder}: tokenizer files are copied, but cannot be used here: {error}", stacklevel=4)
        return None
