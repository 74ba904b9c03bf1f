"""Weights that do not fit in memory are refused before they are read, with the numbers and with what would fit.

The alternative is worse for everybody: the machine swaps for minutes, then the kernel kills the process, or another.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, QuantError
from ..llama.config import ModelConfig
from ..machine import available_memory as free_bytes
from ..quant.formats import scheme


def require_memory(config: ModelConfig, needed: int, where: Path) -> None:
    """`CheckpointError` when ``needed`` bytes of weights are more than the memory that is free."""
    free = free_bytes()
    if needed <= free:
        return
    fitting = [
        f"--to {name} ({nbytes / 1e9:.1f} GB)" for name, nbytes in fitting_formats(config, free).items()
    ]
    cure = (
        f"herd quantize {' or '.join(fitting)} would fit"
        if fitting
        else "take a smaller model or a larger machine"
    )
    raise CheckpointError(
        f"{where}: its weights need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; {cure}"
    )


def fitting_formats(config: ModelConfig, free: int) -> dict[str, int]:
    """The part of `quantized_nbytes` that ``free`` bytes hold."""
    return {name: nbytes for name, nbytes in quantized_nbytes(config).items() if nbytes <= free}


def quantized_nbytes(config: ModelConfig) -> dict[str, int]:
    """Bytes of all weights by short name of the format, largest first; formats the shape does not divide into are left
    out."""
    out: dict[str, int] = {}
    for name in ("q8", "q4k", "q4"):
        try:
            out[name] = scheme(name).nbytes(config)
        except QuantError:
            continue
    return out
