"""Counts and times of a server for Prometheus, at ``/metrics``.

Labels have few values: the names of served models, the routes' own paths, and words of this program. Nothing
that a client sends becomes a label, or a flood of made-up names would fill the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.request import Usage

if TYPE_CHECKING:  # a gateway runs no engine, so it does not load torch
    from ..engine.loop import EngineStats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
COUNTED_STATS = ("steps", "preemptions", "decoded_tokens", "prefilled_tokens")
"""Fields of `EngineStats` that only grow."""
OTHER = "other"


class ServerMetrics:
    """The metrics of one server.

    ``stats`` returns the state of each model's engine, by the model's name. ``models`` returns the names of
    all models.
    """

    def __init__(
        self,
        stats: Callable[[], dict[str, EngineStats]],
        models: Callable[[], Collection[str]],
        endpoints: Iterable[str],
    ) -> None:
        self._registry = CollectorRegistry()
        self._models, self._endpoints = models, frozenset(endpoints)
        self._requests = self._counter(
            "requests", "Requests that reached an engine", "model", "endpoint", "status"
        )
        self._refused = self._counter("refused", "Requests that were refused, by the error's code", "code")
        self._tokens = self._counter("tokens", "Tokens of requests that ended", "model", "kind")
        self._queue = self._histogram("queue_seconds", "Time until a request began", SECONDS)
        self._first = self._histogram("first_token_seconds", "Time from arrival to the first token", SECONDS)
        self._each = self._histogram("token_seconds", "Mean time per later token of a request", TOKEN_SECONDS)
        self._registry.register(_EngineCollector(stats))

    def finished(self, model: str, endpoint: str, status: str, usage: Usage) -> None:
        """Count a request that ended, however it ended."""
        model = model if model in self._models() else OTHER
        endpoint = endpoint if endpoint in self._endpoints else OTHER
        self._requests.labels(model, endpoint, status).inc()
        self._tokens.labels(model, "prompt").inc(usage.prompt_tokens - usage.cached_tokens)
        self._tokens.labels(model, "cached").inc(usage.cached_tokens)
        self._tokens.labels(model, "completion").inc(usage.completion_tokens)
        self._queue.labels(model).observe(usage.queue_seconds)
        if usage.first_token_seconds is not None:
            self._first.labels(model).observe(usage.first_token_seconds)
            if usage.completion_tokens > 1:
                seconds = usage.total_seconds - usage.first_token_seconds
                self._each.labels(model).observe(seconds / (usage.completion_tokens - 1))

    def refused(self, code: str) -> None:
        """Count a request that was refused. ``code`` is a word of this program, never of the client."""
        self._refused.labels(code).inc()

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"herd_{name}", f"{text}.", labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"herd_{name}", f"{text}.", ("model",), registry=self._registry, buckets=buckets)


class _EngineCollector(Collector):
    """Reads the engines' state whenever the metrics are read."""

    def __init__(self, stats: Callable[[], dict[str, EngineStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        state = self._stats()
        for field in fields(next(iter(state.values()))) if state else ():
            counted = field.name in COUNTED_STATS
            kind: Any = CounterMetricFamily if counted else GaugeMetricFamily
            words = field.name.replace("_", " ")
            metric = kind(f"herd_engine_{field.name}", f"Engine: {words}.", labels=("model",))
            for model, values in state.items():
                metric.add_metric([model], getattr(values, field.name))
            yield metric
