"""Recognize folders with unsupported weights: other programs' quantized layers.

They are recognized by ``config.json`` and by the names of their tensors, and refused with one line
that says what to use instead. The only quantized layout that can be read is Meta's own FP8 ("fbgemm_fp8", see
`weights`). This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

READ = "fbgemm_fp8"
_NAMES = {"awq": "AWQ", "gptq": "GPTQ", "exl2": "ExLlamaV2 (EXL2)", "exl3": "ExLlamaV3 (EXL3)", "hqq": "HQQ"}
_BY_SUFFIX = {
    (".qweight", ".qzeros", ".g_idx"): "GPTQ or AWQ",
    (".absmax", ".quant_map", ".SCB"): "bitsandbytes",
    (".q_weight", ".q_scale", ".trellis"): "ExLlama (EXL2 or EXL3)",
    (".weight_packed", ".weight_scale", ".weight_scale_inv"): "compressed-tensors or another FP8 layout",
    (".scales", ".biases"): "MLX",
}


def refuse_quantized(data: dict[str, Any], where: str) -> None:
    """Raise `CheckpointError` if ``config.json`` says that another program has quantized the weights."""
    settings = data.get("quantization_config") or data.get("quantization")
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: quantization_config={settings!r} is not an object; restore the file")
    method = settings.get("quant_method", "MLX" if "bits" in settings else None)
    if method != READ:
        raise _refusal(_NAMES.get(str(method), str(method)), where)


def refuse_quantized_names(names: Collection[str], where: Path) -> None:
    """Raise `CheckpointError` if tensors have the names of another program's quantized layers."""
    for suffixes, method in _BY_SUFFIX.items():
        for name in names:
            if name.endswith(suffixes):
                raise _refusal(method, f"{where}: {name}")


def _refusal(method: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the weights are quantized by {method}, which is not read; take the original checkpoint "
        "(bf16; herd quantize makes it small) or a GGUF file of this model"
    )
