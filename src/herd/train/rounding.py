"""The section ``rounding`` of a recipe: train weights as a block format stores them, and write them in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .section import Section

if TYPE_CHECKING:
    from ..llama.config import ModelConfig
    from ..llama.model import LlamaLM
    from ..quant.formats import Scheme
    from ..quant.straight_through import StraightThrough


class RoundingSection(Section):
    """The formats of the weights: a name for `herd quantize --to`. The result is a GGUF file of them."""

    to: str

    def scheme(self, config: ModelConfig) -> Scheme:
        """Return the format of every parameter. Raises `QuantError` for unknown names and uneven rows."""
        from ..quant.mixtures import named_scheme

        chosen = named_scheme(self.to, config)
        chosen.plan(config)
        return chosen

    def build(self, model: LlamaLM) -> StraightThrough:
        """Return the rounding of a model, whose grids are fitted to the weights that it has now."""
        from ..quant.straight_through import StraightThrough

        return StraightThrough(dict(model.named_parameters()), self.scheme(model.config).plan(model.config))
