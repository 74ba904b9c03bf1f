"""Pick tokens from logits for a whole batch, with the same result for each row as if it were alone.

Randomness is counter-based: the number drawn for a request's n-th token is a hash of (seed, n), so a
request's tokens depend neither on the other rows nor on the time of its start (SplitMix64: Steele, Lea &
Flood, OOPSLA 2014). The token is found by inverting the cumulative distribution. Top-k, top-p and min-p all
keep a prefix of the tokens sorted by probability, so one sort serves the three. Penalties and constraints
have already been applied to the logits (`logits.py`). Speculation compares whole distributions
(`distribution`, `speculate.py`).

Shapes: B batch rows, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .request import Sampling, TokenLogprob

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sample(
    logits_BV: Tensor,
    best: Sequence[int],
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    steps: Sequence[int],
) -> list[int]:
    """Return one token id for each row of ``logits_BV`` (fp32).

    Forbidden tokens have a logit of -inf, and every row has a finite one. ``best`` are the most likely tokens
    of the rows, and ``steps`` the number of tokens that each request has so far.
    """
    ids = list(best)
    drawn = [i for i, s in enumerate(samplings) if not s.greedy]
    for rows, cut in ((r, c) for c in (False, True) if (r := [i for i in drawn if _cuts(samplings[i]) == c])):
        u = [uniform(seeds[i], steps[i]) for i in rows]
        chosen = [samplings[i] for i in rows]
        picked = _draw_cut(logits_BV[rows], chosen, u) if cut else draw(_probs(logits_BV[rows], chosen), u)
        for i, token in zip(rows, picked.tolist(), strict=True):
            ids[i] = token
    return ids


def most_likely(logits_BV: Tensor) -> tuple[list[int], list[bool]]:
    """Return the most likely token of each row (the lowest id in a tie), and whether its logit is finite.

    It is not finite if the row has a NaN or +inf, or only -inf, since argmax prefers a NaN and then +inf.
    """
    best_B = logits_BV.argmax(-1)
    finite_B = torch.isfinite(logits_BV.gather(1, best_B[:, None])[:, 0])
    best, finite = torch.stack((best_B, finite_B.long())).tolist()
    return best, [bool(ok) for ok in finite]


def distribution(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return the probabilities of `sample`, (B, V) fp64. The temperatures must be above 0."""
    p_BV = _probs(logits_BV, samplings)
    cut = [i for i, s in enumerate(samplings) if _cuts(s)]
    if cut:
        sorted_CV, order_CV, kept_C1 = _kept(p_BV[cut], [samplings[i] for i in cut])
        sorted_CV[torch.arange(p_BV.shape[1], device=p_BV.device) >= kept_C1] = 0
        sorted_CV /= sorted_CV.sum(-1, keepdim=True)
        p_BV[cut] = torch.zeros_like(sorted_CV).scatter_(1, order_CV, sorted_CV)
    return p_BV


def draw(p_BV: Tensor, u: Sequence[float]) -> Tensor:
    """Return the first token of each row whose cumulative mass exceeds u times the sum of the row, (B,)."""
    cdf_BV = p_BV.cumsum(-1)
    return _invert(cdf_BV, cdf_BV[:, -1:], u)


def uniform(seed: int, step: int) -> float:
    """Return the number in [0, 1), with 53 random bits, that belongs to (seed, step)."""
    return (_mix((_mix(seed & _MASK) + (step + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def seed_of(seed: int, number: int) -> int:
    """Return the seed of the ``number``-th answer to a request. The first has the request's own seed."""
    return seed if number == 0 else _mix(_mix(seed & _MASK) ^ number)


def logprobs(
    logits_BV: Tensor, ids: Sequence[int], tops: Sequence[int | None]
) -> list[tuple[TokenLogprob, ...]]:
    """Return the log-probabilities of the chosen ids under the plain softmax.

    ``tops`` has, for each row, the number of most likely tokens to return as well, or None for no
    log-probabilities.
    """
    out: list[tuple[TokenLogprob, ...]] = [()] * len(ids)
    rows = [i for i, top in enumerate(tops) if top is not None]
    if not rows:
        return out
    logp_BV = torch.log_softmax(logits_BV[rows], dim=-1)
    most = max(tops[i] or 0 for i in rows)
    best_values, best_ids = (x.tolist() for x in logp_BV.topk(most, dim=-1))
    for j, i in enumerate(rows):
        n = tops[i] or 0
        top = tuple(zip(best_ids[j][:n], best_values[j][:n], strict=True))
        out[i] = (TokenLogprob(ids[i], float(logp_BV[j, ids[i]]), top),)
    return out


def _mix(z: int) -> int:
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _cuts(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1 or s.min_p > 0


def _probs(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return the softmax at each row's temperature, computed from differences to the row's best logit."""
    temperature_B1 = torch.tensor(
        [[s.temperature] for s in samplings], dtype=torch.float64, device=logits_BV.device
    )
    shifted_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double()
    return torch.softmax(shifted_BV / temperature_B1, dim=-1)


def _draw_cut(logits_BV: Tensor, samplings: Sequence[Sampling], u: Sequence[float]) -> Tensor:
    p_BV, order_BV, kept_B1 = _kept(_probs(logits_BV, samplings), samplings)
    cdf_BV = p_BV.cumsum(-1)
    index_B = _invert(cdf_BV, cdf_BV.gather(1, kept_B1 - 1), u)
    return order_BV.gather(1, index_B[:, None])[:, 0]


def _kept(p_BV: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's probabilities in descending order, their token ids, and the number of tokens kept."""
    p_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    V = p_BV.shape[1]
    cdf_BV = p_BV.cumsum(-1)
    kept_B1 = _column([s.top_k or V for s in samplings], torch.int64, p_BV)
    # top-p applies to the renormalized result of top-k: tokens whose mass *before* them is below top_p
    top_p_B1 = _column([s.top_p for s in samplings], torch.float64, p_BV)
    before_BV = (cdf_BV - p_BV) / cdf_BV.gather(1, kept_B1 - 1)
    n_top_p_B1 = (before_BV < top_p_B1).sum(-1, keepdim=True)
    kept_B1 = torch.where(top_p_B1 < 1, torch.minimum(kept_B1, n_top_p_B1), kept_B1)
    min_p_B1 = _column([s.min_p for s in samplings], torch.float64, p_BV)
    kept_B1 = torch.minimum(kept_B1, (p_BV >= min_p_B1 * p_BV[:, :1]).sum(-1, keepdim=True)).clamp_(min=1)
    return p_BV, order_BV, kept_B1


def _invert(cdf_BV: Tensor, total_B1: Tensor, u: Sequence[float]) -> Tensor:
    """Return the first index whose cumulative mass exceeds u · total. Its probability is positive."""
    u_B1 = torch.tensor(u, dtype=torch.float64, device=cdf_BV.device)[:, None]
    # u · total may round up to total itself
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    return torch.searchsorted(cdf_BV, torch.minimum(u_B1 * total_B1, below_B1), right=True)[:, 0]


def _column(values: list, dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
