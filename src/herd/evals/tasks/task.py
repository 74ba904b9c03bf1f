"""What a task is: it gives items and judges answers, and never sees the model between them.

An item carries one request of three kinds: `Rank` (which continuation is likeliest), `Read` (how likely is
this text) or `Generate` (continue, or answer). Whoever runs the task turns each request into an `Answer`,
which the task judges. So the same task runs on a checkpoint, a quantized file or an endpoint, and prepared
answers can be judged without any model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..bootstrap import Interval, mean_interval, ratio_interval, wilson
from ..results import ItemResult, digest
from ..score import Score, from_interval, part

if TYPE_CHECKING:
    from .data import Data

Mode = Literal["base", "instruct"]
"""How a model is asked: with text to continue and choices ranked by likelihood, or in a dialog."""


@dataclass(frozen=True)
class Rank:
    """(context, continuation) pairs of text, usually one context with several continuations."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Read:
    """A whole text, scored from its first token."""

    text: str


@dataclass(frozen=True)
class Generate:
    """A text to continue or messages to answer, greedily. ``stop`` strings end the answer and are cut off."""

    prompt: str | tuple[Mapping[str, Any], ...]
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_call_format: str = "json"
    """Used where the model's chat format has it; otherwise the format's own is."""


@dataclass(frozen=True)
class GenerateJson(Generate):
    """A `Generate` whose answer is JSON that is valid under ``schema`` (JSON text) by construction."""

    schema: str = ""


Request = Rank | Read | Generate


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a continuation in nats, whether it is the greedy one, and its length."""

    nats: float
    greedy: bool = False
    n_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model replied: ``likelihoods`` of a `Rank` (in the order of its pairs) or of a `Read` (one), or
    the ``text`` of a `Generate` with its finish reason ("stop", "length", "context").
    """

    text: str = ""
    finish_reason: str = ""
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Item:
    """One question. ``id`` is stable and unique within its task; the judge compares with ``gold``; ``group``
    is a subject, language or category for the breakdown; ``doc`` is whatever else the judge needs.
    """

    id: str
    request: Request
    gold: Any
    group: str = ""
    doc: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What a judge found. ``value`` is 1 for right and 0 for wrong, or any number that can be averaged;
    ``extracted`` is the answer as it was understood; ``metrics`` are further numbers; ``why`` says why it
    is wrong. Ready for JSON.
    """

    value: float
    extracted: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Task(ABC):
    """Base of all tasks. A subclass says what its items are and how an answer is judged.

    ``shots`` worked examples stand before each item, which is asked in ``mode``. ``version`` changes whenever
    a prompt or a judge does: results of another version are not reused. ``settings``, with ``version``, is
    all that a result depends on besides the data and the model.
    """

    name: str
    shots: int = 0
    mode: Mode = "base"
    version: ClassVar[str] = "1"
    source: ClassVar[str] = ""
    """Paper or project the items come from."""
    licence: ClassVar[str] = ""
    shots_from: ClassVar[str] = "none"
    metric: ClassVar[str] = "acc"

    @property
    def settings(self) -> dict[str, Any]:
        """All choices that a result depends on, ready for JSON."""
        return {"shots": self.shots, "mode": self.mode}

    def fitted(self, model: Any) -> Task:
        """Return the task fitted to a model, for example to its ``context`` and how it ``count``s tokens."""
        return self

    def data_label(self, data: Data) -> str:
        """Return where the items come from, as tables and receipts call it."""
        return data.label

    def fingerprint(self, item: Item) -> str:
        """Return a hash of all that a kept judgement depends on: if it changes, the item is asked again."""
        return digest(item.request)

    @abstractmethod
    def items(self, data: Data) -> list[Item]:
        """Return all items, in an order of which any beginning is a fair sample. DataError if a file is
        missing.
        """

    @abstractmethod
    def judge(self, item: Item, answer: Answer) -> Judgement:
        """Return whether an answer is right, and how it was understood."""

    def judge_all(self, answered: Sequence[tuple[Item, Answer]]) -> list[Judgement]:
        """Judge several answers; tasks that need something costly for it, such as a sandbox, open it once
        here.
        """
        return [self.judge(item, answer) for item, answer in answered]

    def contradiction(self, item: Item) -> str:
        """Return why no answer to this item can be right, if so: a few real items contradict themselves."""
        return ""

    def note(self, data: Data) -> str:
        """Return what a reader of the score must know, e.g. that the data has fewer examples than shots."""
        return ""

    def scores(self, results: Sequence[ItemResult]) -> list[Score]:
        """Return the headline score with its breakdown by group, then the mean of every further metric."""
        values = [result.value for result in results]
        detail = {"by_group": by_group([result.group for result in results], values)}
        scores = [mean(self.metric, values, detail if any(result.group for result in results) else {})]
        for name in dict.fromkeys(name for result in results for name in result.metrics):
            scores.append(mean(name, [result.metrics[name] for result in results if name in result.metrics]))
        return scores


def too_few_examples(there: int, shots: int) -> str:
    """Return a note where the data has fewer worked examples than shots are wanted, else ""."""
    return f"{there} shots: the data has no more" if there < shots else ""


def mean(name: str, values: Sequence[float], detail: dict[str, Any] | None = None) -> Score:
    """Return a share with Wilson's interval if all values are 0 or 1, else a bootstrapped mean."""
    score = from_interval(name, _interval(values), "fraction", len(values), detail)
    return score if len(values) > 1 else replace(score, lo=None, hi=None)  # a single number has no spread


def by_group(groups: Sequence[str], values: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Return `mean` within each group: key to ``{value, lo, hi, n}``."""
    grouped: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        grouped.setdefault(group, []).append(value)
    means = {group: mean(group, some) for group, some in grouped.items()}
    return {group: {"value": s.value, "lo": s.lo, "hi": s.hi, "n": s.n} for group, s in means.items()}


def grouped_ratio(
    name: str, unit: str, results: Sequence[ItemResult], top: str, bottom: str, scale: float = 1
) -> Score:
    """Return a sum of one metric over a sum of another, with a breakdown by group; intervals resample the
    items.
    """

    def interval(some: Sequence[ItemResult]) -> Interval:
        return ratio_interval([scale * r.metrics[top] for r in some], [r.metrics[bottom] for r in some])

    groups: dict[str, list[ItemResult]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    parts = {group: part(interval(some), len(some)) for group, some in groups.items()}
    return from_interval(name, interval(results), unit, len(results), {"by_group": parts})


def _interval(values: Sequence[float]) -> Interval:
    if all(value in (0, 1) for value in values):
        return wilson(round(sum(values)), len(values))
    return mean_interval(values)
