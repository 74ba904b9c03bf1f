"""The section ``adapter`` of a recipe: train low-rank adapters (LoRA) on a frozen model, plain or packed.

The frozen matrices are kept in the compute dtype, or in the blocks of a quantized model (QLoRA, arXiv
2305.14314). A state and the result have only the adapters. Constants as in "LoRA without regret": all
linear layers, alpha 32, and ten times the learning rate of full fine-tuning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from ..errors import RecipeError
from .section import Count, Positive, PositiveReal, Section, impossible

if TYPE_CHECKING:
    import torch

    from ..llama.model import LlamaLM

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
_ALL: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterSection(Section):
    """LoRA adapters of one rank on the linear layers named in ``targets``."""

    kind: Literal["lora"] = "lora"
    rank: Positive = 16
    alpha: PositiveReal = 32.0  # the update is scaled by alpha / rank
    rslora: bool = False  # scale by alpha / sqrt(rank) instead: for ranks above 64
    dora: bool = False  # train the lengths of the rows of the adapted weights too
    targets: Annotated[tuple[Target, ...], Field(min_length=1, strict=False)] = _ALL
    new_rows: Count = 0  # train the last rows of the vocabulary too (the result is then a whole model)
    packed: bool = False  # keep the blocks of a quantized model (QLoRA) instead of unpacking them

    @model_validator(mode="after")
    def _rows_are_plain(self) -> AdapterSection:
        if self.new_rows and (self.packed or "lm_head" in self.targets):
            raise impossible(
                "new_rows", "they need a plain vocabulary: no packed base, no adapter on lm_head"
            )
        return self

    def load(self, source: str, seed: int, compute: torch.dtype, device: torch.device) -> LlamaLM:
        """Return the model ``source`` with new adapters in fp32, the only parameters that require gradients.

        Raises `RecipeError` if ``packed`` is asked for a model without packed weights.
        """
        import torch

        from ..checkpoint import load_model, load_trainable
        from ..llama.lora import add_lora, scale_of
        from ..llama.new_rows import train_new_rows
        from ..quant.linear import is_quantized, use_exact_products

        if self.packed:
            model = load_model(source, dtype=torch.float32, device=device)
            if not is_quantized(model):
                raise RecipeError(
                    f"{source}: its weights are not packed; quantize it first (herd quantize {source} --to "
                    "q4k), or train plain adapters (--method lora, in a recipe adapter.packed: false)"
                )
            use_exact_products(model)
        else:
            # they never change, and autocast would cast them in every forward
            model = load_trainable(source, torch.float32, device, layers=compute)
        scale = scale_of(self.rank, self.alpha, rslora=self.rslora)
        add_lora(model, self.rank, scale, self.targets, seed=seed, dora=self.dora)
        return train_new_rows(model, self.new_rows) if self.new_rows else model
