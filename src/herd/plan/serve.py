"""How many people a machine serves, and whether a draft pays: small analytic models, no simulation.

**Batching.** Requests of P prompt and A answer tokens arrive at a rate λ; the engine decodes B of them
together. A request costs its prefill S_p, during which the others mostly wait, and A steps of S_d(B). In
steady state

    B = λ · (time a request stays) = λ · (S_p + A · S_d(B) / (1 - ρ)),   ρ = λ · S_p

where ρ is the share of the time that goes into prefill (Little's law). The prefill queue is M/D/1: its mean
wait is ρ S_p / (2 (1 - ρ)), and the 95th percentile about three times that (exponential tail). ``users`` who
read an answer and think for Z seconds before the next request make λ = users / (Z + time).

**Speculation.** A draft proposes k tokens, each accepted with probability α; one pass of the target verifies
them all and gives one more. Expected tokens a pass: (1 - α^(k+1)) / (1 - α); cost of a round in target steps:
k c + v(k), with c the draft's step over the target's and v(k) what verifying k + 1 tokens costs over one step
(Leviathan et al., arXiv 2211.17192, theorem 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..engine.memory import nbytes as kv_nbytes
from ..errors import PlanError
from ..kernels.page_layout import BYTES
from ..llama.config import ModelConfig
from .ways import Form, Target, Way, model_config, way

THINK_SECONDS = 30.0
"""Seconds between an answer's end and the same user's next request."""
TAIL = 3.0
"""95th percentile of an exponential over its mean: -ln 0.05."""
MAX_BATCH = 1024


@dataclass(frozen=True)
class Load:
    """What users do: how many, tokens of prompt and answer, seconds of thought between."""

    users: int
    prompt: int
    answer: int
    think: float = THINK_SECONDS

    def __post_init__(self) -> None:
        for name in ("users", "prompt", "answer"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name}={getattr(self, name)} must be at least 1")
        if self.think < 0:
            raise PlanError(f"think={self.think:g} seconds cannot be negative")


@dataclass(frozen=True)
class Served:
    """How it goes: mean requests in the engine, requests/s, time to the first token, seconds a token, busy
    share.

    ``replicas``: so many machines share the users. ``stable`` False: work comes in faster than it is done."""

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
        """Of all replicas together."""
        return self.replicas * self.requests_per_s * self.answer

    def meets(self, p95_ttft: float | None) -> bool:
        """Whether it holds the load, in memory and in time."""
        return self.stable and self.fits and (p95_ttft is None or self.ttft_p95 <= p95_ttft)


def serve(target: Target, size: str, form: Form, load: Load, replicas: int = 1, kv: str = "bf16") -> Served:
    """One form under a load. `PlanError` for a prompt and answer beyond the model's context."""
    config = model_config(size)
    context = load.prompt + load.answer
    single = way(target, size, form, kv, context)
    spare = single.capacity - single.weights_nbytes - single.beside_nbytes
    most = int(spare // kv_nbytes(config, 1, context, BYTES[kv])) if spare > 0 else 0
    if most < 1:
        return Served(single, replicas, load.answer, False, 0, 0, math.inf, math.inf, math.inf, 1, False, 0)
    prefill = target.prefill(config, form, kv, load.prompt)
    middle = load.prompt + load.answer // 2

    def step(batch: float) -> float:
        """Straight between whole batches: a mean batch is seldom whole."""
        low = max(1, min(math.floor(batch), MAX_BATCH))
        first, second = (target.decode(config, form, kv, middle, n) for n in (low, low + 1))
        return first + (second - first) * (max(batch, 1.0) - low)

    share_users = load.users / replicas

    def state(rate: float) -> tuple[float, float, float, float]:
        """(batch, mean TTFT, seconds a token, time a request stays) at requests/s ``rate``."""
        busy = rate * prefill
        if busy >= 1:
            return math.inf, math.inf, math.inf, math.inf
        batch = 1.0
        for _ in range(60):
            tpot = step(batch) / (1 - busy)
            after = rate * load.answer * tpot
            if after > MAX_BATCH:
                return math.inf, math.inf, math.inf, math.inf
            if abs(after - batch) < 1e-3 * max(batch, 1e-9):
                break
            batch = (batch + after) / 2
        wait = busy * prefill / (2 * (1 - busy))
        ttft = wait + prefill + step(batch) / 2  # it may have to wait for a step under way
        return batch, ttft, tpot, ttft + load.answer * tpot

    # users slow down when answers do: the rate at which the loop closes, by halving
    low, high = 0.0, share_users / max(load.think, 1e-9) if load.think else share_users / prefill
    high = min(high, share_users / prefill)
    for _ in range(60):
        rate = (low + high) / 2
        if rate * (load.think + state(rate)[3]) > share_users:
            high = rate
        else:
            low = rate
    batch, ttft, tpot, _ = state(low)
    stable = math.isfinite(batch)
    busy = low * prefill
    wait = busy * prefill / (2 * (1 - busy)) if busy < 1 else math.inf
    p95 = prefill + step(batch if stable else 1) + TAIL * wait
    return Served(
        single, replicas, load.answer, stable, batch, low, ttft, p95, tpot, busy, batch <= most, most
    )


@dataclass(frozen=True)
class Draft:
    """What speculation brings: expected tokens a round, its cost in target steps, the speed-up, and the best
    k."""

    alpha: float
    cost: float  # a draft's step over a target's
    k: int
    tokens_a_round: float
    round_cost: float

    @property
    def speedup(self) -> float:
        return self.tokens_a_round / self.round_cost


def draft(alpha: float, cost: float, k: int, verify: Callable[[int], float] = lambda k: 1.0) -> Draft:
    """Speculation with k proposals. ``verify(k)``: verifying k + 1 tokens over one step. `PlanError` out of
    range."""
    if not 0 <= alpha < 1:
        raise PlanError(
            f"alpha={alpha:g} must be from 0 up to, not at, 1: the share of proposals that are accepted"
        )
    if cost < 0 or not math.isfinite(cost):
        raise PlanError(f"cost={cost:g} must not be negative: the draft's step over the target's")
    if not 1 <= k <= 64:
        raise PlanError(f"k={k} must be from 1 to 64 proposals")
    return Draft(alpha, cost, k, (1 - alpha ** (k + 1)) / (1 - alpha), k * cost + verify(k))


def best_draft(
    alpha: float, cost: float, verify: Callable[[int], float] = lambda k: 1.0, most: int = 16
) -> Draft:
    """The k that pays most."""
    return max((draft(alpha, cost, k, verify) for k in range(1, most + 1)), key=lambda found: found.speedup)


def verify_cost(
    target: Target, config: ModelConfig, form: Form, kv: str, context: int
) -> Callable[[int], float]:
    """What a pass over k + 1 tokens of one sequence costs over a step of one: a batch that shares its
    cache."""
    one = target.decode(config, form, kv, context)
    empty_one = target.decode(config, form, kv, 1)
    return lambda k: (target.decode(config, form, kv, 1, k + 1) - empty_one + one) / one
