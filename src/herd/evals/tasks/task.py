"""The interface of a task: it makes items and judges answers, without access to the model.

An item has one request of three kinds: `Rank` (find the most likely continuation), `Read` (score a text) or
`Generate` (continue a text, or answer). The harness gets an `Answer` to each request, and the task judges it.
So the same task runs on a checkpoint, a quantized file or an endpoint, and prepared answers can be judged
without any model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..bootstrap import Interval, mean_interval, ratio_interval, wilson
from ..results import ItemResult, digest
from ..score import Score, from_interval, grouped, part

if TYPE_CHECKING:
    from .data import Data

Mode = Literal["base", "instruct"]
"""Kind of prompts: text to continue, with choices ranked by likelihood ("base"), or dialogs ("instruct")."""


@dataclass(frozen=True)
class Rank:
    """A request to score pairs (context, continuation), usually one context with several continuations."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Read:
    """A request to score a whole text from its first token."""

    text: str


@dataclass(frozen=True)
class Generate:
    """A request to continue a text or answer messages, greedily. The answer ends before a ``stop`` string."""

    prompt: str | tuple[Mapping[str, Any], ...]
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_call_format: str = "json"
    """The format of calls, if the model's chat format has it. Otherwise that format's default."""


@dataclass(frozen=True)
class GenerateJson(Generate):
    """A `Generate` with a constraint: the answer is JSON that is valid under ``schema`` (JSON text)."""

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
    """A model's answer to a request.

    It has the ``likelihoods`` of a `Rank` (in the order of its pairs) or of a `Read` (one), or the ``text``
    of a `Generate` with its finish reason ("stop", "length", "context").
    """

    text: str = ""
    finish_reason: str = ""
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Item:
    """A question of a task.

    ``id`` is stable and unique within the task, ``gold`` is the right answer, ``group`` is a subject,
    language or category for the breakdown, and ``doc`` has other data for the judge.
    """

    id: str
    request: Request
    gold: Any
    group: str = ""
    doc: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """The judgement on an answer, ready for JSON.

    ``value`` is 1 for right and 0 for wrong, or any number that can be averaged. ``extracted`` is the answer
    as understood, ``metrics`` are further numbers, and ``why`` is the reason if it is wrong.
    """

    value: float
    extracted: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Task(ABC):
    """Base of all tasks. A subclass makes the items and judges the answers.

    Each item is asked in ``mode`` after ``shots`` worked examples. ``version`` changes with every change of a
    prompt or a judge, and results of other versions are not reused. Results depend only on ``settings``,
    ``version``, the data and the model.
    """

    name: str
    shots: int = 0
    mode: Mode = "base"
    version: ClassVar[str] = "1"
    source: ClassVar[str] = ""
    """Paper or project that published the items."""
    licence: ClassVar[str] = ""
    shots_from: ClassVar[str] = "none"
    metric: ClassVar[str] = "acc"

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that a result depends on, ready for JSON."""
        return {"shots": self.shots, "mode": self.mode}

    def fitted(self, model: Any) -> Task:
        """Return the task adapted to a model, e.g. with texts as long as its ``context``."""
        return self

    def data_label(self, data: Data) -> str:
        """Return the name of the items' data in tables and receipts."""
        return data.label

    def fingerprint(self, item: Item) -> str:
        """Return a hash of all that a stored judgement depends on. If it changes, the item is asked again."""
        return digest(item.request)

    @abstractmethod
    def items(self, data: Data) -> list[Item]:
        """Return all items. The first ones must be a fair sample. Raises `DataError` if a file is missing."""

    @abstractmethod
    def judge(self, item: Item, answer: Answer) -> Judgement:
        """Return the judgement on an answer."""

    def judge_all(self, answered: Sequence[tuple[Item, Answer]]) -> list[Judgement]:
        """Judge several answers. Tasks that need, e.g., a sandbox open it once here."""
        return [self.judge(item, answer) for item, answer in answered]

    def contradiction(self, item: Item) -> str:
        """Return the reason if no answer to this item can be right. A few items contradict themselves."""
        return ""

    def note(self, data: Data) -> str:
        """Return a remark for readers of the score, e.g. that the data has fewer examples than shots."""
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
    """Return a note if the data has fewer worked examples than ``shots``, else ""."""
    return f"{there} shots: the data has no more" if there < shots else ""


def mean(name: str, values: Sequence[float], detail: dict[str, Any] | None = None) -> Score:
    """Return a fraction with Wilson's interval if all values are 0 or 1, else a bootstrapped mean."""
    is_share = all(value in (0, 1) for value in values)
    interval = wilson(round(sum(values)), len(values)) if is_share else mean_interval(values)
    score = from_interval(name, interval, "fraction", len(values), detail)
    return score if len(values) > 1 else replace(score, lo=None, hi=None)  # a single number has no spread


def by_group(groups: Sequence[str], values: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Return the `mean` in each group as ``{group: {value, lo, hi, n}}``."""
    means = {group: mean(group, its_values) for group, its_values in grouped(groups, values).items()}
    return {group: {"value": s.value, "lo": s.lo, "hi": s.hi, "n": s.n} for group, s in means.items()}


def grouped_ratio(
    name: str, unit: str, results: Sequence[ItemResult], top: str, bottom: str, scale: float = 1
) -> Score:
    """Return the ratio of two metrics' sums, with a breakdown by group. Intervals bootstrap the items."""

    def interval(chosen: Sequence[ItemResult]) -> Interval:
        return ratio_interval([scale * r.metrics[top] for r in chosen], [r.metrics[bottom] for r in chosen])

    groups = grouped([result.group for result in results], results)
    parts = {group: part(interval(chosen), len(chosen)) for group, chosen in groups.items()}
    return from_interval(name, interval(results), unit, len(results), {"by_group": parts})
