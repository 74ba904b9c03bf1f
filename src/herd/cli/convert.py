"""`herd import` and `herd export`: weights from and for other tools."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckpointError
from .output import Json, print_json

Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; without it the stored one is kept.")]


def import_command(
    source: Annotated[
        str,
        typer.Argument(help="Meta's folder (params.json, *.pth), a Hugging Face folder, or hf:ORG/NAME on this disk."),
    ],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    dtype: Dtype = None,
    name: Annotated[str | None, typer.Option(help="Name in the lineage; the source's if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Bring in weights from Meta or Hugging Face as a checkpoint folder.

    Nothing is downloaded: get the weights from Meta or Hugging Face first, under their licence.
    """
    from .. import checkpoint

    chosen = _dtype(dtype)
    with _progress(f"import {source}") as progress:
        if is_meta_folder(Path(source)):
            checkpoint.import_meta(source, out, dtype=chosen, name=name, progress=progress)
        else:
            checkpoint.import_hf(source, out, dtype=chosen, name=name, progress=progress)
    _say(out, as_json)


def export_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder, e.g. runs/demo/student.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    format: Annotated[str, typer.Option(help="hf: what transformers, vLLM and llama.cpp's converter read.")] = "hf",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint for other tools, in the dtype they want."""
    from .. import checkpoint

    if format != "hf":
        raise CheckpointError(f"--format {format!r} is not known: hf is")
    chosen = _dtype(dtype)
    with _progress(f"export {folder}") as progress:
        checkpoint.export_hf(folder, out, dtype=chosen, progress=progress)
    _say(out, as_json)


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
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr in a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(out: Path, as_json: bool) -> None:
    """What was made, and the notice that Meta's licence wants beside models made from its weights."""
    from .. import checkpoint

    config, lineage = checkpoint.load_config(out), checkpoint.load_lineage(out)
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
