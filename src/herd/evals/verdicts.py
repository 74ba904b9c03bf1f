"""The headline claims about Llama 3.1, checked against published scores and one's own measurements.

A claim compares two models on the benchmarks of one source. Published scores have no intervals. So a
difference counts only if it exceeds two standard errors of the difference of two fractions, given the
benchmark's number of items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..report.published import find_published
from .score import Score

N_ITEMS = {
    "boolq": 3270, "gsm8k": 1319, "hellaswag": 10042, "humaneval": 164, "mmlu_humanities": 4705,
    "mmlu_other": 3107, "mmlu_social_sciences": 3077, "mmlu_stem": 3153, "openbookqa": 500, "piqa": 1838,
    "social_iqa": 1954, "truthfulqa_mc1": 817, "winogrande": 1267,
}  # fmt: skip
"""Number of questions of each benchmark."""


@dataclass(frozen=True)
class ScoreClaim:
    """The claim that ``first`` is ahead of ``second`` by the scores of ``source``."""

    said: str
    first: str
    second: str
    source: str


CLAIMS = (
    ScoreClaim("Llama 3.1 405B beats GPT-4o", "Llama 3.1 405B", "GPT-4o", "azure-leak"),
    ScoreClaim("Llama 3.1 70B beats GPT-4o", "Llama 3.1 70B", "GPT-4o", "azure-leak"),
    ScoreClaim("Llama 3.1 8B is far ahead of Llama 3 8B", "Llama 3.1 8B", "Llama 3 8B", "azure"),
    ScoreClaim("Llama 3.1 70B beats Llama 3 70B", "Llama 3.1 70B", "Llama 3 70B", "azure"),
)


@dataclass(frozen=True)
class ClaimVerdict:
    """The verdict on a claim: benchmarks on which ``first`` wins, loses or ties by published scores.

    ``own`` is a text on the same comparison by the user's measurements, or "" unless both models have some.
    """

    claim: ScoreClaim
    wins: Sequence[str]
    losses: Sequence[str]
    ties: Sequence[str]
    own: str = ""

    @property
    def verdict(self) -> str:
        if self.wins and not self.losses:
            return "holds" if len(self.wins) > len(self.ties) else "mostly within the noise"
        return "holds in part" if len(self.wins) > len(self.losses) else "does not hold"


def judge_claims(own: Mapping[str, Mapping[str, Score]]) -> list[ClaimVerdict]:
    """Return a verdict for each claim. ``own`` maps models to tasks to measured scores."""
    verdicts = []
    for claim in CLAIMS:
        first, second = _published(claim.first, "azure"), _published(claim.second, claim.source)
        tasks: dict[str, list[str]] = {"wins": [], "losses": [], "ties": []}
        for task in (task for task in first if task in second):
            gap, mean = first[task] - second[task], (first[task] + second[task]) / 200
            noise = 200 * math.sqrt(2 * mean * (1 - mean) / N_ITEMS[task])
            tasks["ties" if abs(gap) <= noise else "wins" if gap > 0 else "losses"].append(task)
        verdicts.append(ClaimVerdict(claim, **tasks, own=_measured(claim, own)))
    return verdicts


def _published(model: str, source: str) -> dict[str, float]:
    return {
        row.task: row.score
        for row in find_published(model=model, kind="instruct", source=source)
        if row.task in N_ITEMS
    }


def _measured(claim: ScoreClaim, own: Mapping[str, Mapping[str, Score]]) -> str:
    """Return a text that compares the claim's models by the user's scores, or "" without a shared task."""
    first, second = (
        next((s for name, s in own.items() if _same(name, m)), {}) for m in (claim.first, claim.second)
    )
    shared = [task for task in first if task in second]
    if not shared:
        return ""
    ahead = sum(first[task].value > second[task].value for task in shared)
    return f"measured here: ahead in {ahead} of {len(shared)}"


def _same(name: str, model: str) -> bool:
    """Return whether a checkpoint's name means a published model (Llama-3.1-8B-Instruct: Llama 3.1 8B)."""
    return model.lower().replace(" ", "") in name.lower().replace(" ", "").replace("-", "").replace("_", "")
