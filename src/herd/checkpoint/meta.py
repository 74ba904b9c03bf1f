"""Import Meta's own release format, `consolidated.NN.pth` and `params.json`.

Three things differ from Hugging Face's layout:

* Names and a few shapes: ``layers.0.attention.wq`` is ``model.layers.0.self_attn.q_proj``. The FFN width is
  not stored but follows from a rule (`ffn_dim`).
* RoPE rotates neighbouring channels, so the rows of wq and wk are permuted (`names.from_pairs`).
* Large models come in model-parallel pieces. Column-parallel matrices are split along their outputs (dim 0),
  row-parallel ones (wo, w2) along their inputs (dim 1), the embedding along the vocabulary (Llama 3) or the
  width (Llama 2). Norms are whole in each piece. With more pieces than KV heads, as in the 16-piece 405B
  release, each piece has one KV head, which its neighbours repeat. The repeats are checked and dropped.

Pieces are memory-mapped and nothing but tensors is unpickled. The output is written one tensor at a time.

Source: meta-llama/llama-models, `models/llama3/{args,model}.py` and `models/checkpoint.py`. Shapes: D model
dim, H query heads, G KV heads, K head dim, F ffn dim, V vocab.
"""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..llama.config import SIZES, ModelConfig, RopeScaling
from . import weights
from .folder import write_checkpoint
from .hf import read_object
from .lineage import Lineage, licence_notice, released_as
from .names import from_pairs, meta_name
from .paths import LICENCE_FILES, read_kept
from .stream import Progress

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_PIECE = re.compile(r"consolidated\.(\d{2})\.pth")
_EMBEDDING, _HEAD, _WK = "tok_embeddings.weight", "output.weight", "layers.0.attention.wk.weight"
_ROW_PARALLEL = ("attention.wo.weight", "feed_forward.w2.weight")
_KV = ("attention.wk.weight", "attention.wv.weight")
Piece = dict[str, Tensor]


def import_meta(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_context: int | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Import a folder in Meta's layout as a checkpoint folder and return the hash of its weights.

    ``dtype`` defaults to the stored one. Meta's files do not state ``max_context``. It defaults to that of
    the released model with this shape, or for an unknown shape, with a warning, to that of its generation.
    Raises `CheckpointError`, with ``out`` unchanged, if pieces are missing, damaged, quantized or do not fit
    ``params.json``.
    """
    source = Path(source)
    pieces = _open_pieces(source)
    config, repeats = read_params(source, pieces, max_context)
    names = {ours: meta_name(ours) for ours, _ in config.param_shapes()}
    _check_pieces(source, pieces, config, names, repeats)

    def get(ours: str) -> Tensor:
        tensor = _merge(source, pieces, names[ours], config, repeats)
        weights.require_finite(names[ours], tensor, source)
        return from_pairs(ours, tensor, config.head_dim)

    notice = licence_notice(config)
    return write_checkpoint(
        out,
        config,
        get,
        _read_tokenizer(source),
        dtype=dtype or pieces[0][_EMBEDDING].dtype,
        lineage=Lineage(name=name or source.resolve().name, stage="imported", licence=notice),
        extra_files=read_kept(source, LICENCE_FILES, notice),
        progress=progress,
    )


def ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Return the FFN width by Meta's rule: 2/3 of 4 D, times the multiplier, rounded up to a multiple."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def read_params(source: Path, pieces: list[Piece], max_context: int | None = None) -> tuple[ModelConfig, int]:
    """Return (configuration by ``params.json`` and the pieces, number of copies of each KV head)."""
    where = source / "params.json"
    params = read_object(where)
    params = params.get("model", params)  # nested like this in the first 3.1 release
    for key in ("quantization_args", "lora_args", "vision_chunk_size"):
        if params.get(key) not in (None, -1):
            raise CheckpointError(f"{where}: {key} is set; only the plain text models can be imported")
    dim, n_layers, n_heads = (_positive(params, key, where) for key in ("dim", "n_layers", "n_heads"))
    n_kv_heads = _positive(params, "n_kv_heads", where) if params.get("n_kv_heads") is not None else n_heads
    if dim % n_heads or n_heads % n_kv_heads:
        raise CheckpointError(f"{where}: dim={dim}, n_heads={n_heads}, n_kv_heads={n_kv_heads} do not divide")
    stored, repeats = _kv_heads(source, pieces, n_kv_heads, dim // n_heads)
    rows, width = _matrix(source / "consolidated.00.pth", pieces[0], _EMBEDDING).shape
    vocab_size = rows * (len(pieces) if width == dim else 1)
    if params.get("vocab_size", -1) not in (-1, vocab_size):
        raise CheckpointError(f"{where}: vocab_size={params['vocab_size']}, the weights have {vocab_size}")
    multiplier = params.get("ffn_dim_multiplier")
    multiple_of = _positive({"multiple_of": 256} | params, "multiple_of", where)
    if "norm_eps" not in params:
        raise CheckpointError(f"{where}: norm_eps is missing; fetch the file again")
    scaled = bool(params.get("use_scaled_rope", False))
    try:
        factor = float(params.get("rope_scaling_factor") or 8)
        config = ModelConfig(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=stored // repeats,
            ffn_dim=ffn_dim(dim, multiple_of, None if multiplier is None else float(multiplier)),
            norm_eps=float(params["norm_eps"]),
            rope_theta=float(params.get("rope_theta", 10_000.0)),  # absent before Llama 3
            rope_scaling=RopeScaling(factor=factor) if scaled else None,
            tie_embeddings=_is_tied(pieces),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return _with_context(config, scaled, "rope_scaling_factor" in params, max_context, where), repeats


def _with_context(
    config: ModelConfig, scaled: bool, factor_given: bool, asked: int | None, where: Path
) -> ModelConfig:
    """Return the configuration with the missing context, and with Llama 3.2's scaling factor of 32."""
    size = released_as(config)
    if size is not None and scaled:
        if not factor_given:
            config = config.replace(rope_scaling=SIZES[size].rope_scaling)
        return config.replace(max_context=asked or SIZES[size].max_context)
    if asked is None:
        asked = 131_072 if scaled else 8_192 if config.rope_theta >= 500_000 else 4_096
        warnings.warn(
            f"{where}: does not state a context; assuming {asked} tokens, else give --max-context",
            stacklevel=4,
        )
    return config.replace(max_context=asked)


def _kv_heads(source: Path, pieces: list[Piece], stated: int, head_dim: int) -> tuple[int, int]:
    """Return (KV heads in all pieces together, copies of each).

    Heads are repeated only if a piece has a single one.
    """
    for number, piece in enumerate(pieces):
        rows = _matrix(source / f"consolidated.{number:02}.pth", piece, _WK).shape[0]
    if rows % head_dim:
        raise CheckpointError(f"{source}: wk has {rows} rows in a piece, no multiple of head_dim={head_dim}")
    stored = rows * len(pieces) // head_dim
    if stored % stated or (stored > stated and rows != head_dim):
        raise CheckpointError(f"{source}: pieces hold {stored} KV heads, params.json n_kv_heads={stated}")
    if stored > stated or rows != head_dim:
        return stored, stored // stated
    # One head per piece, and params.json counts pieces: only the weights show the copies (405B in 16 pieces).
    heads = [piece[_WK] for piece in pieces]
    repeats = next((i for i in range(1, stored) if not torch.equal(heads[0], heads[i])), stored)
    return stored, repeats if stored % repeats == 0 else 1


def _is_tied(pieces: list[Piece]) -> bool:
    """Return whether the head is missing or a copy of the embedding, as in Llama 3.2's small models."""
    return all(_HEAD not in piece or torch.equal(piece[_HEAD], piece[_EMBEDDING]) for piece in pieces)


def _open_pieces(source: Path) -> list[Piece]:
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give the folder with params.json")
    numbers = sorted(int(match[1]) for path in source.iterdir() if (match := _PIECE.fullmatch(path.name)))
    if not numbers:
        raise CheckpointError(f"{source}: no consolidated.NN.pth; give the folder with Meta's files")
    if numbers != list(range(len(numbers))):
        missing = min(set(range(numbers[-1])) - set(numbers))
        raise CheckpointError(f"{source}: consolidated.{missing:02}.pth is missing; fetch it again")
    pieces = []
    for number in numbers:
        path = source / f"consolidated.{number:02}.pth"
        try:
            piece = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: holds more than tensors; refused, it could run code") from error
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: damaged or not torch's zip format; fetch it again") from error
        if not isinstance(piece, dict) or not all(isinstance(value, Tensor) for value in piece.values()):
            raise CheckpointError(f"{path}: not a dict of tensors; is this one of Meta's files?")
        pieces.append(piece)
    return pieces


def _check_pieces(
    source: Path, pieces: list[Piece], config: ModelConfig, names: dict[str, str], repeats: int
) -> None:
    """Check that every piece has every tensor in a float dtype and the right shape, and no other tensors."""
    shapes = {names[ours]: shape for ours, shape in config.param_shapes()}
    for number, piece in enumerate(pieces):
        where = source / f"consolidated.{number:02}.pth"
        for name, shape in shapes.items():
            tensor, want = _tensor(where, piece, name), list(shape)
            if tensor.dtype not in weights.STORABLE.values():
                raise CheckpointError(f"{where}: {name} is {tensor.dtype}; import the bfloat16 release")
            dim = _split_dim(name, tensor, config)
            if dim is not None:
                want[dim], rest = divmod(want[dim] * (repeats if name.endswith(_KV) else 1), len(pieces))
                if rest:
                    raise CheckpointError(f"{where}: {name}: {shape[dim]} does not divide by {len(pieces)}")
            if list(tensor.shape) != want:
                raise CheckpointError(f"{where}: {name} has shape {list(tensor.shape)} instead of {want}")
        extra = sorted(set(piece) - set(shapes) - {"rope.freqs", _HEAD})
        if extra:
            raise CheckpointError(f"{where}: unexpected tensor {extra[0]}; only text models can be imported")


def _merge(source: Path, pieces: list[Piece], name: str, config: ModelConfig, repeats: int) -> Tensor:
    """Return a whole tensor, joined from its pieces."""
    parts = [piece[name] for piece in pieces]
    dim = _split_dim(name, parts[0], config)
    group = len(parts) if dim is None else repeats if name.endswith(_KV) else 1
    for start in range(0, len(parts), group):
        copies = parts[start : start + group]
        if not all(torch.equal(copies[0], copy) for copy in copies[1:]):
            raise CheckpointError(f"{source}: pieces of different releases: copies of {name} differ")
    parts = parts[::group]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim or 0)


def _split_dim(name: str, part: Tensor, config: ModelConfig) -> int | None:
    """Return the dimension that a tensor is split along, or None for a norm."""
    if part.ndim == 1:
        return None
    if name == _EMBEDDING:
        return 0 if part.shape[1] == config.dim else 1
    return 1 if name.endswith(_ROW_PARALLEL) else 0


def _tensor(where: Path, piece: Piece, name: str) -> Tensor:
    if name not in piece:
        raise CheckpointError(f"{where}: tensor {name} is missing; fetch the file again")
    return piece[name]


def _matrix(where: Path, piece: Piece, name: str) -> Tensor:
    tensor = _tensor(where, piece, name)
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise CheckpointError(
            f"{where}: {name} of shape {list(tensor.shape)} is not a matrix; fetch it again"
        )
    return tensor


def _positive(params: dict[str, Any], key: str, where: Path) -> int:
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key}={value!r} is not a positive integer; fetch the file again")
    return value


def _read_tokenizer(source: Path) -> Tokenizer | None:
    from ..text.tokenizer import Tokenizer

    if (source / "tokenizer.model").exists():
        return Tokenizer.from_file(source / "tokenizer.model")
    warnings.warn(f"{source}: has no tokenizer.model; the checkpoint will have no tokenizer", stacklevel=3)
    return None
