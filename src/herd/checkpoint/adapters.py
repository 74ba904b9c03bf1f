"""LoRA adapters on disk: PEFT's folders in both directions, and llama.cpp's GGUF adapters.

A folder has ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them, and next to them
the tokenizer with the chat template that the adapter was trained with. ``base_model_name_or_path`` names the
model that the adapter changes: whatever `sources.resolve_model` understands, or a folder relative to the
adapter's.

Shapes: R rank, D inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import require_free_space, whole_folder, write_json
from ..llama.lora import LoraLinear, lora_layers, scale_of
from ..llama.model import LlamaLM
from .adapter_config import base_in
from .gguf_write import Value, write_fp32_gguf
from .hf import read_object
from .lineage import Lineage
from .names import gguf_name, to_pairs
from .paths import ADAPTER, ADAPTER_CONFIG, PICKLED_ADAPTER

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_(magnitude)_vector)")
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}
"""Values of PEFT's settings that can be read. Herd cannot compute the forward that others ask for."""


@dataclass(frozen=True)
class Adapter:
    """An adapter: the name of its base, and A, B and scale of each adapted layer by name.

    ``magnitudes`` are DoRA's lengths of rows (O,) by layer.
    """

    base: str
    layers: Mapping[str, tuple[Tensor, Tensor, float]]
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)

    def plain_layers(self, purpose: str) -> Mapping[str, tuple[Tensor, Tensor, float]]:
        """Return ``layers``. Raises `CheckpointError` that names ``purpose`` for DoRA, which needs more."""
        if self.magnitudes:
            raise CheckpointError(
                f"{purpose} has no DoRA (use_dora), whose update depends on the lengths of the base's rows; "
                "merge the adapter instead (herd tune merge)"
            )
        return self.layers

    def attach(self, model: LlamaLM) -> LlamaLM:
        """Put the adapter on a model in place and return the model.

        Raises `CheckpointError` if the model has no such layers or their shapes differ.
        """
        model.requires_grad_(False)
        for name, (a_RD, b_OR, scale) in self.layers.items():
            try:
                base = model.get_submodule(name)
            except AttributeError:
                raise CheckpointError(f"the adapter changes {name}, which the model does not have") from None
            shape = (int(base.out_features), int(base.in_features))  # type: ignore[arg-type]
            if shape != (len(b_OR), a_RD.shape[1]):
                raise CheckpointError(
                    f"the adapter's {name} is for a matrix of {len(b_OR)} x {a_RD.shape[1]}, and the "
                    f"model's is {shape[0]} x {shape[1]}: it belongs to another base model"
                )
            layer = LoraLinear(base, len(a_RD), scale)
            device = "cpu" if layer.lora_A.is_meta else layer.lora_A.device
            layer.lora_A, layer.lora_B = (nn.Parameter(part.float().to(device)) for part in (a_RD, b_OR))
            if name in self.magnitudes:
                layer.lora_magnitude = nn.Parameter(self.magnitudes[name].float().to(device))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
        return model


def read_adapter(folder: Path) -> Adapter:
    """Read a folder in PEFT's layout.

    Raises `CheckpointError` for files that are missing or damaged, and for kinds of adapters that are not
    LoRA.
    """
    config = read_object(folder / ADAPTER_CONFIG)
    for key, allowed in _MUST_BE.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(
                f"{folder}: {key}={config[key]!r} is not supported; merge it into its base with peft "
                "(merge_and_unload) and give the result"
            )
    path = folder / ADAPTER
    if not path.exists() and (folder / PICKLED_ADAPTER).exists():
        raise CheckpointError(
            f"{folder}: its weights are pickled ({PICKLED_ADAPTER}), which can run code and are refused; "
            "convert them to safetensors first"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); restore the file") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{path}: {name} is not part of a LoRA adapter on linear layers")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} has values that are not finite; restore the file")
        pairs.setdefault(match[1], {})[match[2] or match[3]] = tensor
    layers, magnitudes = {}, {}
    dora = {"magnitude"} if config.get("use_dora") else set()
    for name, pair in pairs.items():
        if pair.keys() - dora == {"A", "B"} and dora - pair.keys():
            raise CheckpointError(f"{path}: {name} lacks the lora_magnitude_vector of DoRA; restore the file")
        if pair.keys() != {"A", "B"} | dora or len(pair["A"]) != pair["B"].shape[-1]:
            raise CheckpointError(f"{path}: {name} lacks one of lora_A and lora_B, or their ranks differ")
        rank = len(pair["A"])
        alpha = _alpha(config, name)
        scale = scale_of(rank, alpha, rslora=bool(config.get("use_rslora")))
        layers[name] = (pair["A"], pair["B"], scale)
        if dora:
            if pair["magnitude"].shape != (len(pair["B"]),):
                raise CheckpointError(f"{path}: {name} has a magnitude for another number of rows")
            magnitudes[name] = pair["magnitude"]
    if not layers:
        raise CheckpointError(f"{path}: has no tensors; train the adapter again")
    return Adapter(base_in(folder, config), layers, magnitudes)


def save_adapter(
    folder: Path,
    model: LlamaLM,
    base: str,
    tokenizer: Tokenizer | None = None,
    *,
    rslora: bool = False,
    lineage: Lineage | None = None,
) -> None:
    """Write the adapters of ``model`` as a folder in PEFT's layout, which replaces an older one.

    ``rslora`` is the way in which the scale is written. It does not change what is computed.
    """
    layers = lora_layers(model)
    rank, scale = _uniform(layers, folder)
    dora = any(layer.lora_magnitude is not None for layer in layers.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale / scale_of(rank, 1, rslora=rslora),
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": rslora,
        "use_dora": dora,
        "modules_to_save": None,
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for part in ("A", "B"):
            tensor = getattr(layer, f"lora_{part}").detach().cpu()
            tensors[f"{_PREFIX}{name}.lora_{part}.weight"] = tensor.contiguous()
        if layer.lora_magnitude is not None:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = layer.lora_magnitude.detach().cpu()
    require_free_space(folder, sum(tensor.nbytes for tensor in tensors.values()) + 1_000_000)
    with whole_folder(folder) as temporary:
        write_json(temporary / ADAPTER_CONFIG, config)
        save_file(tensors, temporary / ADAPTER, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(temporary, model_max_length=model.config.max_context)
        if lineage is not None:
            lineage.write(temporary)


def export_gguf_adapter(file: Path, model: LlamaLM, name: str) -> None:
    """Write the adapters of ``model`` as a GGUF adapter for llama.cpp (``--lora FILE``).

    Raises `CheckpointError` for an adapter on a tied head, which a GGUF file does not have.
    """
    layers = lora_layers(model)
    rank, scale = _uniform(layers, file)
    if "lm_head" in layers and model.config.tie_embeddings:
        raise CheckpointError(f"{file}: the head is tied to the embedding; merge the adapter instead")
    metadata: list[Value] = [
        ("general.type", "STRING", "adapter"),
        ("general.name", "STRING", name),
        ("adapter.type", "STRING", "lora"),
        ("adapter.lora.alpha", "FLOAT32", scale * rank),
    ]
    write_fp32_gguf(file, metadata, dict(_gguf_tensors(layers, model.config.head_dim)))


def _gguf_tensors(layers: Mapping[str, LoraLinear], head_dim: int) -> Iterator[tuple[str, Tensor]]:
    for name, layer in layers.items():
        theirs = gguf_name(f"{name}.weight")
        yield f"{theirs}.lora_a", layer.lora_A.detach().float().cpu().contiguous()
        b_OR = to_pairs(f"{name}.weight", layer.lora_B.detach().float().cpu(), head_dim)
        yield f"{theirs}.lora_b", b_OR.contiguous()


def _uniform(layers: Mapping[str, LoraLinear], where: Path) -> tuple[int, float]:
    """Return the rank and the scale that all layers have in common."""
    kinds = {(len(layer.lora_A), layer.scale) for layer in layers.values()}
    if len(kinds) != 1:
        found = "no adapter" if not kinds else f"adapters of {len(kinds)} ranks or scales"
        raise CheckpointError(f"{where}: the model has {found}; one rank and scale can be written")
    return kinds.pop()


def _alpha(config: Mapping[str, Any], name: str) -> float:
    patterns = config.get("alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
            return float(alpha)
    return float(config.get("lora_alpha", 8))  # PEFT's default
