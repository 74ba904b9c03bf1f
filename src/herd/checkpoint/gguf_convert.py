"""Quantize a folder, import a GGUF file, and export one for other programs.

Everything is streamed: unquantized weights are read one tensor at a time, encoded some rows at a time and
written immediately. So an 8B model in bf16 is quantized to 4 bits in less memory than its embedding. Wrong
names, shapes and formats are found before anything is written, and the result appears only when it is
complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import require_free_space, whole_file
from ..llama.config import ModelConfig
from ..quant.formats import Scheme
from ..quant.mixtures import named_scheme
from ..quant.random import random_rows_of
from ..text import Tokenizer
from .convert import ImportSource
from .folder import write_checkpoint
from .gguf import FILE, gguf_file
from .gguf_folder import FileContent, GGUFSource, RowsOf, encoded, write_gguf_folder, write_model
from .journal import key_of, new_folder, resumable_file
from .lineage import Lineage, licence_notice
from .paths import SIDE_FILES, read_kept, require_replaceable, write_kept
from .sources import resolve_model
from .stream import Progress, advance_of
from .verified import hash_file


def quantize_folder(
    source: ImportSource,
    out: str | Path,
    plan: Scheme,
    *,
    rows_of: RowsOf | None = None,
    importance: Mapping[str, Tensor] | None = None,
    recipe: dict[str, object] | None = None,
    progress: Progress | None = None,
) -> str:
    """Quantize the weights of a source into the folder ``out`` and return its hash.

    ``rows_of`` returns the bytes of each parameter, by GPTQ for instance (default: round to the nearest).
    ``importance`` has the weights of columns, by parameter (see `calibration.measure_importance`).
    ``recipe`` is stored in the lineage. Raises `QuantError` if rows have an incomplete block or weights are
    not finite, and `CheckpointError` for other faults. ``out`` is then unchanged.
    """
    formats = plan.plan(source.config)
    known = source.lineage
    name = f"{source.name}-{plan.label}"
    weights_D = importance or {}

    def rounded(param: str) -> Iterable[Tensor]:
        return encoded(source.get(param), formats[param], param, weights_D.get(param))

    def lineage() -> Lineage:
        stage = known.stage if known else "quantized"  # an instruct model is still an instruct model
        licence = known.licence if known else None
        parents = {source.name: source.hash}
        return Lineage(name=name, stage=stage, parents=parents, recipe=recipe, licence=licence)

    # GPTQ processes a model from its beginning, so it cannot continue in the middle
    digest = hashlib.sha256(
        b"".join(weights_D[param].numpy().tobytes() for param in sorted(weights_D))
    ).hexdigest()
    choices = {"formats": sorted(formats.items()), "recipe": recipe, "importance": digest}
    key = None if rows_of else source.key(do="quantize", **choices)
    return write_gguf_folder(
        Path(out),
        FileContent(source.config, formats, rows_of or rounded, source.tokenizer(), name),
        lineage,
        progress=progress,
        key=key,
        extra_files=read_kept(source.folder, SIDE_FILES),
        remember=source.remember,
    )


def write_random(
    out: str | Path,
    config: ModelConfig,
    plan: Scheme,
    seed: int = 0,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a GGUF file with the random weights of `quant.random.random_quantized`, to measure speed.

    Without a tokenizer, ``tokenizer.ggml.model`` is "none". llama.cpp can run such a file too.
    """
    formats = plan.plan(config)
    rows_of = random_rows_of(config, formats, seed)
    model = FileContent(config, formats, lambda param: [rows_of(param)], tokenizer, f"random-{seed}")
    key = key_of([], do="random", config=config, formats=sorted(formats.items()), seed=seed)
    _write_file(Path(out), model, key, progress)


def import_gguf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    pre: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Import a GGUF file (or ``hf:ORG/NAME/FILE.gguf``) as a checkpoint folder and return its hash.

    Without ``dtype``, a file with quantized weights is copied byte for byte, and other weights become a
    folder in their own dtype. With ``dtype`` everything is unpacked. The quantized parts of a split file are
    written as one file. ``pre`` names the pre-tokenizer if the file does not. Raises `CheckpointError`, with
    ``out`` unchanged, if the file is invalid, not a Llama, or has weights that are not finite.
    """
    path = resolve_model(source)
    file = gguf_file(path)
    if file is None:
        raise CheckpointError(f"{source}: holds no GGUF file")
    gguf = GGUFSource(file, pre)
    name = name or gguf.name
    # ``path`` may be a folder that Herd quantized
    kept = read_kept(path, SIDE_FILES, licence_notice(gguf.config))
    lineage = Lineage(name=name, stage="imported", licence=gguf.licence)
    tokenizer = gguf.tokenizer  # warns if it cannot be used, also where the file is only copied
    if dtype is None and any(format.packed for format in gguf.formats.values()):
        if not gguf.file.is_split and pre is None:
            return _keep(gguf, Path(out), lineage, kept, progress)
        return write_gguf_folder(
            Path(out), gguf.content(name), lambda: lineage, extra_files=kept, progress=progress
        )
    chosen = dtype or gguf.compute_dtype
    return write_checkpoint(
        out,
        gguf.config,
        lambda param: gguf.weight(param, chosen),
        tokenizer,
        dtype=chosen,
        lineage=lineage,
        extra_files=kept,
        progress=progress,
        key=gguf.key(do="import", dtype=dtype, name=name, pre=pre),
    )


def export_gguf(
    folder: str | Path, out: str | Path, to: str | Scheme | None = None, *, progress: Progress | None = None
) -> None:
    """Write a GGUF file for llama.cpp and others: weights, tokenizer, chat template, RoPE factors.

    ``to`` is a name that `named_scheme` knows, or a scheme (None: F16). A quantized folder's file is copied,
    and ``to`` may not be given. Raises `QuantError` if rows have an incomplete block, and `CheckpointError`
    if something cannot be read or written.
    """
    out, file = Path(out), gguf_file(resolve_model(folder))
    if out.suffix != ".gguf" or out.is_dir():
        raise CheckpointError(f"{out}: give the name of a file that ends in .gguf")
    if file:
        if to is not None:
            raise CheckpointError(f"{folder}: is quantized already; leave out --to, or export its original")
        packed = GGUFSource(file)
        _require_parent(out)
        if packed.file.is_split:
            _write_file(out, packed.content(packed.name), packed.key(do="join"), progress)
        else:
            _copy(file, out, progress)
        return
    source = ImportSource(folder)
    formats = (to if isinstance(to, Scheme) else named_scheme(to or "F16", source.config)).plan(source.config)
    _require_parent(out)
    model = FileContent(
        source.config,
        formats,
        lambda name: encoded(source.get(name), formats[name], name),
        source.tokenizer(),
        source.name,
        source.lineage.licence if source.lineage else None,
    )
    _write_file(out, model, source.key(do="export", formats=sorted(formats.items())), progress)


def _write_file(out: Path, model: FileContent, key: str, progress: Progress | None) -> None:
    """Write a file that appears when it is complete. ``key`` is that of the conversion (`journal.key_of`)."""
    require_free_space(out, model.nbytes)
    with resumable_file(out, key) as (path, journal):
        write_model(path, model, progress, journal)


def _keep(
    gguf: GGUFSource, out: Path, lineage: Lineage, kept: dict[str, bytes], progress: Progress | None
) -> str:
    """Copy the file unchanged into a new folder, after all of it has been checked."""
    require_replaceable(out)
    require_free_space(out, gguf.file.size + 1_000_000)
    for name, entry in gguf.wanted.items():
        gguf.rows(name)
        gguf.file.forget(entry.name)
    with new_folder(out, None) as (temporary, _):
        _copy(gguf.file.path, temporary / FILE, progress)
        weights_hash = hash_file(temporary / FILE)
        lineage.model_copy(update={"weights_hash": weights_hash}).write(temporary)
        write_kept(temporary, kept)
    return weights_hash


def _copy(source: Path, target: Path, progress: Progress | None) -> None:
    """Copy a file byte for byte."""
    total = source.stat().st_size
    advance = advance_of(progress, total)
    require_free_space(target, total)
    with whole_file(target) as temporary, source.open("rb") as read, temporary.open("wb") as write:
        while data := read.read(8 << 20):
            advance(write.write(data))


def _require_parent(file: Path) -> None:
    if not file.absolute().parent.is_dir():
        raise CheckpointError(f"{file.parent}: no such folder; make it first")
