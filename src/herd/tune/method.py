"""Choose between full fine-tuning, LoRA and QLoRA, by the model's size and the memory of this machine."""

from __future__ import annotations

from dataclasses import dataclass

from .. import units
from ..dtypes import nbytes_per_value
from ..llama.config import ModelConfig
from ..plan.training import adapter_params
from ..train.memory import adapter_nbytes, train_nbytes

SMALL = 500_000_000
"""Below this number of parameters full fine-tuning learns more than LoRA at equal tokens and is hardly slower
(arXiv 2603.20100, and `bench/tune.py arms` measures it here)."""
FULL_LR = 2e-4
"""Learning rate of full fine-tuning for a model of `LR_PARAMS`. It falls with the square root of the size."""
LR_PARAMS = 135e6
LORA_FACTOR = 10
"""LoRA's learning rate relative to full fine-tuning's ("LoRA without regret")."""
DPO_FACTOR = 0.02
"""DPO's learning rate relative to supervised fine-tuning's."""


@dataclass(frozen=True)
class MethodChoice:
    """The chosen method, the reason in words, and the predicted bytes of memory."""

    method: str
    reason: str
    nbytes: int


def method_nbytes(
    config: ModelConfig,
    method: str,
    rows: int,
    context: int,
    dtype: str,
    rank: int,
    packed_nbytes: int | None,
) -> int:
    """Return the bytes that training with a method takes. ``packed_nbytes``: the size of a packed model."""
    if method == "full":
        return train_nbytes(config, rows, context, dtype=dtype).total
    vectors = config.vocab_size * config.dim
    frozen = packed_nbytes or 0
    if method == "lora":
        frozen = int((config.n_params - vectors) * nbytes_per_value(dtype)) + 4 * vectors
    trained = adapter_params(config, rank)
    return adapter_nbytes(config, frozen, trained, rows, context, dtype=dtype, packed=method == "qlora")


def choose_method(
    config: ModelConfig,
    wanted: str,
    *,
    rows: int,
    context: int,
    dtype: str,
    rank: int,
    packed_nbytes: int | None,
    memory: int,
) -> MethodChoice:
    """Return the method to use. ``wanted`` is "auto" or a method, ``memory`` the bytes that are free."""

    def needed(method: str) -> int:
        return method_nbytes(config, method, rows, context, dtype, rank, packed_nbytes)

    size = f"{units.si(config.n_params)} parameters"
    if wanted != "auto":
        return MethodChoice(wanted, "as asked", needed(wanted))
    full, lora = needed("full"), needed("lora")
    if config.n_params < SMALL and full <= memory:
        return MethodChoice("full", f"{size} are below {units.si(SMALL)}: full fine-tuning learns most", full)
    why = (
        f"{size} are too many for full fine-tuning to pay"
        if full <= memory
        else (f"full fine-tuning needs {units.nbytes(full)} and {units.nbytes(memory)} are free")
    )
    if lora <= memory or packed_nbytes is None:
        return MethodChoice("lora", why, lora)
    qlora = needed("qlora")
    return MethodChoice(
        "qlora", f"LoRA needs {units.nbytes(lora)} and {units.nbytes(memory)} are free", qlora
    )


def default_lr(config: ModelConfig, method: str, objective: str) -> float:
    """Return the learning rate that `herd tune` uses if none is given, with two digits."""
    rate = FULL_LR * (LR_PARAMS / config.n_params) ** 0.5
    rate *= (LORA_FACTOR if method != "full" else 1) * (DPO_FACTOR if objective == "dpo" else 1)
    return float(f"{rate:.2g}")
