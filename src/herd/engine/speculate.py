"""Several tokens a forward: a cheap draft guesses, the model checks all guesses at once, and nothing is lost.

Decoding reads every weight for one token. Checking k guessed tokens reads them once for k + 1 rows, so a guess costs
the draft's work and a right one saves a whole read. Which guesses stay is the rejection rule of speculative sampling
(Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). With p the model's and q the draft's distribution,
cuts, penalties and constraints included:

    a guess x drawn from q stays with probability min(1, p(x) / q(x));
    the first that does not stay is replaced by a draw from the residual max(p - q, 0), normalized;
    if all stay, one more token is drawn from p.

Each token is then distributed exactly as p says, whatever the draft; a guess stays with probability 1 - TV(p, q). A
certain guess (n-gram lookup, or any draft of a greedy row) is the same rule with all of q on one token. Greedy rows
keep guesses while they are the likeliest token, so their tokens are the same as without speculation.

What a seed promises here. The numbers for guessing, judging and drawing a request's n-th token are three hashes of
(seed, n), and each is consulted for at most one guess that counts. So with the same model, draft and number of
guesses a seed gives the same tokens, alone and in any batch. Without speculation, or with another draft, it gives
*other* tokens of the same distribution: the rule keeps the distribution, and only greedy rows keep the very tokens.

Shapes: B rows judged together, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import draw, uniform

_GUESS, _JUDGE = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Two seeds of a row's own, so that guessing, judging and drawing are independent."""


def guess_uniform(seed: int, step: int) -> float:
    """The number with which the draft draws its guess for a request's ``step``-th token."""
    return uniform(seed ^ _GUESS, step)


def judge_uniform(seed: int, step: int) -> float:
    """The number that decides whether that guess stays."""
    return uniform(seed ^ _JUDGE, step)


@dataclass
class Guess:
    """Tokens proposed to follow a row. ``q`` holds the distribution (V,) fp64 each was drawn from; None: certain."""

    tokens: list[int]
    q: list[Tensor] | None = None


def judge(
    p_BV: Tensor, q_BV: Tensor, guesses: Sequence[int], u_judge: Sequence[float], u_draw: Sequence[float]
) -> tuple[list[bool], list[int]]:
    """(which guesses stay, the token of each row: its guess, or what replaces it). ``q_BV`` drew the guesses."""
    device = p_BV.device
    guess_B1 = torch.tensor(guesses, device=device)[:, None]
    u_B = torch.tensor(u_judge, dtype=torch.float64, device=device)
    stays_B = u_B * q_BV.gather(1, guess_B1)[:, 0] < p_BV.gather(1, guess_B1)[:, 0]
    residual_BV = (p_BV - q_BV).clamp_(min=0)
    # p = q up to rounding: a guess hardly ever falls, and if so p itself is the residual's limit
    empty_B1 = residual_BV.sum(-1, keepdim=True) <= 0
    replacement_B = draw(torch.where(empty_B1, p_BV, residual_BV), u_draw)
    return stays_B.tolist(), torch.where(stays_B, guess_B1[:, 0], replacement_B).tolist()


def certain(guesses: Sequence[int], like_BV: Tensor) -> Tensor:
    """q (B, V) of guesses that were not drawn: all mass on each."""
    return torch.zeros_like(like_BV).scatter_(1, torch.tensor(guesses, device=like_BV.device)[:, None], 1.0)


def speed_up(acceptance: float, k: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Expected speed-up over plain decoding with k guesses a round, each kept with probability ``acceptance``.

    A round gives (1 - a^(k+1)) / (1 - a) tokens (Leviathan et al., section 3.2). ``draft_cost`` is a draft's forward,
    ``verify_cost`` the check of k + 1 rows, both in plain decode steps; the paper takes the latter for 1.
    """
    tokens = k + 1 if acceptance == 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)
    return tokens / (verify_cost + k * draft_cost)
