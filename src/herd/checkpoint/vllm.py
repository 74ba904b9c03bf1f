"""Export for vLLM: W4A16 and W8A16 weights in compressed-tensors' layout "pack-quantized".

A Q4_0 block is 32 weights d · (code - 8). compressed-tensors stores the same: codes with the same offset,
eight per int32 from the low bits up, and a scale for every group of 32. So nothing is rounded again. Codes
are copied bit for bit, and scales are copied as half-precision numbers (exact in a checkpoint of dtype
float16, while bfloat16 loses three bits). Q8_0 is written the same way, with four codes per int32. Embeddings
and head are unpacked, because vLLM quantizes only linear layers.

Shapes: R rows, D weights per row, N = D / 32 groups, P = int32s per row. Source:
https://github.com/vllm-project/compressed-tensors (``pack_to_int32``) and vLLM ``compressed_tensors_wNa16``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantError
from ..llama.config import ModelConfig
from ..quant.bits import halves, unpack_bits
from ..quant.formats import Q4_0, Q8_0, Format, require_fit
from . import weights
from .convert import ImportSource
from .folder import write_checkpoint
from .gguf import gguf_file
from .gguf_folder import GGUFSource, encoded
from .lineage import Lineage, load_lineage
from .paths import KEPT_FILES, SIDE_FILES, read_kept
from .sources import model_name, resolve_model
from .stream import Progress
from .write import Specs

GROUP = 32
_BITS = {Q4_0: 4, Q8_0: 8}
Get = Callable[[str], Tensor]


def export_vllm(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    progress: Progress | None = None,
) -> str:
    """Write ``folder`` for vLLM and return the hash of the new weights.

    ``dtype`` is the dtype of scales and unquantized parts. A quantized folder's Q4_0 or Q8_0 linear layers
    are copied unchanged. Those of an unquantized folder are rounded to Q4_0. Raises `QuantError` for other
    formats and rows with an incomplete block, and `CheckpointError` if something cannot be read or written.
    """
    folder = resolve_model(folder)
    source: GGUFSource | ImportSource
    rows_of: Get
    weight_of: Get
    if file := gguf_file(folder):
        source = packed = GGUFSource(file)
        format, tokenizer = _format(source.config, source.formats, folder), source.tokenizer
        rows_of, weight_of = packed.rows, lambda name: packed.weight(name, dtype)
    else:
        source = plain = ImportSource(folder)
        format, tokenizer = Q4_0, plain.tokenizer()

        def weight_of(name: str) -> Tensor:
            weight = plain.get(name)
            weights.require_finite(name, weight, folder)
            return weight

        def rows_of(name: str) -> Tensor:
            return torch.cat(list(encoded(plain.get(name), format, name)))

    config, known = source.config, load_lineage(folder)
    parent = known.name if known else model_name(folder)
    lineage = Lineage(
        name=f"{parent}-w{_BITS[format]}a16",
        stage=known.stage if known else "exported",
        parents={parent: known.weights_hash} if known and known.weights_hash else {},
        recipe={"layout": "compressed-tensors pack-quantized", "format": format.name},
        licence=known.licence if known else None,
    )
    # a plain folder's tokenizer files are copied, a GGUF's are written
    kept = read_kept(folder, SIDE_FILES if isinstance(source, GGUFSource) else KEPT_FILES)
    return write_checkpoint(
        out,
        config,
        _tensors(rows_of, weight_of, format),
        tokenizer,
        dtype=dtype,
        specs=_specs(config, dtype, format),
        lineage=lineage,
        extra_files=kept,
        config_json={"quantization_config": quantization_config(_BITS[format])},
        progress=progress,
        key=source.key(do="vllm", dtype=dtype),
    )


def quantization_config(bits: int) -> dict[str, Any]:
    """Return the entry of `config.json`: symmetric groups of 32 along a row, unquantized activations."""
    grid = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": grid | {"dynamic": False, "actorder": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"input_activations": None, "output_activations": None}},
        "ignore": ["lm_head"],
    }


def packed_codes(rows_RB: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of Q4_0 or Q8_0 blocks, bit for bit: (R, P) int32 and (R, N) fp16."""
    R = rows_RB.shape[0]
    blocks_RNB = rows_RB.reshape(R, -1, format.block_bytes)
    scales_RN = halves(blocks_RNB[..., :2]).half().squeeze(-1)
    if format == Q8_0:
        codes = blocks_RNB[..., 2:] ^ 0x80  # from signed to offset by 128, one byte each
        return codes.reshape(R, -1).view(torch.int32), scales_RN
    codes = unpack_bits(blocks_RNB[..., 2:], 4, 16).reshape(R, -1, 2)
    return (codes[..., 0] | (codes[..., 1] << 4)).contiguous().view(torch.int32), scales_RN


def _tensors(rows_of: Get, weight_of: Get, format: Format) -> Get:
    """Return a function that makes the written tensors by name. A linear layer's three are made together."""
    made: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        linear, _, part = name.rpartition(".")
        if part not in ("weight_packed", "weight_scale", "weight_shape"):
            return weight_of(name)
        if name not in made:
            made.clear()
            codes_RP, scales_RN = packed_codes(rows_of(f"{linear}.weight"), format)
            made[f"{linear}.weight_packed"], made[f"{linear}.weight_scale"] = codes_RP, scales_RN
            made[f"{linear}.weight_shape"] = torch.tensor([len(scales_RN), scales_RN.shape[1] * GROUP])
        return made[name]

    return get


def _specs(config: ModelConfig, dtype: torch.dtype, format: Format) -> Specs:
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in config.param_shapes():
        if not _is_linear(name):
            out[name] = (shape, dtype)
            continue
        require_fit(shape, format, name)
        R, D = shape
        out[f"{name}_packed"] = ((R, D * _BITS[format] // 32), torch.int32)
        out[f"{name}_scale"] = ((R, D // GROUP), dtype)
        out[f"{name}_shape"] = ((2,), torch.int64)
    return out


def _format(config: ModelConfig, formats: Mapping[str, Format], where: Path) -> Format:
    """Return the one format of all linear layers."""
    found = {formats[name] for name, _ in config.param_shapes() if _is_linear(name)}
    if len(found) > 1 or not found <= set(_BITS):
        have = ", ".join(sorted(format.name for format in found))
        raise QuantError(
            f"{where}: its linear layers are {have}; for vLLM all must be Q4_0 or all Q8_0: "
            "export the folder it was made from, or its --format hf"
        )
    return found.pop()


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")
