"""Refuse weights that do not fit in memory before they are read, and say what would fit.

Otherwise the machine would swap for minutes, and then the kernel would kill this process or another one.
"""

from __future__ import annotations

from pathlib import Path

from .. import units
from ..errors import CheckpointError
from ..llama.config import ModelConfig
from ..machine import available_memory
from ..quant.mixtures import mixture


def require_memory(config: ModelConfig, needed: int, where: Path) -> None:
    """Raise `CheckpointError` if ``needed`` bytes are more than the free memory."""
    free = available_memory()
    if needed <= free:
        return
    fitting = fitting_formats(config, free).items()
    choices = " or ".join(f"--to {name} ({units.nbytes(nbytes)})" for name, nbytes in fitting)
    cure = f"herd quantize {choices} would fit" if choices else "take a smaller model or a larger machine"
    raise CheckpointError(
        f"{where}: its weights need {units.nbytes(needed)} of memory, {units.nbytes(free)} are free; {cure}"
    )


def fitting_formats(config: ModelConfig, free: int) -> dict[str, int]:
    """Return the formats of `quantized_nbytes` that fit in ``free`` bytes."""
    return {name: nbytes for name, nbytes in quantized_nbytes(config).items() if nbytes <= free}


def quantized_nbytes(config: ModelConfig) -> dict[str, int]:
    """Return the bytes of all weights by file type, largest first."""
    return {name: mixture(name, config).nbytes(config) for name in ("Q8_0", "Q4_K_M", "Q4_0")}
