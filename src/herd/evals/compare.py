"""Several evaluations side by side: paired differences item by item, what flipped, and the published scores beside.

All models answered the same items, so a difference is known better than either score: the items' differences are
resampled (`bootstrap.paired_difference`). Many differences are looked at, and some exclude zero by chance alone; Holm's
procedure over all pairs and tasks says which ones still stand (family-wise error at most 5 %).

`compare` gives plain data; `compare_page.py` shows it. Source: Holm, Scand. J. Stat. 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import DataError
from ..report.published import Published, published
from .bootstrap import Interval, paired_difference
from .results import Evaluation, ItemResult, TaskResult
from .score import Score
from .verdicts import ClaimVerdict, judge_claims

LESS_IS_BETTER = ("bits/byte", "nats/token")
"""Units of scores of which less is better."""
RATIOS = {"bpb": ("bits", "bytes"), "kl": ("nats", "tokens")}
"""Scores that are a sum over a sum, by their metric: what is summed of each item."""
PUBLISHED_NAMES = {"human_eval": "humaneval"}
FLIPS_SHOWN = 12
NOT_ASKED = "not asked"
ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """``first`` minus ``second`` on the items both answered. ``p``: two-sided; ``stands``: by Holm's procedure."""

    task: str
    first: str
    second: str
    interval: Interval
    n: int
    unit: str
    gained: int = 0
    lost: int = 0
    p: float = 1.0
    stands: bool = False
    by_group: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def better(self) -> str:
        """The better model where the difference stands, else ""."""
        if not self.stands or not self.interval.value:
            return ""
        return self.first if (self.interval.value > 0) != (self.unit in LESS_IS_BETTER) else self.second


@dataclass(frozen=True)
class Flip:
    """An item that one model has right and another has not: what each made of it."""

    task: str
    id: str
    group: str
    gold: Any
    answers: Mapping[str, tuple[float, str, str]]
    """Model to (value, answer as understood or written, why it failed)."""


@dataclass(frozen=True)
class ComparedItem:
    """One metric of a task with one group of settings: a score a model (None: did not run, and why), the published ones
    beside."""

    task: str
    settings: Mapping[str, Any]
    unit: str
    metric: str
    scores: Mapping[str, Score | None]
    reasons: Mapping[str, str]
    notes: Sequence[str]
    published: Sequence[Published]
    contamination: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        shots, parent = self.settings.get("shots"), self.settings.get("parent")
        return f"{self.task}, {shots}-shot" if shots else f"{self.task} to {parent}" if parent else self.task

    @property
    def groups(self) -> list[str]:
        """Languages, subjects or categories that some model's score is broken down by."""
        return list(dict.fromkeys(g for s in self.scores.values() if s for g in s.detail.get("by_group", {})))


@dataclass(frozen=True)
class Comparison:
    """Everything the page shows. ``rows``: the headline metric of every task; ``further``: all other metrics, which are
    shown with their intervals but not tested against each other."""

    models: Sequence[str]
    rows: Sequence[ComparedItem]
    further: Sequence[ComparedItem]
    differences: Sequence[Difference]
    flips: Sequence[Flip]
    n_flips: Mapping[str, int]
    verdicts: Sequence[ClaimVerdict]
    about: Sequence[Mapping[str, Any]]

    def record(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite become null."""
        return _finite(asdict(self))


def compare(evaluations: Sequence[Evaluation]) -> Comparison:
    """All tasks that any of them ran; models are told apart by name, namesakes by their folders. Raises DataError for
    no evaluation or twice the same."""
    names = _names(evaluations)
    rows, further, differences, flips, n_flips = [], [], [], [], {}
    keys = dict.fromkeys(_key(task) for evaluation in evaluations for task in evaluation.tasks)
    for key in keys:
        results = {
            name: _result(evaluation, key) for name, evaluation in zip(names, evaluations, strict=True)
        }
        headline, *others = _rows(key[0], results)
        rows.append(headline)
        further += others
        items = {
            name: {item.id: item for item in evaluation.items(found)}
            for name, evaluation in zip(names, evaluations, strict=True)
            if (found := results[name]) is not None and found.status == "done"
        }
        differences += _differences(headline, items)
        shown, total = _flips(headline, items)
        flips += shown
        n_flips[headline.title] = total
    about = [{"name": n, "hash": e.model_hash} | _about(e) for n, e in zip(names, evaluations, strict=True)]
    own = {name: {row.task: s for row in rows if (s := row.scores[name])} for name in names}
    return Comparison(names, rows, further, holm(differences), flips, n_flips, judge_claims(own), about)


def holm(differences: Sequence[Difference], alpha: float = ALPHA) -> list[Difference]:
    """The same with ``stands`` decided: p values in order against alpha / (how many are left), up to the first miss."""
    order = sorted(range(len(differences)), key=lambda i: differences[i].p)
    out = list(differences)
    for rank, i in enumerate(order):
        if not differences[i].p <= alpha / (len(order) - rank):
            break
        out[i] = replace(differences[i], stands=True)
    return out


def p_value(interval: Interval) -> float:
    """Two-sided p of "no difference" for an interval of 95 %, taken as normal around its value."""
    if math.isnan(interval.lo) or interval.hi == interval.lo:
        return 1.0 if not interval.value else 0.0
    return math.erfc(abs(interval.value) / ((interval.hi - interval.lo) / (2 * 1.959964)) / math.sqrt(2))


def _names(evaluations: Sequence[Evaluation]) -> list[str]:
    if not evaluations:
        raise DataError("nothing to compare: give folders that herd eval has written")
    if len({evaluation.folder.resolve() for evaluation in evaluations}) < len(evaluations):
        raise DataError("the same evaluation twice: give each folder once")
    plain = [evaluation.model for evaluation in evaluations]
    if len(set(plain)) == len(plain):
        return plain
    return [e.folder.name if plain.count(e.model) > 1 else e.model for e in evaluations]


def _key(task: TaskResult) -> tuple[str, str, str]:
    """Scores stand beside each other if task, shots and parent are the same; the mode may differ (base, instruct)."""
    return task.task, str(task.settings.get("shots", "")), str(task.settings.get("parent_hash", ""))


def _result(evaluation: Evaluation, key: tuple[str, str, str]) -> TaskResult | None:
    return next((task for task in reversed(evaluation.tasks) if _key(task) == key), None)


def _rows(task: str, results: Mapping[str, TaskResult | None]) -> list[ComparedItem]:
    """A row for every metric, the headline first; one without a score if no model ran the task."""
    scores = {name: {s["name"]: Score(**s) for s in r.scores} if r else {} for name, r in results.items()}
    metrics = dict.fromkeys(metric for some in scores.values() for metric in some) or {"": None}
    return [_row(task, metric, results, {model: some.get(metric) for model, some in scores.items()})
            for metric in metrics]  # fmt: skip


def _row(
    task: str, metric: str, results: Mapping[str, TaskResult | None], scores: Mapping[str, Score | None]
) -> ComparedItem:
    known = [result for result in results.values() if result is not None]
    unit = next((score.unit for score in scores.values() if score), "")
    reasons = {n: r.reason if r else NOT_ASKED for n, r in results.items() if scores[n] is None}
    others = [row for row in published() if row.task in (task, PUBLISHED_NAMES.get(task))]
    notes: dict[str, list[str]] = {}
    for name, result in results.items():
        if result and (note := _note(result)):
            notes.setdefault(note, []).append(name)
    told = [note if len(notes) == 1 else f"{', '.join(names)}: {note}" for note, names in notes.items()]
    found = (s.detail["contamination"] for s in scores.values() if s and "contamination" in s.detail)
    overlap: dict[str, Any] = next(found, {})
    return ComparedItem(task, known[0].settings, unit, metric, scores, reasons, told, others, overlap)


def _note(result: TaskResult) -> str:
    """What a reader must know of the items."""
    part = f"{result.n_items:,} of {result.n_total:,} items" if result.n_items < result.n_total else ""
    return "; ".join(filter(None, (part, result.note)))


def _differences(row: ComparedItem, items: Mapping[str, Mapping[str, ItemResult]]) -> list[Difference]:
    """Every pair of models, the later one minus the earlier one."""
    names = list(items)
    out = []
    for a, first in enumerate(names):
        for second in names[:a]:
            shared = [(items[first][i], items[second][i]) for i in items[first] if i in items[second]]
            if shared:
                out.append(_difference(row, first, second, shared))
    return out


def _difference(
    row: ComparedItem, first: str, second: str, pairs: Sequence[tuple[ItemResult, ItemResult]]
) -> Difference:
    interval = _paired(row, pairs)
    groups: dict[str, list[tuple[ItemResult, ItemResult]]] = {}
    for pair in pairs:
        groups.setdefault(pair[0].group, []).append(pair)
    by_group = {group: _paired(row, some) for group, some in groups.items()} if len(groups) > 1 else {}
    return Difference(
        row.title,
        first,
        second,
        interval,
        len(pairs),
        row.unit,
        gained=sum(a.value > b.value for a, b in pairs),
        lost=sum(a.value < b.value for a, b in pairs),
        p=p_value(interval),
        by_group=by_group,
    )


def _paired(row: ComparedItem, pairs: Sequence[tuple[ItemResult, ItemResult]]) -> Interval:
    """Of ratios (bits over bytes) the tops may differ and the bottoms are shared; else the mean of the items."""
    if row.metric in RATIOS:
        top, bottom = RATIOS[row.metric]
        weights = np.array([a.metrics[bottom] for a, _ in pairs])
        return paired_difference(
            [a.metrics[top] for a, _ in pairs], [b.metrics[top] for _, b in pairs], weights
        )
    return paired_difference([a.value for a, _ in pairs], [b.value for _, b in pairs])


def _flips(row: ComparedItem, items: Mapping[str, Mapping[str, ItemResult]]) -> tuple[list[Flip], int]:
    """Items that some have right (1) and others wrong (0); the first few, and how many there are."""
    if len(items) < 2 or row.unit != "fraction":
        return [], 0
    shared = set.intersection(*(set(found) for found in items.values()))
    flipped = [
        i
        for i in next(iter(items.values()))
        if i in shared and len({found[i].value for found in items.values()}) > 1
    ]
    shown = []
    for i in flipped[:FLIPS_SHOWN]:
        first = next(iter(items.values()))[i]
        answers = {name: (found[i].value, _said(found[i]), found[i].why) for name, found in items.items()}
        shown.append(Flip(row.title, i, first.group, first.gold, answers))
    return shown, len(flipped)


def _said(item: ItemResult) -> str:
    text = item.output if isinstance(item.output, str) else f"choice {item.extracted}"
    return text[:600]


def _about(evaluation: Evaluation) -> dict[str, Any]:
    return {name: evaluation.summary.get(name) for name in ("mode", "data", "precision")}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
