"""What bends a row's logits before a token is picked: penalties, biases, and the constraint's mask.

All of it depends on the request and its own tokens only, so a row gets the same logits alone and in any batch.
Speculation asks about places that may never be: it pushes guessed tokens, looks, and takes them back.

Shapes: V vocab, S tokens seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .constraint import Guide
from .request import Sampling


class Rules:
    """The rules of one request. ``guide`` None: unconstrained."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], guide: Guide | None) -> None:
        self.guide, self._sampling = guide, sampling
        self._prompted = set(prompt_ids) if sampling.repetition_penalty != 1 else set()
        self._said = Counter[int]()

    @property
    def complete(self) -> bool:
        """The constraint allows nothing more."""
        return self.guide is not None and self.guide.complete

    @property
    def failed(self) -> bool:
        """The constraint cannot be followed any further."""
        return self.guide is not None and self.guide.failed

    def apply(self, logits_V: Tensor) -> None:
        """Bend the logits (V,) fp32 of the place after all pushed tokens, in place."""
        s = self._sampling
        if s.repetition_penalty != 1 and (seen := list(self._prompted | self._said.keys())):
            seen_S = logits_V[seen]
            logits_V[seen] = torch.where(
                seen_S > 0, seen_S / s.repetition_penalty, seen_S * s.repetition_penalty
            )
        if self._said and (s.presence_penalty or s.frequency_penalty):
            penalties = [s.presence_penalty + s.frequency_penalty * n for n in self._said.values()]
            logits_V[list(self._said)] -= torch.tensor(penalties, device=logits_V.device)
        if s.logit_bias:
            biases = [float(x) for x in s.logit_bias.values()]
            logits_V[list(s.logit_bias)] += torch.tensor(biases, device=logits_V.device)
        if self.guide is not None:
            allowed_v = self.guide.allowed().to(logits_V.device)
            logits_V[: len(allowed_v)].masked_fill_(~allowed_v, -torch.inf)
            logits_V[len(allowed_v) :] = -torch.inf

    def push(self, tokens: Sequence[int]) -> None:
        """``tokens`` were said."""
        self._said.update(tokens)
        if self.guide is not None:
            self.guide.push(tokens)

    def pop(self, tokens: Sequence[int]) -> None:
        """The last tokens, which are ``tokens``, were not said after all."""
        self._said.subtract(tokens)
        self._said = +self._said  # without zeros
        if self.guide is not None:
            self.guide.pop(len(tokens))
