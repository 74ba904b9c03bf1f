"""Compare evaluations: paired differences, flipped items, and published scores.

All models answered the same items, so their difference is known more precisely than their scores: the
differences of the items are resampled (`bootstrap.paired_difference`). Among many differences some exclude
zero by chance. Holm's procedure over all pairs and tasks says which ones are significant (family-wise error
at most 5 %).

`compare` returns plain data, and `compare_page.py` writes the page. Source: Holm, Scand. J. Stat. 6 (1979).
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
from .score import Score, grouped
from .verdicts import ClaimVerdict, judge_claims

LESS_IS_BETTER = ("bits/byte", "nats/token")
"""Units in which less is better."""
RATIOS = {"bpb": ("bits", "bytes"), "kl": ("nats", "tokens")}
"""Metrics that are a ratio of sums over the items: the names of the two quantities."""
PUBLISHED_NAMES = {"human_eval": "humaneval"}
FLIPS_SHOWN = 12
NOT_ASKED = "not asked"
ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """The difference ``first`` minus ``second`` on the items that both models answered.

    ``gained`` and ``lost`` are numbers of items, ``p`` is two-sided, and ``stands`` says whether the
    difference is significant by Holm's procedure.
    """

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
        """The better model if the difference is significant, else ""."""
        if not self.stands or not self.interval.value:
            return ""
        return self.first if (self.interval.value > 0) != (self.unit in LESS_IS_BETTER) else self.second


@dataclass(frozen=True)
class Flip:
    """An item that one model answers right and another wrong, with the answer of each."""

    task: str
    id: str
    group: str
    gold: Any
    answers: Mapping[str, tuple[float, str, str]]
    """By model: (value, answer as understood or written, reason of the failure)."""


@dataclass(frozen=True)
class ComparedMetric:
    """A metric of a task: a score per model (None: see ``reasons``) and the published scores."""

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
        """Languages, subjects or categories in the breakdowns of the scores."""
        return list(dict.fromkeys(g for s in self.scores.values() if s for g in s.detail.get("by_group", {})))


@dataclass(frozen=True)
class Comparison:
    """All data of the comparison page.

    ``rows`` has the main metric of every task. ``further`` has all other metrics. Their differences are not
    tested.
    """

    models: Sequence[str]
    rows: Sequence[ComparedMetric]
    further: Sequence[ComparedMetric]
    differences: Sequence[Difference]
    flips: Sequence[Flip]
    n_flips: Mapping[str, int]
    verdicts: Sequence[ClaimVerdict]
    about: Sequence[Mapping[str, Any]]

    def record(self) -> dict[str, Any]:
        """Return plain data for JSON. Numbers that are not finite become null."""
        return _finite(asdict(self))


def compare(evaluations: Sequence[Evaluation]) -> Comparison:
    """Compare all tasks of the evaluations.

    Models are identified by name, or by folder if two have the same name. Raises `DataError` if there is no
    evaluation or one is given twice.
    """
    by_name = dict(zip(_names(evaluations), evaluations, strict=True))
    rows, further, differences, flips, n_flips = [], [], [], [], {}
    for key in dict.fromkeys(_key(task) for evaluation in evaluations for task in evaluation.tasks):
        results = {
            name: next((task for task in reversed(evaluation.tasks) if _key(task) == key), None)
            for name, evaluation in by_name.items()
        }
        headline, *others = _rows(key[0], results)
        rows.append(headline)
        further += others
        items = {
            name: {item.id: item for item in by_name[name].items(found)}
            for name, found in results.items()
            if found is not None and found.status == "done"
        }
        differences += _differences(headline, items)
        shown, n_flips[headline.title] = _flips(headline, items)
        flips += shown
    about = [
        {"name": name, "hash": e.model_hash}
        | {key: e.summary.get(key) for key in ("mode", "data", "precision")}
        for name, e in by_name.items()
    ]
    own = {name: {row.task: score for row in rows if (score := row.scores[name])} for name in by_name}
    return Comparison(
        list(by_name), rows, further, holm(differences), flips, n_flips, judge_claims(own), about
    )


def holm(differences: Sequence[Difference], alpha: float = ALPHA) -> list[Difference]:
    """Decide which differences are significant, by Holm's procedure.

    In rising order, p values are compared with alpha / (number of remaining ones), until one is larger.
    """
    order = sorted(range(len(differences)), key=lambda i: differences[i].p)
    out = list(differences)
    for rank, i in enumerate(order):
        if not differences[i].p <= alpha / (len(order) - rank):
            break
        out[i] = replace(differences[i], stands=True)
    return out


def p_value(interval: Interval) -> float:
    """Return the two-sided p value of "no difference", from a 95 % interval and a normal distribution."""
    if math.isnan(interval.lo) or interval.hi == interval.lo:
        return 1.0 if not interval.value else 0.0
    return math.erfc(abs(interval.value) / ((interval.hi - interval.lo) / (2 * 1.959964)) / math.sqrt(2))


def _names(evaluations: Sequence[Evaluation]) -> list[str]:
    if not evaluations:
        raise DataError("nothing to compare: give folders that herd eval has written")
    if len({evaluation.folder.resolve() for evaluation in evaluations}) < len(evaluations):
        raise DataError("the same evaluation is given twice: give each folder once")
    plain = [evaluation.model for evaluation in evaluations]
    if len(set(plain)) == len(plain):
        return plain
    return [e.folder.name if plain.count(e.model) > 1 else e.model for e in evaluations]


def _key(task: TaskResult) -> tuple[str, str, str]:
    """Return the key of comparable scores: same task, shots and parent.

    The mode (base, instruct) may differ.
    """
    return task.task, str(task.settings.get("shots", "")), str(task.settings.get("parent_hash", ""))


def _rows(task: str, results: Mapping[str, TaskResult | None]) -> list[ComparedMetric]:
    """Return a row per metric, the main one first, or a row without scores if no model ran the task."""
    scores = {name: {s["name"]: Score(**s) for s in r.scores} if r else {} for name, r in results.items()}
    metrics = dict.fromkeys(metric for some in scores.values() for metric in some) or {"": None}
    settings = next(result.settings for result in results.values() if result is not None)
    others = [row for row in published() if row.task in (task, PUBLISHED_NAMES.get(task))]
    notes = _notes(results)
    rows = []
    for metric in metrics:
        by_model = {model: some.get(metric) for model, some in scores.items()}
        known = [score for score in by_model.values() if score]
        reasons = {n: r.reason if r else NOT_ASKED for n, r in results.items() if by_model[n] is None}
        overlap: Mapping[str, Any] = next(
            (s.detail["contamination"] for s in known if "contamination" in s.detail), {}
        )
        unit = known[0].unit if known else ""
        rows.append(ComparedMetric(task, settings, unit, metric, by_model, reasons, notes, others, overlap))
    return rows


def _notes(results: Mapping[str, TaskResult | None]) -> list[str]:
    """Return remarks on the items that a reader must know, with the models they concern."""
    notes: dict[str, list[str]] = {}
    for name, result in results.items():
        if result is None:
            continue
        part = f"{result.n_items:,} of {result.n_total:,} items" if result.n_items < result.n_total else ""
        if note := "; ".join(filter(None, (part, result.note))):
            notes.setdefault(note, []).append(name)
    return [note if len(notes) == 1 else f"{', '.join(names)}: {note}" for note, names in notes.items()]


def _differences(row: ComparedMetric, items: Mapping[str, Mapping[str, ItemResult]]) -> list[Difference]:
    """Return the difference of every pair of models, the later one minus the earlier one."""
    names = list(items)
    out = []
    for a, first in enumerate(names):
        for second in names[:a]:
            shared = [(items[first][i], items[second][i]) for i in items[first] if i in items[second]]
            if shared:
                out.append(_difference(row, first, second, shared))
    return out


def _difference(
    row: ComparedMetric, first: str, second: str, pairs: Sequence[tuple[ItemResult, ItemResult]]
) -> Difference:
    interval = _paired(row, pairs)
    groups = grouped([first.group for first, _ in pairs], pairs)
    by_group = {group: _paired(row, some) for group, some in groups.items()} if len(groups) > 1 else {}
    return Difference(
        row.title, first, second, interval, len(pairs), row.unit, p=p_value(interval), by_group=by_group,
        gained=sum(a.value > b.value for a, b in pairs), lost=sum(a.value < b.value for a, b in pairs),
    )  # fmt: skip


def _paired(row: ComparedMetric, pairs: Sequence[tuple[ItemResult, ItemResult]]) -> Interval:
    """Return the difference of the means, or of the ratios (e.g. bits per byte, with equal bytes)."""
    if row.metric in RATIOS:
        top, bottom = RATIOS[row.metric]
        weights = np.array([a.metrics[bottom] for a, _ in pairs])
        return paired_difference(
            [a.metrics[top] for a, _ in pairs], [b.metrics[top] for _, b in pairs], weights
        )
    return paired_difference([a.value for a, _ in pairs], [b.value for _, b in pairs])


def _flips(row: ComparedMetric, items: Mapping[str, Mapping[str, ItemResult]]) -> tuple[list[Flip], int]:
    """Return the first items that some models answer right and others wrong, and the number of all such."""
    if len(items) < 2 or row.unit != "fraction":
        return [], 0
    first, *others = items.values()
    shared = [i for i in first if all(i in found for found in others)]
    flipped = [i for i in shared if len({found[i].value for found in items.values()}) > 1]
    flips = []
    for i in flipped[:FLIPS_SHOWN]:
        answers = {name: (found[i].value, _answer(found[i]), found[i].why) for name, found in items.items()}
        flips.append(Flip(row.title, i, first[i].group, first[i].gold, answers))
    return flips, len(flipped)


def _answer(item: ItemResult) -> str:
    return (item.output if isinstance(item.output, str) else f"choice {item.extracted}")[:600]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
