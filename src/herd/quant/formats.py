"""The storage formats of GGUF: names, numbers, and sizes in bytes. This module does not import torch.

A quantized format splits each row into blocks of 32 or 256 weights that share their scales, so the length of
a row must be a multiple of the block. Herd can write `FORMATS` and multiply by them. `TYPES` are all
types of a GGUF file. How a format stores weights is in the file of its family (`legacy.py`, `k_quants.py`,
`iq4.py`).

Source: ggml's ``ggml-common.h`` (``block_q8_0`` and its kin) and the GGUF specification.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import QuantError
from ..llama.config import ModelConfig


@dataclass(frozen=True)
class Format:
    """A storage format: GGUF's ``name`` and number ``code``, ``block`` weights in ``block_bytes`` bytes."""

    name: str
    code: int
    block: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block

    @property
    def short(self) -> str:
        """Herd's short name: ``q4`` for Q4_0, ``q4k`` for Q4_K."""
        return self.name.lower().removesuffix("_0").replace("_", "")

    @property
    def packed(self) -> bool:
        """Whether weights share scales in blocks. Otherwise each weight is a number of its own."""
        return self.block > 1

    def __repr__(self) -> str:
        return self.name


def _table() -> dict[str, Format]:
    rows = """
    F32 0 1 4, F16 1 1 2, Q4_0 2 32 18, Q4_1 3 32 20, Q5_0 6 32 22, Q5_1 7 32 24, Q8_0 8 32 34, Q8_1 9 32 40,
    Q2_K 10 256 84, Q3_K 11 256 110, Q4_K 12 256 144, Q5_K 13 256 176, Q6_K 14 256 210, Q8_K 15 256 292,
    IQ2_XXS 16 256 66, IQ2_XS 17 256 74, IQ3_XXS 18 256 98, IQ1_S 19 256 50, IQ4_NL 20 32 18,
    IQ3_S 21 256 110, IQ2_S 22 256 82, IQ4_XS 23 256 136, I8 24 1 1, I16 25 1 2, I32 26 1 4, I64 27 1 8,
    F64 28 1 8, IQ1_M 29 256 56, BF16 30 1 2, TQ1_0 34 256 54, TQ2_0 35 256 66, MXFP4 39 32 17,
    NVFP4 40 64 36, Q1_0 41 128 18
    """
    split = [row.split() for row in rows.split(",")]
    return {name: Format(name, int(code), int(block), int(size)) for name, code, block, size in split}


TYPES: dict[str, Format] = _table()
"""Every tensor type of GGUF by name."""
BY_CODE: dict[int, Format] = {format.code: format for format in TYPES.values()}

F32, F16, BF16 = (TYPES[name] for name in ("F32", "F16", "BF16"))
Q8_0, Q4_0, Q4_K = TYPES["Q8_0"], TYPES["Q4_0"], TYPES["Q4_K"]
_PACKED = "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
FORMATS: dict[str, Format] = {name: TYPES[name] for name in _PACKED.split()}
"""The packed formats that can be written, and that native kernels multiply by without unpacking."""
PLAIN: dict[str, Format] = {format.name: format for format in (F32, F16, BF16)}


def find_format(name: str | Format) -> Format:
    """Return a format by its name or short name (``q4`` is Q4_0, ``q4k`` is Q4_K), in any case.

    Raises `QuantError`.
    """
    if isinstance(name, Format):
        return name
    known = {format.short: format for format in (FORMATS | PLAIN).values()}
    by_name = known | {format.name.lower(): format for format in known.values()}
    if name.lower() not in by_name:
        raise QuantError(f"format {name!r} is not known: choose {', '.join(known)}")
    return by_name[name.lower()]


def require_fit(shape: Sequence[int], format: Format, name: str = "weight") -> None:
    """Raise `QuantError`, naming formats that fit, if rows of ``shape`` do not divide into whole blocks."""
    if not shape or shape[-1] % format.block == 0:
        return
    fitting = [other.name for other in (*FORMATS.values(), F16) if shape[-1] % other.block == 0]
    raise QuantError(
        f"{name}: rows of {shape[-1]} weights do not divide into {format.name} blocks of {format.block}; "
        f"these fit: {', '.join(fitting)}"
    )


def tensor_nbytes(shape: Sequence[int], format: Format | str) -> int:
    """Return the bytes of a tensor of ``shape`` in ``format``. Raises `QuantError` for uneven rows."""
    format = find_format(format)
    require_fit(shape, format)
    return math.prod(shape) // format.block * format.block_bytes


@dataclass(frozen=True)
class Scheme:
    """The format of each part of a model.

    Norms are always F32: they are few, and all activations pass through them. A tied embedding takes the
    head's format.
    """

    linears: Format
    embeddings: Format
    head: Format

    @property
    def label(self) -> str:
        """A name for files and folders."""
        return self.linears.name.lower()

    def summary(self, config: ModelConfig) -> dict[str, object]:
        """Return the entry of a receipt about the formats."""
        return {part: getattr(self, part).name for part in ("linears", "embeddings", "head")}

    def of(self, name: str, shape: Sequence[int], tied: bool) -> Format:
        """Return the format of a parameter. Raises `QuantError` if its rows have an incomplete block."""
        if len(shape) < 2:
            return F32
        if name == "lm_head.weight" or (tied and name == "model.embed_tokens.weight"):
            chosen = self.head
        else:
            chosen = self.embeddings if name == "model.embed_tokens.weight" else self.linears
        require_fit(shape, chosen, name)
        return chosen

    def plan(self, config: ModelConfig) -> dict[str, Format]:
        """Return the format of every parameter. Raises `QuantError` for rows with an incomplete block."""
        return {name: self.of(name, shape, config.tie_embeddings) for name, shape in config.param_shapes()}

    def nbytes(self, config: ModelConfig) -> int:
        """Return the bytes of all weights of a model in this scheme."""
        plan = self.plan(config)
        return sum(tensor_nbytes(shape, plan[name]) for name, shape in config.param_shapes())

    def resident_nbytes(self, config: ModelConfig) -> int:
        """Return the bytes of the weights in memory.

        A tied packed head is stored twice: its kernel needs the rows in another order than the embedding.
        """
        head = self.plan(config)["model.embed_tokens.weight"]
        twice = config.tie_embeddings and head.packed
        return self.nbytes(config) + (tensor_nbytes((config.vocab_size, config.dim), head) if twice else 0)

    def loading_nbytes(self, config: ModelConfig) -> int:
        """Return the bytes needed in addition while a model is loaded: one matrix as it is in the file.

        Embedding and head are larger, but are loaded first, when memory is still free.
        """
        plan = self.plan(config)
        shapes = [(name, shape) for name, shape in config.param_shapes() if shape[0] != config.vocab_size]
        return max(tensor_nbytes(shape, plan[name]) for name, shape in shapes if len(shape) > 1)


def scheme(
    linears: str | Format, *, embeddings: str | Format | None = None, head: str | Format | None = None
) -> Scheme:
    """Return a scheme by names of formats.

    By default embeddings take the format of the linear layers, and a head below 5.5 bits gets 8 bits: its
    errors directly change the probabilities, and it is a small part of a large model.
    """
    chosen = find_format(linears)
    careful = Q8_0 if chosen.bits < 5.5 else chosen
    return Scheme(
        chosen,
        chosen if embeddings is None else find_format(embeddings),
        careful if head is None else find_format(head),
    )
