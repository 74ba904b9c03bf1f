"""Formulas for the number of users that a machine can serve, and for the speed-up by a draft model.

**Batching.** Requests of P prompt and A answer tokens arrive at a rate λ. The engine decodes B of them
together. A request costs a prefill of S_p seconds, during which the others mostly wait, and A steps of S_d(B)
seconds. In steady state

    B = λ · (time a request stays) = λ · (S_p + A · S_d(B) / (1 - ρ)),   ρ = λ · S_p

by Little's law, where ρ is the fraction of time spent in prefill. The prefill queue is M/D/1: its mean wait
is ρ S_p / (2 (1 - ρ)), and the 95th percentile is about three times the mean (exponential tail). ``users``
who read an answer and think for Z seconds before the next request make λ = users / (Z + time).

**Speculation.** A draft model proposes k tokens, each accepted with probability α. One forward pass of the
target verifies all of them and yields one more. The expected number of tokens per pass is
(1 - α^(k+1)) / (1 - α). A round costs k c + v(k) target steps, where c is the time of a draft step and v(k)
that of verifying k + 1 tokens, both in target steps (Leviathan et al., arXiv 2211.17192, theorem 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..engine.memory import nbytes as kv_nbytes
from ..errors import PlanError
from ..kernels.page_layout import BYTES
from ..llama.config import ModelConfig
from .ways import USUAL_KV, Target, Way, WeightFormat, plan_way

TAIL = 3.0
"""Ratio of the 95th percentile of an exponential distribution to its mean: -ln 0.05."""
MAX_BATCH = 1024


@dataclass(frozen=True)
class Load:
    """The load of a service: number of users, tokens of prompt and answer, seconds between requests."""

    users: int
    prompt: int
    answer: int
    think: float = 30.0


@dataclass(frozen=True)
class Served:
    """The steady state of one of ``replicas`` machines that share the users of a load.

    ``batch`` is the mean number of requests in the engine, ``tpot`` the seconds per output token,
    ``prefill_share`` the fraction of time in prefill. ``stable`` is False if requests arrive faster than they
    can be served.
    """

    way: Way
    replicas: int
    answer: int
    stable: bool
    batch: float
    requests_per_s: float
    ttft_mean: float
    ttft_p95: float
    tpot: float
    prefill_share: float
    fits: bool
    most_batch: int

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens per second of all replicas together."""
        return self.replicas * self.requests_per_s * self.answer

    def rank(self, p95_ttft: float) -> tuple:
        """Return the sort key of the results: those that serve the load first, by increasing loss."""
        kld = self.way.weights.kld
        return not self.meets(p95_ttft), not self.fits, kld is None, kld or 0.0, self.ttft_p95

    def meets(self, p95_ttft: float) -> bool:
        """Return whether the load fits in memory and is served within ``p95_ttft`` seconds."""
        return self.stable and self.fits and self.ttft_p95 <= p95_ttft


class _State(NamedTuple):
    batch: float = math.inf
    ttft: float = math.inf
    tpot: float = math.inf
    stay: float = math.inf  # seconds from a request to the end of its answer


def predict_serving(
    target: Target, config: ModelConfig, weights: WeightFormat, load: Load, replicas: int = 1
) -> Served:
    """Predict serving with one weight format. Raises `PlanError` if a request exceeds the model's context."""
    context = load.prompt + load.answer
    single = plan_way(target, config, weights, USUAL_KV, context)
    most = 0
    if single.spare > 0:
        most = int(single.spare // kv_nbytes(config, 1, context, BYTES[USUAL_KV]))
    if most < 1:
        inf = math.inf
        return Served(single, replicas, load.answer, False, 0, 0, inf, inf, inf, 1, False, 0)
    prefill = target.prefill(config, weights, USUAL_KV, load.prompt)
    middle = load.prompt + load.answer // 2

    def step_seconds(batch: float) -> float:
        """Return the seconds of a step. A fractional batch is interpolated between whole ones."""
        low = max(1, min(math.floor(batch), MAX_BATCH))
        first, second = (target.decode(config, weights, USUAL_KV, middle, n) for n in (low, low + 1))
        return first + (second - first) * (max(batch, 1.0) - low)

    def steady_state(rate: float) -> _State:
        """Return the state at ``rate`` requests per second, by fixed-point iteration."""
        busy = rate * prefill
        if busy >= 1:
            return _State()
        batch = 1.0
        for _ in range(60):
            tpot = step_seconds(batch) / (1 - busy)
            after = rate * load.answer * tpot
            if after > MAX_BATCH:
                return _State()
            if abs(after - batch) < 1e-3 * max(batch, 1e-9):
                break
            batch = (batch + after) / 2
        wait = busy * prefill / (2 * (1 - busy))
        ttft = wait + prefill + step_seconds(batch) / 2  # half a step: it waits for the running one
        return _State(batch, ttft, tpot, ttft + load.answer * tpot)

    # Slow answers lower the rate of requests. Bisection finds the rate that is consistent with the time of a
    # request.
    users = load.users / replicas
    low, high = 0.0, users / max(load.think, prefill)
    for _ in range(60):
        rate = (low + high) / 2
        if rate * (load.think + steady_state(rate).stay) > users:
            high = rate
        else:
            low = rate
    state = steady_state(low)
    stable, busy = math.isfinite(state.batch), low * prefill
    wait = busy * prefill / (2 * (1 - busy)) if busy < 1 else math.inf
    slowest = prefill + step_seconds(state.batch if stable else 1) + TAIL * wait
    times, fits = (state.ttft, slowest, state.tpot), state.batch <= most
    return Served(single, replicas, load.answer, stable, state.batch, low, *times, busy, fits, most)


@dataclass(frozen=True)
class DraftPlan:
    """Predicted speculation with k draft tokens: expected tokens per round, and its cost in target steps."""

    alpha: float
    cost: float  # time of a draft step divided by a target step
    k: int
    tokens_a_round: float
    round_cost: float

    @property
    def speedup(self) -> float:
        return self.tokens_a_round / self.round_cost


def predict_draft(
    alpha: float, cost: float, k: int, verify: Callable[[int], float] = lambda k: 1.0
) -> DraftPlan:
    """Predict speculation with ``k`` draft tokens per round, accepted with probability ``alpha``.

    ``verify(k)`` is the time of verifying k + 1 tokens, in target steps.
    """
    if not 0 <= alpha < 1 or not 0 <= cost < math.inf or k < 1:
        raise PlanError(f"alpha={alpha:g} must be < 1, the draft's cost {cost:g} > 0 and k={k} >= 1")
    return DraftPlan(alpha, cost, k, (1 - alpha ** (k + 1)) / (1 - alpha), k * cost + verify(k))


def best_draft(alpha: float, cost: float, verify: Callable[[int], float] = lambda k: 1.0) -> DraftPlan:
    """Return the plan with the number of draft tokens (at most 16) that has the largest speed-up."""
    return max((predict_draft(alpha, cost, k, verify) for k in range(1, 17)), key=lambda plan: plan.speedup)


def verify_cost(
    target: Target, config: ModelConfig, weights: WeightFormat, kv: str, context: int
) -> Callable[[int], float]:
    """Return the function v(k): the time of a pass over k + 1 tokens of a sequence, in steps of one token."""
    one = target.decode(config, weights, kv, context)
    empty_one = target.decode(config, weights, kv, 1)
    return lambda k: (target.decode(config, weights, kv, 1, k + 1) - empty_one + one) / one
