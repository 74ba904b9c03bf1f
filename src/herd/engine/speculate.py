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

Shapes: N places whose next token is wanted, B rows looked at together, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import EngineError
from .request import Speculated
from .sampling import distribution, draw, likeliest, logprobs, sample, uniform

if TYPE_CHECKING:
    from .stream import Row

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


def settle(logits_NV: Tensor, rows: Sequence[Row], guesses: Sequence[Guess]) -> list[int]:
    """Hand each row its next tokens: the guesses that stay and one more. Returns how many stayed, row by row.

    ``logits_NV`` has, row after row, a place for each guess and one behind them. A row without guesses gets one token,
    so this is plain decoding as well. Rows end, and fail by their own constraint, one by one.
    """
    starts = list(accumulate((len(guess.tokens) + 1 for guess in guesses), initial=0))
    kept = [0] * len(rows)
    going, t = list(range(len(rows))), 0
    while going:
        raw_BV = logits_NV[[starts[i] + t for i in going]]
        bent_BV, going, raw_BV = _bend(raw_BV, rows, going)
        if not going:
            break
        some, at = [rows[i] for i in going], [_at(guesses[i], t) for i in going]
        stays, tokens = _pick(bent_BV, some, at)
        lps = logprobs(raw_BV, tokens, [row.sampling.logprobs for row in some])
        still = []
        for i, (guess, _), stay, token, lp in zip(going, at, stays, tokens, lps, strict=True):
            if guess is not None:
                rows[i].count(Speculated(judged=1, kept=int(stay)))
            kept[i] += stay
            try:
                if not rows[i].take(token, lp) and stay:
                    still.append(i)
            except EngineError as error:
                rows[i].stream.fail(error)
        going, t = still, t + 1
    return kept


def _at(guess: Guess, t: int) -> tuple[int | None, Tensor | None]:
    """The guess for place ``t`` and what it was drawn from; (None, None) behind the last."""
    if t >= len(guess.tokens):
        return None, None
    return guess.tokens[t], None if guess.q is None else guess.q[t]


def _bend(raw_BV: Tensor, rows: Sequence[Row], going: list[int]) -> tuple[Tensor, list[int], Tensor]:
    """(logits under each row's rules, the rows that could follow theirs, their logits as they were)."""
    if not any(rows[i].rules for i in going):
        return raw_BV, going, raw_BV
    bent_BV, well = raw_BV.clone(), []
    for b, i in enumerate(going):
        try:
            if (rules := rows[i].rules) is not None:
                rules.apply(bent_BV[b])
            well.append(b)
        except EngineError as error:
            rows[i].stream.fail(error)
    return bent_BV[well], [going[b] for b in well], raw_BV[well]


def _pick(
    logits_BV: Tensor, rows: Sequence[Row], guesses: Sequence[tuple[int | None, Tensor | None]]
) -> tuple[list[bool], list[int]]:
    """(whether each guess stays, each row's token) at one place of every row."""
    stays, tokens = [False] * len(rows), [0] * len(rows)
    drawn = [
        guess is not None and not row.sampling.greedy for row, (guess, _) in zip(rows, guesses, strict=True)
    ]
    judged, others = ([b for b, yes in enumerate(drawn) if yes == wanted] for wanted in (True, False))
    if others:
        samplings, seeds, steps = zip(
            *((rows[b].sampling, rows[b].seed, rows[b].n_new) for b in others), strict=True
        )
        for b, token in zip(others, sample(logits_BV[others], samplings, seeds, steps), strict=True):
            stays[b], tokens[b] = token == guesses[b][0], token
    if judged:
        likeliest(logits_BV[judged])  # refuses what is no number
        p_BV = distribution(logits_BV[judged], [rows[b].sampling for b in judged])
        guessed = [guess for b in judged if (guess := guesses[b][0]) is not None]
        q_BV = certain(guessed, p_BV)
        for j, b in enumerate(judged):
            if (q_V := guesses[b][1]) is not None:
                q_BV[j] = q_V
        u = [
            (judge_uniform(rows[b].seed, rows[b].n_new), uniform(rows[b].seed, rows[b].n_new)) for b in judged
        ]
        found = judge(p_BV, q_BV, guessed, [x for x, _ in u], [x for _, x in u])
        for b, stay, token in zip(judged, *found, strict=True):
            stays[b], tokens[b] = stay, token
    return stays, tokens


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


def tokens_a_round(acceptance: float, k: int) -> float:
    """Expected tokens of a round with k guesses, each kept with probability ``acceptance``: (1 - a^(k+1)) / (1 - a)
    (Leviathan et al., section 3.2)."""
    return k + 1 if acceptance == 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


def speed_up(acceptance: float, k: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Expected speed-up over plain decoding with k guesses a round.

    ``draft_cost`` is a draft's forward, ``verify_cost`` the check of k + 1 rows, both in plain decode steps; the paper
    takes the latter for 1.
    """
    return tokens_a_round(acceptance, k) / (verify_cost + k * draft_cost)
