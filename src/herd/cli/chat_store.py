"""Storage of the last dialog with each model in the cache folder, for `herd chat MODEL --continue`."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ChatError, StorageError
from ..files import write_json
from ..machine import cache_folder


def save_dialog(model: Path, messages: list[dict[str, Any]]) -> None:
    """Store the dialog with the model at ``model`` in place of the previous one.

    Does nothing without a cache folder.
    """
    path = _path(model)
    with suppress(StorageError, OSError):
        if any(message["role"] == "user" for message in messages):
            write_json(path, {"model": str(model.resolve()), "messages": messages})
            path.chmod(0o600)
        else:  # the user has reset the dialog
            path.unlink(missing_ok=True)


def load_dialog(model: Path, name: str) -> list[dict[str, Any]]:
    """Return the messages of the last dialog with the model at ``model``.

    Raises `ChatError` if there is none.
    """
    try:
        messages: list[dict[str, Any]] = json.loads(_path(model).read_text(encoding="utf-8"))["messages"]
        if not messages or not all(isinstance(message["role"], str) for message in messages):
            raise ValueError("it has no messages")
    except FileNotFoundError:
        raise ChatError(
            f"--continue: no dialog with {name} is stored; leave out --continue to begin a new one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ChatError(f"--continue: {_path(model)} cannot be read ({error}); delete it") from None
    return messages


def _path(model: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(model.resolve())).hexdigest()[:32]
    return cache_folder() / "dialogs" / f"{digest}.json"
