"""Read a checkpoint folder's tokenizer and its sampling settings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, TokenizerError
from .hf import read_object

if TYPE_CHECKING:
    from ..text import Tokenizer

_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_RANGES = {"temperature": (0, 1e6), "top_p": (1e-9, 1), "top_k": (-1, 1e9), "min_p": (0, 1),
           "repetition_penalty": (1e-9, 1e6)}  # fmt: skip
_GGUF_NAMES = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
               "penalty_repeat": "repetition_penalty"}  # fmt: skip
"""The keys ``general.sampling.…`` of a GGUF file that are followed."""
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "penalty_alpha": (0,),
}
"""Settings of ``generation_config.json`` that Herd does not implement, with their neutral values."""


def read_folder_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder's files. If there is none, warn and return None."""
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        warnings.warn(f"{folder}: has no tokenizer (tokenizer.model or tokenizer.json)", stacklevel=3)
        return None
    from ..text import Tokenizer  # tiktoken, which loading weights does not need

    return Tokenizer.from_folder(folder)


def require_vocabulary_fits(tokenizer: Tokenizer, vocab_size: int, where: Path) -> None:
    """Raise `TokenizerError` when the tokenizer has ids beyond the model's vocabulary."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{where}: tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is "
            f"{vocab_size}; they do not belong together"
        )


def generation_defaults(folder: Path) -> dict[str, float | int]:
    """Return the settings of ``generation_config.json`` by the names of `engine.Sampling`.

    Greedy (temperature 0) unless the file says ``do_sample``. null means the neutral value.
    Warns of settings that change answers and are not followed. Raises `CheckpointError` for values of the
    wrong type.
    """
    path = folder / "generation_config.json"
    data = read_object(path) if path.exists() else {}
    out: dict[str, float | int] = {}
    for name, neutral in _SAMPLING_DEFAULTS.items():
        value = _checked(data.get(name), name, f"{path}: {name}")
        out[name] = neutral if value is None else value
    if not data.get("do_sample"):
        out |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    ignored = [n for n, neutral in _NOT_FOLLOWED.items() if data.get(n) not in (None, *neutral)]
    if ignored:
        warnings.warn(f"{path}: {', '.join(ignored)} cannot be followed and will be ignored", stacklevel=2)
    return out


def _checked(value: Any, name: str, where: str) -> float | int | None:
    """Return a setting of sampling that a file has. Raises `CheckpointError` if it cannot be followed."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{where}={value!r} is not a number; fix or delete it")
    least, most = _RANGES[name]
    if not least <= value <= most:
        raise CheckpointError(f"{where}={value!r} is out of range; fix or delete it")
    return max(0, int(value)) if name == "top_k" else value  # top_k -1 turns it off, as 0 does


def gguf_generation_defaults(metadata: Mapping[str, Any], where: Path) -> dict[str, float | int]:
    """Return the settings of a GGUF file's ``general.sampling.…`` by the names of `engine.Sampling`.

    Empty if it has none. A file without a temperature means 1, as in `generation_defaults`. Warns of settings
    that are not followed.
    """
    prefix = "general.sampling."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if not own:
        return {}
    out: dict[str, float | int] = dict(_SAMPLING_DEFAULTS)
    for key, name in _GGUF_NAMES.items():
        value = _checked(own.pop(key, None), name, f"{where}: {prefix}{key}")
        out[name] = out[name] if value is None else round(value, 6)  # the file has 32-bit floats
    if own:
        warnings.warn(
            f"{where}: {', '.join(prefix + key for key in own)} cannot be followed and will be ignored",
            stacklevel=2,
        )
    return out
