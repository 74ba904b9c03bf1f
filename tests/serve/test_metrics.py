"""Metrics: the counts are right, Prometheus' own parser reads them, and no label can be made up by a client."""

from prometheus_client.parser import text_string_to_metric_families

from herd.engine.loop import EngineStats
from herd.engine.request import Usage
from herd.serve.metrics import ServerMetrics

STATS = EngineStats(2, 3, 90, 10, 1280, 55, 1, 700, 9000, 12.5, 800.0)


def samples(metrics: ServerMetrics) -> dict[str, float]:
    """Return every sample by its name and labels, as Prometheus reads it."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        f"{sample.name}{{{','.join(f'{k}={v}' for k, v in sorted(sample.labels.items()))}}}": sample.value
        for family in families
        for sample in family.samples
    }


def test_tokens_times_and_requests_are_counted():
    metrics = ServerMetrics(lambda: {"m": STATS}, lambda: ["m"], ["/v1/chat/completions"])
    metrics.finished("m", "/v1/chat/completions", "completed", Usage(100, 60, 11, 0.2, 0.7, 1.7))
    metrics.finished("m", "/v1/chat/completions", "cancelled", Usage(50, 0, 0, 0.3, None, 0.3))
    metrics.refused("rate_limit_exceeded")
    found = samples(metrics)
    assert found["herd_requests_total{endpoint=/v1/chat/completions,model=m,status=completed}"] == 1
    assert found["herd_tokens_total{kind=prompt,model=m}"] == 90
    assert found["herd_tokens_total{kind=cached,model=m}"] == 60
    assert found["herd_tokens_total{kind=completion,model=m}"] == 11
    assert found["herd_queue_seconds_count{model=m}"] == 2
    assert found["herd_first_token_seconds_sum{model=m}"] == 0.7
    assert abs(found["herd_token_seconds_sum{model=m}"] - 0.1) < 1e-9
    assert found["herd_refused_total{code=rate_limit_exceeded}"] == 1


def test_the_engine_s_state_is_read_when_metrics_are():
    found = samples(ServerMetrics(lambda: {"m": STATS}, ["m"], []))
    assert found["herd_engine_active{model=m}"] == 2
    assert found["herd_engine_waiting{model=m}"] == 3
    assert found["herd_engine_cached_tokens{model=m}"] == 1280
    assert found["herd_engine_preemptions_total{model=m}"] == 1


def test_a_thousand_made_up_names_make_no_label():
    metrics = ServerMetrics(lambda: {"m": STATS}, lambda: ["m"], ["/v1/messages"])
    for number in range(1000):
        name = f'{number}"}}\nherd_fake 1'
        metrics.finished(name, name, "completed", Usage(1, 0, 1, 0.0, 0.1, 0.1))
    found = samples(metrics)
    assert found["herd_requests_total{endpoint=other,model=other,status=completed}"] == 1000
    assert len(found) < 120
    assert "herd_fake{}" not in found
