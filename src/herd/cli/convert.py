"""`herd import` and `herd export`: weights from and for other tools."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError
from .common import Json, print_json

if TYPE_CHECKING:
    from ..llama.config import ModelConfig

Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; without it the stored one is kept.")]


def import_command(
    source: Annotated[
        str,
        typer.Argument(
            help="A GGUF file, Meta's folder (params.json, *.pth), a Hugging Face folder, hf:ORG/NAME[@REVISION], "
            "or hf:ORG/NAME/FILE.gguf."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    dtype: Dtype = None,
    name: Annotated[str | None, typer.Option(help="Name in the lineage; the source's if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Bring in weights from Meta, Hugging Face or a GGUF file as a checkpoint folder.

    Quantized weights of a GGUF file stay as they are unless --dtype asks for others. hf: downloads from the Hugging
    Face hub, with your token where a licence must be accepted first; the rest touches no network.
    """
    from .. import checkpoint

    chosen = _dtype(dtype)
    with progress_bar(f"import {source}") as progress:
        if source.partition("@")[0].endswith(".gguf"):
            checkpoint.import_gguf(source, out, dtype=chosen, name=name, progress=progress)
        elif is_meta_folder(Path(source)):
            checkpoint.import_meta(source, out, dtype=chosen, name=name, progress=progress)
        else:
            checkpoint.import_hf(source, out, dtype=chosen, name=name, progress=progress)
    _say(out, checkpoint.load_config(out), as_json)


def export_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder, e.g. runs/demo/student.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; for --format gguf the file, NAME.gguf.")],
    format: Annotated[
        str,
        typer.Option(
            help="hf: what transformers and others read; gguf: one file for llama.cpp; vllm: 4 or 8 bits for vLLM."
        ),
    ] = "hf",
    dtype: Dtype = None,
    type: Annotated[
        str | None,
        typer.Option(
            help="For gguf: f16 (if not given), bf16, f32, q8_0, q4_0, q4_k or q6_k. Quantized folders: none."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint for other tools, in the dtype they want.

    A GGUF file carries tokenizer, chat template and RoPE factors with the weights; llama.cpp runs it as it is. For vLLM
    the blocks of a q4 or q8 folder go over as they are (compressed-tensors), and a plain folder's weights become q4.
    """
    from .. import checkpoint

    if format not in ("hf", "gguf", "vllm"):
        raise CheckpointError(f"--format {format!r} is not known: hf, gguf and vllm are")
    if dtype is not None and format == "gguf":
        raise CheckpointError(
            "--dtype is for --format hf: say --type f16, bf16, f32, q8_0, q4_0, q4_k or q6_k"
        )
    if type is not None and format != "gguf":
        raise CheckpointError("--type is for --format gguf: say --dtype bf16, fp16 or fp32")
    if format == "gguf":
        with progress_bar(f"export {folder}") as progress:
            checkpoint.export_gguf(folder, out, type, progress=progress)
        size = out.stat().st_size
        print_json({"file": str(out), "nbytes": size}) if as_json else print(f"{out}: {size / 1e6:,.1f} MB")
        return
    chosen = _dtype(dtype)
    with progress_bar(f"export {folder}") as progress:
        if format == "vllm":
            checkpoint.export_vllm(folder, out, dtype=chosen or _dtype("fp16"), progress=progress)
        else:
            checkpoint.export_hf(folder, out, dtype=chosen, progress=progress)
    _say(out, checkpoint.load_config(folder), as_json)


def is_meta_folder(source: Path) -> bool:
    """Whether a folder has Meta's own layout: ``params.json`` and no ``config.json``."""
    return (source / "params.json").is_file() and not (source / "config.json").is_file()


def _dtype(name: str | None) -> Any:
    import torch

    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name is not None and name not in known:
        raise CheckpointError(f"--dtype {name!r} is not known: choose bf16, fp16 or fp32")
    return None if name is None else known[name]


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr in a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(out: Path, config: ModelConfig, as_json: bool) -> None:
    """What was made, and the notice that Meta's licence wants beside models made from its weights."""
    from .. import checkpoint

    lineage = checkpoint.load_lineage(out)
    weights_hash = lineage.weights_hash if lineage else None
    licence = lineage.licence if lineage else None
    if as_json:
        print_json(
            {
                "folder": str(out),
                "name": lineage.name if lineage else out.name,
                "n_params": config.n_params,
                "weights_hash": weights_hash,
                "licence": licence,
            }
        )
        return
    print(f"{out}: {config.n_params:,} parameters, weights {weights_hash}")
    if licence:
        print(licence)
        print('Built with Llama: what you make from it must say so and have a name that begins with "Llama".')
