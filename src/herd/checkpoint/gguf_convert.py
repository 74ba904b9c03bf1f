"""To GGUF and from it: quantize a folder, import a file, export one for other programs.

Everything streams. Plain weights are read one tensor at a time, each file opened anew so that its pages do not stay;
they are encoded some rows at a time and written as they come. An 8B model in bf16 becomes 4-bit in less memory than its
embedding takes. What is wrong with names, shapes or formats is found before anything is written, and what is written
appears whole or not at all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CheckpointError, TokenizerError
from ..files import require_free_space, whole_folder
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..quant.formats import BF16, F16, F32, Format, Scheme, find_format, scheme, tensor_nbytes
from ..quant.linear import packed_weights
from ..quant.random import random_rows_of
from . import gguf_names as names
from . import weights
from .convert import notice
from .folder import (
    load_config,
    require_fit,
    require_replaceable,
    resolve_file,
    resolve_folder,
    write_checkpoint,
    written_folder,
)
from .gguf import FILE, GGUF, TensorEntry
from .gguf_folder import (
    compute_dtype,
    encoded,
    file_plan,
    is_gguf_folder,
    require_finite,
    unpacked,
    write_model,
)
from .gguf_tokenizer import check_tokenizer, has_tokenizer, read_tokenizer
from .gguf_write import hash_file
from .journal import key_of, resumable_file
from .lineage import Lineage, load_lineage

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

Rows = Callable[[str], Iterable[Tensor]]
"""A parameter's bytes (rows, B) by name, in pieces."""


class ImportSource:
    """A folder of plain weights, read one tensor at a time. ``get(name)`` reads; every tensor read once gives ``hash``,
    the folder's `checkpoint_hash`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = resolve_folder(folder)
        if is_gguf_folder(self.folder):
            raise CheckpointError(f"{folder}: is quantized already; take the folder it was made from")
        self.config = load_config(self.folder)
        self.wanted = weights.check_against(self.config, weights.read_index(self.folder), self.folder)
        self._digests: dict[str, str] = {}

    def get(self, name: str) -> Tensor:
        """The tensor as stored, lying in a mapped file that is let go with it."""
        info = self.wanted[name]
        tensor = weights.read_tensor(name, info)
        if name not in self._digests:
            self._digests[name] = weights.tensor_digest(
                name, info.dtype, info.shape, weights.raw_bytes(tensor)
            )
        return tensor

    def key(self, **choices: object) -> str:
        """Names a conversion of this folder, for its journal."""
        return key_of(weights.weight_files(self.wanted), **choices)

    def remember(self, digests: dict[str, str]) -> None:
        """Takes the digests of an earlier run, and puts new ones where they are: a journal's part."""
        self._digests = digests

    @property
    def hash(self) -> str:
        """The hash of all weights, as `checkpoint_hash` gives it; reads those that have not been read."""
        for name in self.wanted:
            if name not in self._digests:
                self.get(name)
        return weights.combine_digests(self._digests)

    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer; None, with a warning, where there is none."""
        from .folder import load_tokenizer

        return load_tokenizer(self.folder)


def quantize_folder(
    source: ImportSource,
    out: str | Path,
    plan: Scheme,
    *,
    rows_of: Rows | None = None,
    recipe: dict[str, object] | None = None,
    progress: weights.Progress | None = None,
) -> str:
    """Makes ``out`` a quantized folder of a plain one's weights and returns its hash.

    ``rows_of`` gives the bytes of each parameter where they are not just the nearest (GPTQ). ``recipe`` goes into the
    lineage. Raises QuantError for rows that do not divide and weights that are not finite, `CheckpointError` otherwise;
    ``out`` is as it was then.
    """
    formats = plan.plan(source.config)
    known = load_lineage(source.folder)
    name = f"{known.name if known else source.folder.resolve().name}-{plan.linears.name.lower()}"

    def rounded(param: str) -> Iterable[Tensor]:
        return encoded(source.get(param), formats[param], param)

    def lineage() -> Lineage:
        parent = known.name if known else source.folder.resolve().name
        licence = known.licence if known else None
        stage = known.stage if known else "quantized"  # an instruct model stays one
        return Lineage(name=name, stage=stage, parents={parent: source.hash}, recipe=recipe, licence=licence)

    tokenizer = source.tokenizer()
    # GPTQ works through a model from its beginning, so it cannot go on in the middle
    key = None if rows_of else source.key(do="quantize", formats=sorted(formats.items()), recipe=recipe)
    return _write_folder(
        Path(out),
        source.config,
        formats,
        rows_of or rounded,
        tokenizer,
        name,
        lineage,
        progress,
        key,
        source.remember,
    )


def write_random(
    out: str | Path,
    config: ModelConfig,
    plan: Scheme,
    seed: int = 0,
    *,
    progress: weights.Progress | None = None,
) -> None:
    """Writes a GGUF file of random weights, those of `quant.random.random_quantized`; it has no tokenizer.

    llama.cpp runs it: `tokenizer.ggml.model` is ``none``, which it knows. For measuring speed.
    """
    formats = plan.plan(config)
    rows_of = random_rows_of(config, formats, seed)
    require_free_space(Path(out), _nbytes(config, formats))
    key = key_of([], do="random", config=config, formats=sorted(formats.items()), seed=seed)
    with resumable_file(Path(out), key) as (path, journal):
        write_model(
            path,
            config,
            formats,
            lambda name: [rows_of(name)],
            None,
            name=f"random-{seed}",
            progress=progress,
            journal=journal,
        )


def save_quantized(
    folder: str | Path, model: LlamaLM, tokenizer: Tokenizer | None = None, *, lineage: Lineage | None = None
) -> str:
    """Writes a quantized model from memory as a folder, its blocks as they are; returns the hash."""
    folder = Path(folder)
    packed = {name: (format, rows) for name, format, rows in packed_weights(model)}
    plain = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
    formats: dict[str, Format] = {}
    for name, shape in model.config.param_shapes():
        if name in packed:
            formats[name] = packed[name][0]
        else:
            formats[name] = F32 if len(shape) == 1 else plain[model.get_parameter(name).dtype]

    def rows_of(name: str) -> Iterable[Tensor]:
        if name in packed:
            return [packed[name][1].cpu()]
        return encoded(model.get_parameter(name).detach().cpu(), formats[name], name)

    return _write_folder(
        folder,
        model.config,
        formats,
        rows_of,
        tokenizer,
        lineage.name if lineage else folder.name,
        lambda: lineage,
    )


def import_gguf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    progress: weights.Progress | None = None,
) -> str:
    """Makes a checkpoint folder of a GGUF file (or ``hf:ORG/NAME/FILE.gguf``) and returns its hash.

    Without ``dtype`` a file with packed weights is kept as it is, byte for byte, and a plain one becomes a plain folder
    in its own type; with ``dtype`` all is unpacked. Raises `CheckpointError`, with ``out`` as it was, for a file
    that is unsound, no Llama, or not finite.
    """
    source = resolve_file(source)
    file = GGUF(source)
    config = names.config_from_gguf(file)
    wanted = names.check_tensors(file, config)
    tokenizer = tokenizer_of(file)
    if tokenizer is not None:
        require_fit(tokenizer, config, source)
    name = name or file.get("general.name", str) or source.stem
    licence = notice(config)
    lineage = Lineage(name=name, stage="imported", licence=licence)
    packed = any(entry.format.packed for entry in wanted.values())
    if packed and dtype is None:
        return _keep(file, wanted, Path(out), lineage, progress)
    return write_checkpoint(
        out,
        config,
        unpacked(file, config, wanted, dtype or compute_dtype(wanted)),
        tokenizer,
        dtype=dtype or compute_dtype(wanted),
        lineage=lineage,
        extra_files={"NOTICE": (licence + "\n").encode()} if licence else None,
        progress=progress,
        key=key_of([source], do="import", dtype=dtype, name=name),
    )


def unpack_folder(
    folder: Path,
    out: str | Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: weights.Progress | None,
) -> str:
    """Writes a quantized folder's weights as plain ones, for programs that read no GGUF; returns their hash."""
    file = GGUF(folder / FILE)
    config = names.config_from_gguf(file)
    wanted = names.check_tensors(file, config)
    known = load_lineage(folder)
    lineage = None
    if known is not None:
        parents = {known.name: known.weights_hash} if known.weights_hash else {}
        lineage = known.model_copy(update={"parents": parents, "evals": {}})
    return write_checkpoint(
        out,
        config,
        unpacked(file, config, wanted, dtype),
        tokenizer_of(file),
        dtype=dtype,
        lineage=lineage,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        key=key_of([folder / FILE], do="unpack", dtype=dtype, shard=max_shard_bytes),
    )


def export_gguf(
    folder: str | Path,
    out: str | Path,
    format: str | Format | None = None,
    *,
    progress: weights.Progress | None = None,
) -> None:
    """Writes one GGUF file for llama.cpp and its like: weights, tokenizer, chat template, RoPE factors.

    ``format`` (f16 if None) is that of all matrices; a quantized folder's file is copied as it is, and takes no format.
    Raises QuantError where rows do not divide, `CheckpointError` for what cannot be read or written.
    """
    out, resolved = Path(out), resolve_folder(folder)
    if out.suffix != ".gguf" or out.is_dir():
        raise CheckpointError(f"{out}: give the name of a file that ends in .gguf")
    if is_gguf_folder(resolved):
        if format is not None:
            raise CheckpointError(
                f"{folder}: is quantized already; leave out --type, or export the folder it is made of"
            )
        _copy(resolved / FILE, out, progress)
        return
    source = ImportSource(folder)
    chosen = find_format(format or F16)
    formats = scheme(chosen, head=chosen).plan(source.config)
    known = load_lineage(resolved)
    require_free_space(out, _nbytes(source.config, formats))
    _require_folder(out)
    with resumable_file(out, source.key(do="export", format=chosen)) as (path, journal):
        write_model(
            path,
            source.config,
            formats,
            lambda name: encoded(source.get(name), formats[name], name),
            source.tokenizer(),
            name=known.name if known else resolved.resolve().name,
            licence=known.licence if known else None,
            progress=progress,
            journal=journal,
        )


def _keep(
    file: GGUF,
    wanted: Mapping[str, TensorEntry],
    out: Path,
    lineage: Lineage,
    progress: weights.Progress | None,
) -> str:
    """The file as it is, in a folder of its own, once all of it has been looked at."""
    require_replaceable(out)
    require_free_space(out, file.size + 1_000_000)
    for entry in wanted.values():
        require_finite(file, entry)
        file.forget(entry.name)
    with whole_folder(out) as temporary:
        _copy(file.path, temporary / FILE, progress)
        weights_hash = hash_file(temporary / FILE)
        lineage.model_copy(update={"weights_hash": weights_hash}).write(temporary)
    return weights_hash


def _write_folder(
    out: Path,
    config: ModelConfig,
    formats: Mapping[str, Format],
    rows_of: Rows,
    tokenizer: Tokenizer | None,
    name: str,
    lineage_of: Callable[[], Lineage | None],
    progress: weights.Progress | None = None,
    key: str | None = None,
    remember: Callable[[dict[str, str]], None] | None = None,
) -> str:
    """A quantized folder; with a ``key`` resumable, and ``remember`` is given the digests an earlier run took."""
    if tokenizer is not None:
        require_fit(tokenizer, config, out)
    require_replaceable(out)
    require_free_space(out, _nbytes(config, formats))
    with written_folder(out, key) as (temporary, journal):
        if journal and remember:
            remember(journal.part("source"))
        write_model(
            temporary / FILE,
            config,
            formats,
            rows_of,
            tokenizer,
            name=name,
            progress=progress,
            journal=journal,
        )
        lineage, weights_hash = lineage_of(), hash_file(temporary / FILE)
        if lineage is not None:
            lineage.model_copy(update={"weights_hash": weights_hash}).write(temporary)
    return weights_hash


def _nbytes(config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """Bytes of the tensors, and room for a vocabulary."""
    plan, _ = file_plan(config, formats)
    return sum(tensor_nbytes(shape, format) for shape, format in plan.values()) + 16_000_000


def tokenizer_of(file: GGUF) -> Tokenizer | None:
    """The file's tokenizer if it is one of Llama 3's kind; else None and a warning."""
    if not has_tokenizer(file):
        warnings.warn(f"{file.path}: has no tokenizer; the copy will have none", stacklevel=4)
        return None
    try:
        tokenizer = read_tokenizer(file)
        check_tokenizer(file, tokenizer)
    except TokenizerError as error:
        warnings.warn(f"its tokenizer cannot be used here: {error}", stacklevel=4)
        return None
    return tokenizer


def _copy(source: Path, target: Path, progress: weights.Progress | None) -> None:
    """A byte-for-byte copy under a temporary name, then renamed."""
    _require_folder(target)
    total, done = source.stat().st_size, 0
    require_free_space(target, total)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with source.open("rb") as read, temporary.open("wb") as write:
            while data := read.read(8 << 20):
                done += write.write(data)
                if progress:
                    progress(done, total)
            write.flush()
            os.fsync(write.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _require_folder(file: Path) -> None:
    if not file.absolute().parent.is_dir():
        raise CheckpointError(f"{file.parent}: no such folder; make it first")
