"""Process a sequence's logits before a token is picked: penalties, biases and the mask of its constraint.

The result depends only on the request and its own tokens, so a sequence gets the same logits alone and in any
batch. To process logits after draft tokens, which may be rejected, speculation pushes them and later pops
them.

Shapes: V vocab, S tokens seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .constraint import Guide
from .request import Sampling


class LogitsProcessor:
    """The penalties, biases and constraint of one request, and the tokens of its answer so far.

    ``guide`` follows the constraint (None: unconstrained). ``active`` is False if nothing changes the logits.
    Tokens are then not counted.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], guide: Guide | None) -> None:
        self._guide, self._sampling = guide, sampling
        self.active = guide is not None or sampling.changes_logits
        self._prompt = set(prompt_ids) if sampling.repetition_penalty != 1 else set()
        self._answer = Counter[int]()

    @property
    def complete(self) -> bool:
        """Whether the answer is complete under its constraint and nothing more can follow."""
        return self._guide is not None and self._guide.complete

    @property
    def failed(self) -> bool:
        """Whether the constraint's parser failed, so that no further token can be checked."""
        return self._guide is not None and self._guide.failed

    def process(self, logits_V: Tensor) -> None:
        """Change the logits (V,) fp32 for the token after all pushed ones, in place."""
        s = self._sampling
        if s.repetition_penalty != 1 and (seen := list(self._prompt | self._answer.keys())):
            seen_S = logits_V[seen]
            logits_V[seen] = torch.where(
                seen_S > 0, seen_S / s.repetition_penalty, seen_S * s.repetition_penalty
            )
        if self._answer and (s.presence_penalty or s.frequency_penalty):
            penalties = [s.presence_penalty + s.frequency_penalty * n for n in self._answer.values()]
            logits_V[list(self._answer)] -= torch.tensor(penalties, device=logits_V.device)
        if s.logit_bias:
            biases = [float(x) for x in s.logit_bias.values()]
            logits_V[list(s.logit_bias)] += torch.tensor(biases, device=logits_V.device)
        if self._guide is not None:
            allowed_v = self._guide.allowed().to(logits_V.device)
            logits_V[: len(allowed_v)].masked_fill_(~allowed_v, -torch.inf)
            logits_V[len(allowed_v) :] = -torch.inf

    def push(self, tokens: Sequence[int]) -> None:
        """Add ``tokens`` to the answer."""
        if self.active:
            self._answer.update(tokens)
            if self._guide is not None:
                self._guide.push(tokens)

    def pop(self, tokens: Sequence[int]) -> None:
        """Remove ``tokens`` from the end of the answer. They must be its last tokens."""
        if self.active:
            self._answer.subtract(tokens)
            self._answer = +self._answer  # drops zero counts
            if self._guide is not None:
                self._guide.pop(len(tokens))
