"""Run calibration text through a model one layer at a time, and measure how important the columns are.

The importance of a column is the mean square of its input: an error of a weight is multiplied by the input.
Only one layer in fp32 and the hidden states of the text are in memory, so the model may be larger than
memory.

Shapes: D columns (inputs), B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..dtypes import torch_dtype
from ..errors import QuantError
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..llama.streamed import StreamedModel
from .formats import BF16, F32
from .linear import assemble_model

Get = Callable[[str], Tensor]
"""A function that reads a parameter by its name."""
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The matrices of a layer in the order of computation. Matrices of one stage have the same input."""


def load_plain(config: ModelConfig, get: Get) -> LlamaLM:
    """Return the whole model with unpacked weights, in bf16 if they are stored so, otherwise in fp32."""
    stored = BF16 if get("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16 else F32
    dtype = torch_dtype(stored.name)

    def rows_of(name: str) -> Tensor:
        weight = get(name).to(dtype).contiguous()
        return weight.view(1 if weight.ndim == 1 else len(weight), -1).view(torch.uint8)

    formats = {name: stored for name, _ in config.param_shapes()}
    return assemble_model(config, formats, rows_of, dtype)


@torch.no_grad()
def measure_importance(
    config: ModelConfig,
    get: Get,
    batches: Sequence[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the mean square of every input of every matrix, (D,) fp32 by parameter.

    ``batches`` are token ids (B, T). The embedding has none unless it is the head too. ``progress`` is called
    with the layers done and their number. Raises `QuantError` without text.
    """
    if not batches:
        raise QuantError("importance is measured on calibration text, and there is none")
    streamed = StreamedModel(LlamaLM.on_meta(config), lambda name: get(name).float())
    n_tokens = sum(ids_BT.numel() for ids_BT in batches)
    totals: dict[str, list[Tensor]] = {}
    for number, layer in enumerate(streamed.model.model.layers):
        for stage in STAGES:
            total = _add_squares(layer.get_submodule(stage[0]))
            totals |= {f"model.layers.{number}.{module}.weight": total for module in stage}
    states_ND = torch.cat([x_BTD.flatten(0, 1) for x_BTD in streamed.hidden(batches, progress)])
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    importance = {name: total[0] / n_tokens for name, total in totals.items()}
    return importance | {head: states_ND.square().mean(0)}


def _add_squares(module: nn.Module) -> list[Tensor]:
    """Return a list whose only item becomes the sum of squared inputs of ``module``, (D,)."""
    total: list[Tensor] = []

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares_D = inputs[0].flatten(0, -2).square().sum(0)
        total[:] = [total[0] + squares_D] if total else [squares_D]

    module.register_forward_pre_hook(add)
    return total
