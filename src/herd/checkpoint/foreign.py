"""Recognize folders with unsupported weights: other programs' quantized layers, or LoRA adapters.

They are recognized by ``config.json`` and by the names of their tensors and files, and refused with one line
that says what to use instead. The only quantized layout that can be read is Meta's own FP8 ("fbgemm_fp8", see
`weights`). This module does not import torch.
"""

from __future__ import annotations

import json
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
        raise CheckpointError(
            f"{where}: quantization_config={settings!r} is not a JSON object; restore the file"
        )
    method = settings.get("quant_method", "MLX" if "bits" in settings else None)
    if method != READ:
        raise _refusal(_NAMES.get(str(method), str(method)), where)


def refuse_quantized_names(names: Collection[str], where: Path) -> None:
    """Raise `CheckpointError` if tensors have the names of another program's quantized layers."""
    for suffixes, method in _BY_SUFFIX.items():
        for name in names:
            if name.endswith(suffixes):
                raise _refusal(method, f"{where}: {name}")


def refuse_lora(folder: Path) -> None:
    """Raise `CheckpointError` if the folder has a LoRA adapter and no model."""
    path = folder / "adapter_config.json"
    if not path.exists() or (folder / "config.json").exists():
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise CheckpointError(
        f"{folder}: is a LoRA adapter, not a model; merge it into its base model "
        f"({base or 'adapter_config.json lacks its name'}) with peft (merge_and_unload) and give the result"
    )


def _refusal(method: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the weights are quantized by {method}, which is not read; take the original checkpoint "
        "(bf16; herd quantize makes it small) or a GGUF file of this model"
    )
