"""Requests made from our own OpenAPI description, valid ones and others, never make the server fail."""

import json
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.errors import SchemathesisError

from conftest import ScriptedLoop, running
from herd.engine.loop import EngineStats
from herd.serve.app import create_app
from herd.serve.chat import ServedModel
from herd.serve.settings import ServeSettings

CONTEXT = 2048
N_EXAMPLES, N_SOAK = 14, 160
"""Requests for each operation: 200 in all, and 2,000 in the long test, as some have no invalid requests."""
QUIET = {
    "deadline": None,
    "derandomize": True,
    "phases": (Phase.generate,),
    "suppress_health_check": list(HealthCheck),
}


class CheckingLoop(ScriptedLoop):
    """A scripted engine that checks requests as a real one does."""

    engine = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(dim=2)))

    def submit(self, request, n=1):
        request.validate(640, CONTEXT)
        return super().submit(request, n)

    def stats(self):
        return EngineStats(*[0] * 9, 0.0, 0.0)


@contextmanager
def fuzzed_server(tokenizer):
    """Run a server with a scripted engine, and yield what schemathesis makes of its description."""
    loop = CheckingLoop("a ", '{"type": "function", "name": "f", "parameters": {}}')
    served = ServedModel("m", loop, tokenizer, CONTEXT, frozenset("*"))
    allowing = ServeSettings(allowed_hosts=("*",), drain_seconds=0)
    document = create_app(served, None, allowing).openapi()
    with running(served, allowing) as url:
        schema = schemathesis.openapi.from_dict(json.loads(json.dumps(document)))
        schema.config.update(base_url=url)
        yield schema


@pytest.fixture(scope="module")
def fuzzed(tokenizer):
    with fuzzed_server(tokenizer) as schema:
        yield schema


def send(schema, n_examples):
    """Send ``n_examples`` requests to each operation, half of them valid by its description. Return their number."""
    statuses = Counter()
    for operation in (each.ok() for each in schema.get_all_operations()):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                cases = operation.as_strategy(generation_mode=mode)

                @settings(max_examples=n_examples // 2, **QUIET)
                @given(case=cases)
                def answer(case):
                    response = case.call(timeout=60)
                    statuses[response.status_code] += 1
                    assert response.status_code < 500, f"{case.as_curl_command()}\n{response.text}"
                    if response.status_code >= 400 and case.method != "HEAD":
                        assert "error" in response.json()

                answer()
            except (Unsatisfiable, SchemathesisError):  # nothing can be invalid in a request without a body
                continue
    return statuses


def test_no_request_makes_the_server_fail(fuzzed):
    statuses = send(fuzzed, N_EXAMPLES)
    assert sum(statuses.values()) >= 200
    assert min(statuses[200], statuses[400]) >= 20


@pytest.mark.soak
def test_none_of_2000_requests_makes_the_server_fail(fuzzed):
    assert sum(send(fuzzed, N_SOAK).values()) >= 2000
