"""`herd import` and `herd export`: convert checkpoints of other programs, and checkpoints for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import units
from ..dtypes import parse_dtype, torch_dtype
from ..errors import CheckpointError, ConfigError
from .common import MODEL, Json, Pre, print_json, progress_bar

if TYPE_CHECKING:
    from ..llama.config import ModelConfig

Dtype = Annotated[
    str | None, typer.Option(help="Number format of the weights: bf16, fp16 or fp32. Default: as stored.")
]
SOURCE = """A GGUF file, a folder with Meta's files (params.json, *.pth), a Hugging Face folder, a name
(`herd list`), or hf:ORG/NAME[/FILE.gguf][@REVISION]."""
MAX_CONTEXT = "Longest context in tokens, for Meta's files, which do not state it."
FORMAT = """hf: for transformers and others; gguf: one file for llama.cpp; vllm: 4- or 8-bit weights for vLLM.
Default: gguf if the target ends in .gguf, else hf."""
TO = """File type for gguf, as in herd quantize: F16 (default), Q8_0, Q4_K_M … Not for quantized folders:
their blocks are copied."""


def import_command(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to create.")],
    dtype: Dtype = None,
    name: Annotated[str | None, typer.Option(help="Name in herd.json (default: the source's).")] = None,
    max_context: Annotated[int | None, typer.Option(min=1, help=MAX_CONTEXT)] = None,
    pre: Pre = None,
    as_json: Json = False,
) -> None:
    """Import weights from Meta, Hugging Face or a GGUF file as a checkpoint folder.

    Quantized weights of a GGUF file keep their format unless --dtype is given. A source that starts with hf:
    is downloaded from the Hugging Face hub, with your token if its licence must be accepted first. No other
    source uses the network.
    """
    from .. import checkpoint
    from ..checkpoint.gguf import gguf_file
    from ..checkpoint.paths import require_replaceable
    from ..checkpoint.sources import is_meta_folder, model_name

    require_replaceable(out, Path(source))  # before anything is downloaded
    chosen, is_meta = _dtype(dtype), is_meta_folder(Path(source))
    path = Path(source) if is_meta else checkpoint.resolve_model(source)
    if max_context is not None and not is_meta:
        raise CheckpointError(
            f"--max-context is for Meta's files, and {source} states its context: leave it out"
        )
    if pre is not None and not gguf_file(path):
        raise CheckpointError(f"--pre is for GGUF files, and {source} is none: leave it out")
    with progress_bar(f"import {source}") as progress:
        if is_meta:
            checkpoint.import_meta(
                path, out, dtype=chosen, max_context=max_context, name=name, progress=progress
            )
        elif gguf_file(path):
            checkpoint.import_gguf(path, out, dtype=chosen, name=name, pre=pre, progress=progress)
        else:
            checkpoint.import_hf(path, out, dtype=chosen, name=name or model_name(path), progress=progress)
    _say(out, checkpoint.load_config(out), as_json)


def export_command(
    folder: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    out: Annotated[Path, typer.Argument(help="The folder to create, or a file NAME.gguf.")],
    format: Annotated[str | None, typer.Option(help=FORMAT)] = None,
    dtype: Dtype = None,
    to: Annotated[str | None, typer.Option(help=TO)] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint for other programs.

    A GGUF file contains the tokenizer, chat template and RoPE factors as well as the weights. llama.cpp can
    run it. For vLLM (compressed-tensors), the blocks of a q4 or q8 folder are copied unchanged, and weights
    that are not quantized are rounded to q4.
    """
    from .. import checkpoint
    from ..checkpoint.paths import require_replaceable

    format = format or ("gguf" if out.suffix.lower() == ".gguf" else "hf")
    if format not in ("hf", "gguf", "vllm"):
        raise CheckpointError(f"--format {format!r} is not known: choose hf, gguf or vllm")
    if dtype is not None and format == "gguf":
        raise CheckpointError("--dtype is for --format hf and vllm: use --to F16, BF16, F32, Q8_0, Q4_K_M …")
    if to is not None and format != "gguf":
        raise CheckpointError("--to is for --format gguf: use --dtype bf16, fp16 or fp32")
    if format == "gguf":
        with progress_bar(f"export {folder}") as progress:
            checkpoint.export_gguf(folder, out, to, progress=progress)
        size = out.stat().st_size
        print_json({"file": str(out), "nbytes": size}) if as_json else print(f"{out}: {units.nbytes(size)}")
        return
    require_replaceable(out, Path(folder))
    chosen = _dtype(dtype)
    with progress_bar(f"export {folder}") as progress:
        if format == "vllm":
            checkpoint.export_vllm(folder, out, dtype=chosen or _dtype("fp16"), progress=progress)
        else:
            checkpoint.export_hf(folder, out, dtype=chosen, progress=progress)
    _say(out, checkpoint.load_config(folder), as_json)


def _dtype(name: str | None) -> Any:
    try:
        return None if name is None else torch_dtype(parse_dtype(name, ("bf16", "fp16", "fp32")))
    except ConfigError as error:
        raise CheckpointError(f"--{error}") from error


def _say(out: Path, config: ModelConfig, as_json: bool) -> None:
    """Print the new folder's size and hash, with the notice that Meta's licence requires."""
    from .. import checkpoint

    lineage = checkpoint.load_lineage(out)
    weights_hash, licence = (lineage.weights_hash, lineage.licence) if lineage else (None, None)
    if as_json:
        made: dict[str, Any] = {"folder": str(out), "name": lineage.name if lineage else out.name}
        made |= {"n_params": config.n_params, "weights_hash": weights_hash, "licence": licence}
        print_json(made)
        return
    print(f"{out}: {config.n_params:,} parameters, weights {weights_hash}")
    if licence:
        print(f"licence: {licence}")
    if licence and "Community License" in licence:  # Meta's
        print('Built with Llama: derived models must say so and have a name that begins with "Llama".')
