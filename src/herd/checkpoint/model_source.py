"""Open a model on disk: its configuration, tokenizer and lineage, and its weights on request.

This module does not import torch until the weights are read (or a configuration with RoPE scaling). So a
model that does not exist is reported at once, and `herd chat` reads the tokenizer while another thread loads
torch's libraries.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .adapter_config import base_of, is_adapter, warn_of_other_base
from .catalogue import find_entry, find_name
from .chat_format import (
    generation_defaults,
    gguf_generation_defaults,
    read_folder_tokenizer,
    require_vocabulary_fits,
)
from .gguf import EMBEDDING, GGUF, gguf_file
from .hf import read_config
from .lineage import Lineage, load_lineage
from .paths import ADAPTER_CONFIG, CONFIG
from .pull import pull_config
from .sources import path_on_disk, resolve_model

if TYPE_CHECKING:
    import torch

    from ..llama.config import ModelConfig
    from ..llama.model import LlamaLM
    from ..text.tokenizer import Tokenizer


class ModelSource:
    """A model on disk: configuration, tokenizer and lineage, and the weights on request.

    No file is read twice.

    ``path`` is its folder or GGUF file. If ``source`` is the folder of a LoRA adapter, ``path`` is its base
    model, ``adapter`` is that folder, and the model is loaded with the adapter on it. The tokenizer is None,
    with a warning, if there is none. ``pre`` names the pre-tokenizer of a GGUF file that does not name a
    known one.
    """

    def __init__(self, source: str | Path, *, pre: str | None = None) -> None:
        self.path, self._pre = resolve_model(source), pre
        self._entry = find_entry(str(source), self.path)
        self.adapter: Path | None = None
        """The folder of a LoRA adapter on the model, if there is one."""
        if is_adapter(self.path):
            self.adapter, base = self.path, base_of(self.path)
            try:
                self.path = resolve_model(base)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{self.adapter}: its base model is not there ({error}); put it back, or write its new "
                    f"path into {self.adapter / ADAPTER_CONFIG}"
                ) from error
        self.file = gguf_file(self.path)
        """The GGUF file with the weights, if there is one."""

    @cached_property
    def _gguf(self) -> GGUF:
        assert self.file is not None
        return GGUF(self.file)

    @cached_property
    def config(self) -> ModelConfig:
        if self.file is not None:
            from .gguf_config import config_from_gguf

            return config_from_gguf(self._gguf)
        return read_config(self.path / CONFIG)

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the matrices in the file, or fp32 if they are quantized or have several dtypes."""
        if self.file is not None:
            from .gguf_folder import GGUFSource

            return GGUFSource(self._gguf).compute_dtype
        from .weights import common_dtype, read_index

        return common_dtype(read_index(self.path), self.path)

    @cached_property
    def lineage(self) -> Lineage | None:
        return load_lineage(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").exists():
            return read_folder_tokenizer(self.adapter)
        if self.file is None:
            tokenizer = read_folder_tokenizer(self.path)
            if tokenizer is not None and (self.path / CONFIG).exists():
                require_vocabulary_fits(tokenizer, self.config.vocab_size, self.path)
            return tokenizer
        from .gguf_tokenizer import has_tokenizer, read_tokenizer

        if not has_tokenizer(self._gguf):
            warnings.warn(f"{self.file}: has no tokenizer", stacklevel=4)
            return None
        tokenizer = read_tokenizer(self._gguf, pre=self._pre)
        if EMBEDDING in self._gguf.tensors:  # otherwise `config` says what is missing
            require_vocabulary_fits(tokenizer, self._gguf.tensors[EMBEDDING].shape[0], self.path)
        return tokenizer

    @cached_property
    def sampling_defaults(self) -> dict[str, float | int]:
        """The catalogue's settings of answers, or else the model's own, by the names of `engine.Sampling`.

        A model of `herd raise` has none: it is greedy, as in its evaluation.
        """
        if self.lineage is not None and self.lineage.is_raised:
            return {}
        if self._entry is not None and self._entry.sampling:
            return {str(name): value for name, value in self._entry.sampling.items()}
        if self.file is not None and (own := gguf_generation_defaults(self._gguf.metadata, self.file)):
            return own
        return generation_defaults(self.path)

    def load(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> LlamaLM:
        """Return the model. See `load_model`."""
        if self.file is not None:
            from .gguf_folder import load_gguf

            model = load_gguf(self._gguf, dtype=dtype, device=device)
        else:
            from .plain import load_plain

            model = load_plain(self.path, self.config, dtype, device)
        return self.with_adapter(model)

    def with_adapter(self, model: LlamaLM) -> LlamaLM:
        """Return the base model with the adapter on it, or as it is if there is none."""
        if self.adapter is None:
            return model
        from .adapters import read_adapter

        warn_of_other_base(self.adapter, self.path)
        return read_adapter(self.adapter).attach(model)


def load_model(
    source: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> LlamaLM:
    """Return the model that ``source`` names (see `resolve_model`), in ``dtype`` (None: as stored).

    The blocks of a quantized model stay in the mapped file, and ``dtype`` is its compute dtype. Raises
    `CheckpointError`, before anything is allocated, if files are missing, truncated, or do not fit
    ``config.json``, and after reading if the hash of the weights differs from ``herd.json``.
    """
    return ModelSource(source).load(dtype, device)


def load_config(source: str | Path) -> ModelConfig:
    """Return the configuration of the model that ``source`` names (see `resolve_model`)."""
    return ModelSource(source).config


def config_without_weights(source: str) -> ModelConfig:
    """Return a configuration as `load_config` does, but download only ``config.json`` of a repository.

    Of a file of the catalogue it is the configuration of the original, NAME-bf16.
    """
    if path_on_disk(source) is None:
        named = find_name(source)
        if named and (original := find_name(f"{named[0]}-bf16")):
            named = original
        origin = named[1].source if named else source
        if origin.startswith("hf:"):
            return read_config(pull_config(origin))
    return load_config(source)


def load_tokenizer(source: str | Path) -> Tokenizer | None:
    """Return the tokenizer of the model that ``source`` names.

    Returns None, with a warning, if it has none.
    """
    return ModelSource(source).tokenizer
