"""What bends a row's logits before a token is picked: penalties, biases, and the constraint's mask.

All of it depends on the request and its own tokens only, so a row gets the same logits alone and in any batch.
Speculation asks about places that may never be: it pushes guessed tokens, looks, and takes them back.

Shapes: V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .constraint import Guide
from .request import Sampling


class Rules:
    """The rules of one request. ``guide`` None: unconstrained."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], vocab_size: int, guide: Guide | None) -> None:
        self.guide, self._sampling = guide, sampling
        self._counts_V: Tensor | None = None  # how often each token came in the answer
        if sampling.bends:
            self._counts_V = torch.zeros(vocab_size)
            self._prompted_V = torch.zeros(vocab_size, dtype=torch.bool)
            self._prompted_V[list(prompt_ids)] = True
        self._biased = list(sampling.logit_bias)
        self._biases = torch.tensor([float(x) for x in sampling.logit_bias.values()])

    @property
    def complete(self) -> bool:
        """The constraint allows nothing more."""
        return self.guide is not None and self.guide.complete

    def apply(self, logits_V: Tensor) -> None:
        """Bend the logits (V,) fp32 of the place after all pushed tokens, in place."""
        device, s = logits_V.device, self._sampling
        if self._counts_V is not None:
            counts_V = self._counts_V.to(device)
            if s.repetition_penalty != 1:
                seen_V = self._prompted_V.to(device) | (counts_V > 0)
                factor_V = torch.where(logits_V > 0, 1 / s.repetition_penalty, s.repetition_penalty)
                logits_V *= torch.where(seen_V, factor_V, 1.0)
            logits_V -= s.frequency_penalty * counts_V + s.presence_penalty * (counts_V > 0)
        if self._biased:
            logits_V[self._biased] += self._biases.to(device)
        if self.guide is not None:
            allowed_v = self.guide.allowed().to(device)
            logits_V[: len(allowed_v)].masked_fill_(~allowed_v, -torch.inf)
            logits_V[len(allowed_v) :] = -torch.inf

    def push(self, tokens: Sequence[int]) -> None:
        """``tokens`` were said."""
        self._count(tokens, 1)
        if self.guide is not None:
            self.guide.push(tokens)

    def pop(self, tokens: Sequence[int]) -> None:
        """The last tokens, which are ``tokens``, were not said after all."""
        self._count(tokens, -1)
        if self.guide is not None:
            self.guide.pop(len(tokens))

    def _count(self, tokens: Sequence[int], sign: int) -> None:
        if self._counts_V is not None:
            for token in tokens:
                self._counts_V[token] += sign
