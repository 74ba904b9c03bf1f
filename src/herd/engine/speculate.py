"""Verify the draft tokens that a cheap draft proposes, all in one forward of the model, losslessly.

Decoding reads every weight for one token. Verifying k draft tokens reads them once for k + 1 tokens, so a
draft token costs the draft's work, and an accepted one saves a whole read. The rule is speculative sampling
(Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Let p be the model's and q the draft's
distribution, after penalties, constraints, top-k, top-p and min-p:

    a draft token x drawn from q is accepted with probability min(1, p(x) / q(x)),
    the first that is rejected is replaced by a draw from the residual max(p - q, 0), normalized,
    if all are accepted, one more token is drawn from p.

Each token then has exactly the distribution p, whatever the draft. A draft token is accepted with probability
1 - TV(p, q). For a draft token that was not drawn (n-gram lookup, or any draft of a greedy sequence), the
rule is the same, with all of q on one token. Greedy sequences accept draft tokens while they are the most
likely tokens, so their answers are the same as without speculation.

With a seed, the numbers for drafting, verifying and drawing the n-th token of a request are three hashes of
(seed, n), and each decides about at most one token of the answer. So with the same model, draft and number of
draft tokens, a seed gives the same answer, alone and in any batch. Without speculation, or with another
draft, it gives *another* answer from the same distribution. Only greedy answers are identical.

Shapes: N positions that need logits, B sequences at one position, V vocab.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import EngineError
from .request import Speculated
from .sampling import distribution, draw, logprobs, most_likely, sample, uniform
from .stream import Sequence

_DRAFT, _VERIFY = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Added (by XOR) to a sequence's seed, so that drafting, verifying and drawing use independent numbers."""


def draft_uniform(seed: int, step: int) -> float:
    """Return the number in [0, 1) with which the draft draws a request's ``step``-th token."""
    return uniform(seed ^ _DRAFT, step)


def verify_uniform(seed: int, step: int) -> float:
    """Return the number in [0, 1) that decides whether a request's ``step``-th draft token is accepted."""
    return uniform(seed ^ _VERIFY, step)


@dataclass
class DraftTokens:
    """Tokens proposed to follow a sequence.

    ``q`` are the distributions that they were drawn from, (V,) fp64 each, or None if they were not drawn.
    """

    tokens: list[int]
    q: list[Tensor] | None = None

    def at(self, index: int) -> tuple[int | None, Tensor | None]:
        """Return the token at ``index`` and its distribution, or (None, None) after the last token."""
        if index >= len(self.tokens):
            return None, None
        return self.tokens[index], None if self.q is None else self.q[index]


def verify(
    logits_NV: Tensor, sequences: abc.Sequence[Sequence], drafts: abc.Sequence[DraftTokens]
) -> list[int]:
    """Add to each sequence its accepted draft tokens and one more token, and return the numbers accepted.

    ``logits_NV`` has the rows of one sequence after the other: one row for each draft token and one after
    them. A sequence without draft tokens gets one token, so this is plain decoding as well. Each sequence
    ends independently, and fails independently if its constraint cannot be followed or its logits are not
    finite. The number is -1 if the last token of the sequence must be fed again.
    """
    starts = list(accumulate((len(draft.tokens) + 1 for draft in drafts), initial=0))
    n_accepted = [0] * len(sequences)
    going, step = list(range(len(sequences))), 0
    while going:
        raw_BV = logits_NV
        if len(going) < len(logits_NV):
            raw_BV = logits_NV[[starts[i] + step for i in going]]
        processed_BV, best, errors = _process(raw_BV, [sequences[i] for i in going])
        if errors:
            for b, error in errors.items():
                if step < len(drafts[going[b]].tokens):
                    # attention to a damaged draft token can spoil the tokens before it, so feed the last one
                    # again
                    sequences[going[b]].may_draft, n_accepted[going[b]] = False, step - 1
                else:
                    sequences[going[b]].fail(error)
            well = [b for b in range(len(going)) if b not in errors]
            going, best = [going[b] for b in well], [best[b] for b in well]
            raw_BV, processed_BV = raw_BV[well], processed_BV[well]
        if not going:
            break
        some, proposed = [sequences[i] for i in going], [drafts[i].at(step) for i in going]
        accepted, tokens = _pick(processed_BV, best, some, proposed)
        lps = logprobs(raw_BV, tokens, [sequence.sampling.logprobs for sequence in some])
        still = []
        for i, (draft_token, _), ok, token, lp in zip(going, proposed, accepted, tokens, lps, strict=True):
            if draft_token is not None:
                sequences[i].record_draft(Speculated(verified=1, accepted=int(ok)))
            n_accepted[i] += ok
            try:
                if not sequences[i].take(token, lp) and ok:
                    still.append(i)
            except Exception as error:
                sequences[i].fail(_own_error(error))
        going, step = still, step + 1
    return n_accepted


def _process(
    raw_BV: Tensor, sequences: abc.Sequence[Sequence]
) -> tuple[Tensor, list[int], dict[int, EngineError]]:
    """Return processed logits, the most likely token of each sequence, and the errors of those that fail."""
    errors: dict[int, EngineError] = {}
    processed_BV = raw_BV
    if any(sequence.logits_processor.active for sequence in sequences):
        processed_BV = raw_BV.clone()
        for b, sequence in enumerate(sequences):
            try:
                sequence.logits_processor.process(processed_BV[b])
            except Exception as error:
                errors[b] = _own_error(error)
    best, finite = most_likely(processed_BV)
    for b, ok in enumerate(finite):
        if not ok:
            problem = (
                "the model's logits are not finite numbers: its weights are damaged or its training diverged"
            )
            errors.setdefault(b, EngineError(problem))
    return processed_BV, best, errors


def _own_error(error: Exception) -> EngineError:
    """Return the error of one request whose logits could not be processed, or whose token not be added."""
    if isinstance(error, EngineError):
        return error
    return EngineError(
        f"this answer cannot be continued: {type(error).__name__}: {' '.join(str(error).split())}"
    )


def _pick(
    logits_BV: Tensor,
    best: abc.Sequence[int],
    sequences: abc.Sequence[Sequence],
    proposed: abc.Sequence[tuple[int | None, Tensor | None]],
) -> tuple[list[bool], list[int]]:
    """Decide one position of every sequence: return whether its draft token is accepted, and its token."""
    accepted, tokens = [False] * len(sequences), list(best)
    # greedy sequences and those without a draft token are sampled, the others follow the rejection rule
    sampled = [b for b, s in enumerate(sequences) if s.sampling.greedy or proposed[b][0] is None]
    verified = [b for b in range(len(sequences)) if b not in sampled]
    if sampled:
        some = [sequences[b] for b in sampled]
        picked = sample(
            logits_BV[sampled] if verified else logits_BV,
            [best[b] for b in sampled],
            [s.sampling for s in some],
            [s.seed for s in some],
            [s.n_new for s in some],
        )
        for b, token in zip(sampled, picked, strict=True):
            accepted[b], tokens[b] = token == proposed[b][0], token
    if verified:
        some = [sequences[b] for b in verified]
        p_BV = distribution(logits_BV[verified], [s.sampling for s in some])
        draft_tokens = [draft for b in verified if (draft := proposed[b][0]) is not None]
        q_BV = one_hot(draft_tokens, p_BV)
        for j, b in enumerate(verified):
            if (q_V := proposed[b][1]) is not None:
                q_BV[j] = q_V
        u_verify = [verify_uniform(s.seed, s.n_new) for s in some]
        u_draw = [uniform(s.seed, s.n_new) for s in some]
        decisions = reject(p_BV, q_BV, draft_tokens, u_verify, u_draw)
        for b, ok, token in zip(verified, *decisions, strict=True):
            accepted[b], tokens[b] = ok, token
    return accepted, tokens


def reject(
    p_BV: Tensor,
    q_BV: Tensor,
    draft_tokens: abc.Sequence[int],
    u_verify: abc.Sequence[float],
    u_draw: abc.Sequence[float],
) -> tuple[list[bool], list[int]]:
    """Apply the rejection rule to draft tokens that were drawn from ``q_BV``.

    Returns whether each is accepted, and the token of each sequence: the draft token or its replacement.
    """
    device = p_BV.device
    draft_B1 = torch.tensor(draft_tokens, device=device)[:, None]
    u_B = torch.tensor(u_verify, dtype=torch.float64, device=device)
    accepted_B = u_B * q_BV.gather(1, draft_B1)[:, 0] < p_BV.gather(1, draft_B1)[:, 0]
    residual_BV = (p_BV - q_BV).clamp_(min=0)
    # if p = q up to rounding, hardly anything is rejected, and the limit of the residual is p itself
    empty_B1 = residual_BV.sum(-1, keepdim=True) <= 0
    replacement_B = draw(torch.where(empty_B1, p_BV, residual_BV), u_draw)
    return accepted_B.tolist(), torch.where(accepted_B, draft_B1[:, 0], replacement_B).tolist()


def one_hot(tokens: abc.Sequence[int], like_BV: Tensor) -> Tensor:
    """Return distributions with all their mass on these tokens, (B, V)."""
    return torch.zeros_like(like_BV).scatter_(1, torch.tensor(tokens, device=like_BV.device)[:, None], 1.0)
