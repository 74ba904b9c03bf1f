"""Tasks of lm-eval on Herd's engine: ``--tasks lm-eval:NAME``, e.g. ``lm-eval:lambada_openai``.

EleutherAI's harness (extra ``evals``) has thousands of tasks with their data from the Hub, prompts, filters
and metrics. Here such a task becomes a `Task`, so that resuming, endpoints and shared prompt beginnings work
for it too. The task is not changed: its number of shots is the default, and ``--mode`` has no effect.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import DataError
from ..score import grouped
from .data import Data
from .task import Answer, Generate, Item, Judgement, Mode, Rank, Read, Request, Task

PREFIX = "lm-eval:"
MAX_TOKENS = 256  # lm-eval's limit if a task has none


@dataclass(frozen=True)
class LmEvalTask(Task):
    """A task of lm-eval (``inner``), with its first metric as the headline."""

    inner: Any = field(default=None, compare=False, repr=False)

    source = "lm-eval"
    licence = "see the data set"
    shots_from = "lm-eval's sampler"

    @classmethod
    def of(cls, name: str, shots: int | None, mode: Mode) -> LmEvalTask:
        """Load the task ``name`` (without prefix) from the Hub, with ``shots`` or the task's own number."""
        try:
            tasks = importlib.import_module("lm_eval.tasks")
        except ImportError:
            raise DataError(f"{PREFIX}{name} needs lm-eval: pip install lm-eval") from None
        try:
            [inner] = tasks.get_task_dict([name]).values()
        except Exception as error:  # a task's own code and the Hub may raise anything
            reason = str(error).strip().splitlines()
            raise DataError(
                f"{PREFIX}{name}: lm-eval cannot load it ({reason[0] if reason else error!r})"
            ) from None
        if isinstance(inner, Mapping):
            raise DataError(f"{PREFIX}{name} is a group: name its tasks one by one")
        return cls.around(inner, f"{PREFIX}{name}", shots, mode)

    @classmethod
    def around(cls, inner: Any, name: str, shots: int | None = None, mode: Mode = "base") -> LmEvalTask:
        """Wrap a task that is loaded already."""
        if shots is not None:
            inner.set_config("num_fewshot", shots)
        return cls(name, inner.config.num_fewshot or 0, mode, inner)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"lm_eval_version": str(self.inner.VERSION)}

    def items(self, data: Data) -> list[Item]:
        """Return lm-eval's own documents. ``data`` is not used."""
        self.inner.build_all_requests(rank=0, world_size=1)
        by_doc = grouped([instance.doc_id for instance in self.inner.instances], self.inner.instances)
        return [
            Item(str(number), _request(self.name, instances), None, doc={"instances": instances})
            for number, instances in by_doc.items()
        ]

    def judge(self, item: Item, answer: Answer) -> Judgement:
        """Apply lm-eval's filters and metrics, except metrics that need all items (perplexities)."""
        instances = copy.copy(item.doc["instances"])
        if answer.likelihoods:
            kind = instances[0].request_type
            pairs = [(x.nats, x.greedy) for x in answer.likelihoods]
            found = {
                "": self.inner.process_results(
                    instances[0].doc, [x for x, _ in pairs] if kind.endswith("rolling") else pairs
                )
            }
        else:
            found = {}
            instances = [copy.copy(instances[0])]
            instances[0].resps, instances[0].filtered_resps = [answer.text], {}
            for ensemble in self.inner._filters:
                ensemble.apply(instances)
                said = instances[0].filtered_resps[ensemble.name]
                found[ensemble.name] = self.inner.process_results(instances[0].doc, [said])
        numbers = {
            f"{metric},{name}" if len(found) > 1 else metric: float(value)
            for name, metrics in found.items()
            for metric, value in metrics.items()
            if isinstance(value, int | float | bool)
        }
        if not numbers:
            raise DataError(f"{self.name} has no metric of single items; run it with lm-eval itself")
        first, *others = numbers
        return Judgement(numbers[first], None, {name: numbers[name] for name in others})


def _request(name: str, instances: list[Any]) -> Request:
    kind, args = instances[0].request_type, instances[0].args
    if kind == "loglikelihood":
        return Rank(tuple((instance.args[0], instance.args[1]) for instance in instances))
    if kind == "loglikelihood_rolling":
        return Read(args[0])
    if kind != "generate_until":
        raise DataError(f"{name}: unknown kind of request {kind!r}; run the task with lm-eval itself")
    settings = args[1]
    until = settings.get("until") or []
    stop = tuple(mark for mark in ([until] if isinstance(until, str) else until) if mark)
    return Generate(args[0], settings.get("max_gen_toks") or MAX_TOKENS, stop)
