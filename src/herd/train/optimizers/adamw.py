"""AdamW (arXiv 1711.05101) with decay for matrices only: the gains of RMSNorm have no reason to shrink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from ...dtypes import short_name
from ...errors import TrainingError
from ..section import PositiveReal, Section, impossible

if TYPE_CHECKING:
    import torch


class AdamW(Section):
    """AdamW and the clipping of gradients before it."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveReal  # the peak of the schedule
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    eps: PositiveReal = 1e-8
    clip: PositiveReal | None = 1.0  # of the global gradient norm

    @model_validator(mode="after")
    def _betas_are_possible(self) -> AdamW:
        for name, beta in zip(("first", "second"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise impossible("betas", f"the {name} of betas={list(self.betas)} must be in [0, 1)")
        return self

    def build(self, model: torch.nn.Module) -> torch.optim.AdamW:
        """Return fused AdamW over the model's trainable parameters, which must be fp32.

        An update below 2^-8 of a bf16 weight would be lost. The moments are allocated now rather than at the
        first step, so that a resumed run can load directly into them.
        """
        import torch

        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not params:
            raise TrainingError("nothing to train: no parameter of the model requires a gradient")
        for name, param in params.items():
            if param.dtype != torch.float32:
                raise TrainingError(
                    f"{name} is {short_name(param.dtype)}; master weights are fp32: load the model with "
                    "dtype=torch.float32 and set dtype: bf16 in the training configuration"
                )
        groups = [
            {"params": [p for p in params.values() if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in params.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True,
        )
        for param in params.values():
            optimizer.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
            }
        return optimizer
