"""A checkpoint folder: save, load, and what is in it.

The layout is Hugging Face's, so `transformers`, vLLM and llama.cpp's converter read the folder unchanged:

    config.json  generation_config.json  model.safetensors (or shards and model.safetensors.index.json)
    tokenizer.json  tokenizer_config.json  special_tokens_map.json  tokenizer.model  herd.json (lineage)

Parameter names in memory are already the file's names, so saving translates nothing. Loading checks all headers against
the configuration first, builds the model on the meta device and then puts each tensor in its place: no initialisation,
and no second copy of the weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TokenizerError
from ..files import require_free_space, whole_folder
from ..llama import rope
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..quant.linear import is_quantized
from . import gguf, weights
from .gguf_folder import is_gguf_folder, load_gguf
from .gguf_names import config_from_gguf
from .gguf_write import hash_file
from .hf import Dialect, config_to_hf, read_config
from .journal import Journal, resumable_folder
from .lineage import FILE as LINEAGE_FILE
from .lineage import Lineage, load_lineage
from .memory import require_memory
from .write import MAX_SHARD_BYTES, Specs, write_weights

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_OURS = {CONFIG, GENERATION, LINEAGE_FILE, weights.INDEX, gguf.FILE, *TOKENIZER_FILES, "chat_template.jinja"}
_OURS |= {"LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE", "README.md", ".gitattributes"}


def save_model(
    folder: str | Path,
    model: LlamaLM,
    tokenizer: Tokenizer | None = None,
    *,
    lineage: Lineage | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation_config: dict[str, Any] | None = None,
) -> str:
    """Writes ``model`` as a checkpoint folder, whole or not at all, and returns the hash of its weights.

    ``dtype`` None keeps the parameters' own. An existing checkpoint at ``folder`` is exchanged in one step. Raises
    `CheckpointError` when the disk is full or ``folder`` holds files that are not a checkpoint's.
    """
    if is_quantized(model):
        if dtype is not None:
            raise CheckpointError(f"{folder}: a quantized model is saved as it is; leave out dtype={dtype}")
        from .gguf_convert import save_quantized

        return save_quantized(folder, model, tokenizer, lineage=lineage)
    params = dict(model.named_parameters())
    if dtype is None:
        dtypes = {param.dtype for param in params.values()}
        if len(dtypes) != 1:
            raise CheckpointError(
                f"{folder}: parameters have several dtypes {sorted(map(str, dtypes))}; pass dtype="
            )
        dtype = dtypes.pop()
    return write_checkpoint(
        folder,
        model.config,
        lambda name: _whole(params[name]),
        tokenizer,
        dtype=dtype,
        lineage=lineage,
        max_shard_bytes=max_shard_bytes,
        generation_config=generation_config,
    )


def write_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    get: Callable[[str], Tensor],
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype,
    lineage: Lineage | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation_config: dict[str, Any] | None = None,
    dialect: Dialect = "rope_scaling",
    extra_files: Mapping[str, bytes] | None = None,
    progress: weights.Progress | None = None,
    key: str | None = None,
    specs: Specs | None = None,
) -> str:
    """`save` for weights that are produced one by one: ``get(name)`` is asked once a tensor, in file order.

    ``extra_files`` are written last and may replace derived ones (a release's own tokenizer files, a licence). With
    a ``key`` (`journal.key_of`) the work can be interrupted and goes on where it was when the same is begun again.
    ``specs`` are the tensors where they are not simply the model's parameters (a layout of another program).
    """
    folder = Path(folder)
    if dtype not in weights.NAMES:
        raise CheckpointError(f"{folder}: dtype={dtype} cannot be stored; use float32, float16 or bfloat16")
    if tokenizer is not None:
        require_fit(tokenizer, config, folder)
    require_replaceable(folder)
    require_free_space(folder, config.nbytes(dtype.itemsize) + 1_000_000)
    with written_folder(folder, key) as (temporary, journal):
        weights_hash = write_weights(
            temporary,
            specs or {name: (shape, dtype) for name, shape in config.param_shapes()},
            get,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
            where=folder,
            journal=journal,
        )
        stops = None if tokenizer is None else sorted(tokenizer.stop_ids)
        bos = None if tokenizer is None else tokenizer.bos_id
        name = str(dtype).removeprefix("torch.")
        _write_json(
            temporary / CONFIG,
            config_to_hf(config, dtype=name, bos_token_id=bos, eos_token_id=stops, dialect=dialect),
        )
        if tokenizer is not None:
            tokenizer.save(temporary, model_max_length=config.max_context)
            # Meta's own release samples at 0.6 / 0.9 by default.
            _write_json(
                temporary / GENERATION,
                {
                    "bos_token_id": bos,
                    "eos_token_id": stops,
                    "pad_token_id": tokenizer.pad_id,
                    "do_sample": True,
                    "temperature": 0.6,
                    "top_p": 0.9,
                },
            )
        if generation_config is not None:
            _write_json(temporary / GENERATION, generation_config)
        if lineage is not None:
            lineage.model_copy(update={"weights_hash": weights_hash}).write(temporary)
        for file, data in (extra_files or {}).items():
            (temporary / file).write_bytes(data)
    return weights_hash


@contextmanager
def written_folder(folder: Path, key: str | None) -> Iterator[tuple[Path, Journal | None]]:
    """`whole_folder`, or with a ``key`` `resumable_folder`."""
    if key is None:
        with whole_folder(folder) as temporary:
            yield temporary, None
    else:
        with resumable_folder(folder, key) as found:
            yield found


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    check_finite: bool = False,
) -> LlamaLM:
    """The model in a checkpoint folder (or ``hf:ORG/NAME``), weights in ``dtype`` (None: as stored) on ``device``.

    Raises `CheckpointError`, before anything is allocated, for files that are missing, truncated, or do not fit
    ``config.json``; afterwards for weights whose hash is not that of ``herd.json``, and with ``check_finite`` for NaN
    and infinite ones. A quantized folder's blocks stay in the mapped file; ``dtype`` is what it computes in.
    """
    folder = resolve_folder(folder)
    if is_gguf_folder(folder):
        return load_gguf(folder, dtype=dtype, device=device)
    inode = folder.stat().st_ino
    config = load_config(folder)
    wanted = weights.check_against(config, weights.read_index(folder), folder)
    dtype = weights.common_dtype(wanted, folder) if dtype is None else dtype
    if torch.device(device).type == "cpu":
        require_memory(config, config.nbytes(dtype.itemsize), folder)
    with torch.device("meta"):
        model = LlamaLM(config)
    known = load_lineage(folder)
    hashed = weights.Hashing(wanted) if known is not None and known.weights_hash else None
    for name, stored in weights.iterate(wanted):
        if hashed is not None:
            hashed.add(name, stored)
        tensor = weights.cast_tensor(name, stored, dtype, folder).to(device)
        if check_finite:
            weights.require_finite(name, tensor, folder)
        # A tensor that needed no conversion still lies in the mapped file.
        _place(model, name, tensor.clone() if tensor.data_ptr() == stored.data_ptr() else tensor)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.inv_freq = rope.inverse_frequencies(config).to(device)
    if hashed is not None and known is not None:
        result = hashed.result()
        if folder.stat().st_ino == inode and result != known.weights_hash:
            raise CheckpointError(
                f"{folder}: the weights are not those {LINEAGE_FILE} speaks of: damaged or edited; restore the folder"
            )
    if folder.stat().st_ino != inode:  # a save exchanged the folder: some tensors may be the old ones
        raise CheckpointError(f"{folder}: was replaced while it was being read; load it again")
    return model


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of a checkpoint folder (or ``hf:ORG/NAME``)."""
    folder = resolve_folder(folder)
    if is_gguf_folder(folder):
        return config_from_gguf(gguf.GGUF(folder / gguf.FILE))
    return read_config(folder / CONFIG)


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder; None, with a warning, when it has none."""
    folder = resolve_folder(folder)
    if is_gguf_folder(folder):
        return _tokenizer_in_gguf(folder)
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        warnings.warn(f"{folder}: has no tokenizer (tokenizer.model or tokenizer.json)", stacklevel=2)
        return None
    from ..text.tokenizer import Tokenizer  # tiktoken, which loading weights does not need
    from .chat_format import with_chat_settings

    tokenizer = with_chat_settings(Tokenizer.from_folder(folder), folder)
    if (folder / CONFIG).exists():
        require_fit(tokenizer, load_config(folder), folder)
    return tokenizer


def _tokenizer_in_gguf(folder: Path) -> Tokenizer | None:
    from .gguf_tokenizer import has_tokenizer, read_tokenizer

    file = gguf.GGUF(folder / gguf.FILE)
    if not has_tokenizer(file):
        warnings.warn(f"{folder}: {gguf.FILE} has no tokenizer", stacklevel=3)
        return None
    tokenizer = read_tokenizer(file)
    require_fit(tokenizer, config_from_gguf(file), folder)
    return tokenizer


def checkpoint_hash(folder: str | Path, progress: weights.Progress | None = None) -> str:
    """sha256 of a folder's weights; the same for every sharding, different for every dtype. Reads all of them.

    A quantized folder's is that of its whole file.
    """
    folder = resolve_folder(folder)
    if is_gguf_folder(folder):
        return hash_file(folder / gguf.FILE, progress)
    wanted = weights.check_against(load_config(folder), weights.read_index(folder), folder)
    return weights.hash_weights(wanted, progress)


def resolve_folder(source: str | Path) -> Path:
    """A folder on disk: ``source`` itself, or for ``hf:ORG/NAME[@REVISION]`` its download from the Hugging Face hub."""
    if not str(source).startswith("hf:"):
        if Path(source).suffix == ".gguf" and Path(source).is_file():
            raise CheckpointError(f"{source}: is a file; make a folder of it: herd import {source} FOLDER")
        if not Path(source).is_dir():
            raise CheckpointError(f"{source}: no such folder; give a checkpoint folder or hf:ORG/NAME")
        return Path(source)
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    name, _, revision = str(source)[3:].partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "USE_POLICY*"]
    with _from_the_hub(source):
        return Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=patterns, ignore_patterns=["original/*"]
            )
        )


def resolve_file(source: str | Path) -> Path:
    """A file on disk: ``source`` itself, or for ``hf:ORG/NAME/FILE[@REVISION]`` its download."""
    if not str(source).startswith("hf:"):
        return Path(source)
    from huggingface_hub import hf_hub_download

    name, _, revision = str(source)[3:].partition("@")
    parts = name.split("/", 2)
    if len(parts) < 3:
        raise CheckpointError(f"{source}: say which file: hf:ORG/NAME/FILE.gguf")
    with _from_the_hub(source):
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], revision=revision or None))


@contextmanager
def _from_the_hub(source: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub raises its own, httpx's and OSError alike; all mean "not there"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: cannot be fetched: {reason}") from error


def _whole(param: Tensor) -> Tensor:
    """A parameter as one plain tensor; one sharded by FSDP2 is gathered (every rank must ask in the same order)."""
    return param.full_tensor() if hasattr(param, "full_tensor") else param


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))


def require_fit(tokenizer: Tokenizer, config: ModelConfig, where: Path) -> None:
    """`TokenizerError` when the tokenizer has ids beyond the model's vocabulary."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{where}: tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {config.vocab_size}; "
            "they do not belong together"
        )


def require_replaceable(folder: Path) -> None:
    """Only a checkpoint may be replaced: never somebody's home folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; choose another name")
    others = sorted(p.name for p in folder.iterdir() if p.name not in _OURS and p.suffix != ".safetensors")
    if others:
        raise CheckpointError(
            f"{folder}: holds {others[0]}, which is not a checkpoint's; choose another folder"
        )


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
