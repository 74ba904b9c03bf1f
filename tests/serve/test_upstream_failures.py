"""What a gateway does with upstreams that fail, hang, break off or lie, and what it tells them and never tells."""

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from conftest import running, wait_until
from herd.serve.keys import KeyPolicy, TokenBudget, create_key
from herd.serve.models import ModelPool
from herd.serve.settings import ServeSettings
from herd.serve.upstream_model import UpstreamModels
from herd.serve.upstreams import Fleet, UpstreamTimes
from herd.serve.usage import read_usage

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from scripted_upstream import BREAK, CARD, PROMPT_TOKENS, ScriptedUpstream, serving

ASKED = {"model": "m", "messages": [{"role": "user", "content": "six"}], "max_tokens": 50}
KEY = "upstream-key"


@pytest.fixture
def gateway(store):
    """Return a function that runs a gateway before scripted upstreams, and returns a client with a key."""
    with ExitStack() as stack:

        def start(*upstreams, policy=None, times=None, with_keys=True):
            ports = [stack.enter_context(serving(each)) for each in upstreams]
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            fleet = Fleet(urls, KEY, b"secret", times=times or UpstreamTimes(), refresh_seconds=0.1)
            settings = ServeSettings(drain_seconds=0)
            used = store if with_keys else None
            url = stack.enter_context(running(ModelPool([]), settings, used, upstreams=UpstreamModels(fleet)))
            _, token = create_key(store, "alice", policy or KeyPolicy(), actor="test")
            headers = {"authorization": f"Bearer {token}"} if with_keys else {}
            return stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=30))

        yield start


def ask(client, text: str = "six", **more) -> httpx.Response:
    more = {"messages": [{"role": "user", "content": text}], **more}
    return client.post("/v1/chat/completions", json=ASKED | more)


def billed(store) -> tuple[int, int, int]:
    """Return billed requests, prompt tokens and completion tokens. Nothing stays reserved."""
    wait_until(lambda: not sum(row.reserved_tokens for row in read_usage(store)))
    rows = read_usage(store)
    return tuple(
        sum(getattr(row, name) for row in rows) for name in ("requests", "prompt_tokens", "completion_tokens")
    )


def text_of(response: httpx.Response) -> tuple[str, dict | None]:
    """Return the text of a stream and its error."""
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e.get("choices"))
    return text, next((event["error"] for event in events if "error" in event), None)


def test_the_bill_is_the_upstream_s_usage_and_nothing_is_passed_on_that_should_not(gateway, store):
    upstream = ScriptedUpstream(["one ", "two"])
    client = gateway(upstream)
    response = ask(client, cache_salt="mine", user="bob")
    assert response.json()["choices"][0]["message"]["content"] == "one two"
    assert response.json()["usage"]["completion_tokens"] == 5
    assert "x-upstream-secret" not in response.headers
    assert billed(store) == (1, PROMPT_TOKENS, 5)
    sent = [(path, headers) for path, headers, _ in upstream.requests]
    assert [path for path, _ in sent] == ["/tokenize", "/v1/chat/completions"]
    for _, headers in sent:
        assert headers["authorization"] == f"Bearer {KEY}"
        assert headers["accept-encoding"] == "identity"
        assert not {"x-api-key", "cookie", "x-forwarded-for", "idempotency-key"} & headers.keys()
    body = upstream.bodies[0]
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert len(body["cache_salt"]) == 43
    assert body["cache_salt"] != "mine"
    assert "user" not in body
    ask(client)
    assert (
        upstream.bodies[1]["cache_salt"] != body["cache_salt"]
    )  # the client's salt divides its group's cache


def test_a_prompt_is_not_counted_if_its_upper_bound_fits(gateway, store):
    upstream = ScriptedUpstream(["one ", "two"], card=CARD | {"max_model_len": 100_000})
    assert ask(gateway(upstream)).status_code == 200
    assert [path for path, *_ in upstream.requests] == ["/v1/chat/completions"]
    assert billed(store) == (1, PROMPT_TOKENS, 5)


def test_keys_of_a_cache_group_have_the_same_salt_and_others_another(gateway, store):
    upstream = ScriptedUpstream(["one"])
    client = gateway(upstream)
    tokens = [
        create_key(store, f"key{n}", KeyPolicy(cache_group=group), actor="test")[1]
        for n, group in enumerate(("team", "team", None))
    ]
    for token in tokens:
        assert (
            ask(client.__class__(base_url=client.base_url, headers={"x-api-key": token})).status_code == 200
        )
    first, second, third = (body["cache_salt"] for body in upstream.bodies)
    assert first == second != third


def test_a_stream_that_breaks_is_an_error_event_and_bills_what_was_delivered(gateway, store):
    client = gateway(ScriptedUpstream(["one ", "two", BREAK]))
    text, error = text_of(ask(client, stream=True))
    assert text == "one two"
    assert error["code"] == "upstream_failed"
    assert billed(store) == (1, PROMPT_TOKENS, 4)


def test_without_usage_in_the_chunks_each_is_counted_as_one_token(gateway, store):
    card = CARD | {"owned_by": "someone"}
    upstream = ScriptedUpstream(["one ", "two", BREAK], ["all"], card=card, tells=False, tokenizes=False)
    client = gateway(upstream)
    assert text_of(ask(client, stream=True))[0] == "one two"
    requests, prompt, completion = billed(store)
    assert (requests, completion) == (1, 2)
    assert prompt == len('[{"role":"user","content":"six"}]') // 4  # an estimate, as no one told the number
    assert ask(client).status_code == 200  # whole: the usage at the end counts
    assert billed(store) == (2, prompt + PROMPT_TOKENS, 2 + 3)
    assert upstream.bodies[0]["stream_options"] == {"include_usage": True}


def test_an_unstreamed_answer_that_breaks_is_a_502_and_bills_nothing(gateway, store):
    client = gateway(ScriptedUpstream(["one ", BREAK]))
    response = ask(client)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_failed")
    assert billed(store) == (0, 0, 0)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ((500, {"error": {"message": "secret inside"}}), 502),
        ((401, {"error": "no key"}), 502),
        ((302, {}, [(b"location", b"http://127.0.0.1:1/v1/chat/completions")]), 502),
        ((503, {"error": "busy"}, [(b"retry-after", b"7")]), 503),
        ((429, {"error": "busy"}), 503),
        ((200, {"id": "no stream"}), 502),
        (["", {"choices": [{"index": 9, "delta": {"content": "x"}}]}], 502),
        (["", {"choices": "what"}], 502),
        ([BREAK], 502),
    ],
)
def test_failures_of_the_only_upstream(gateway, store, answer, status):
    response = ask(gateway(ScriptedUpstream(answer)))
    assert response.status_code == status
    assert "secret" not in response.text
    if status == 503:
        assert response.headers["retry-after"] == ("7" if answer[0] == 503 else "2")
    assert billed(store) == (0, 0, 0)


def test_a_prompt_that_is_too_long_for_vllm_has_the_code_that_clients_know(gateway):
    body = {"error": {"message": "at least 1025 input tokens", "param": "input_tokens", "code": 400}}
    error = ask(gateway(ScriptedUpstream((400, body)))).json()["error"]
    assert (error["code"], error["message"]) == ("context_length_exceeded", "at least 1025 input tokens")


@pytest.mark.parametrize("code", [400, 422])
def test_the_upstream_s_400_is_a_400_with_its_message(gateway, code):
    body = {"error": {"message": "tool_choice auto needs a parser", "code": 400}}
    client = gateway(ScriptedUpstream((code, body)))
    for stream in (False, True):
        response = ask(client, stream=stream)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "tool_choice auto needs a parser"


@pytest.mark.parametrize(
    "failure",
    [(500, {}), (503, {}), (401, {}), [BREAK], ["", BREAK], [{"error": {"message": "no", "code": 500}}]],
)
def test_another_upstream_is_tried_only_before_the_first_byte(gateway, store, failure):
    failing, good = ScriptedUpstream(failure), ScriptedUpstream(["good"])
    client = gateway(failing, good)
    count = 0
    while not failing.bodies:
        count += 1
        assert text_of(ask(client, f"{count}", stream=True)) == ("good", None)
    assert billed(store) == (count, count * PROMPT_TOKENS, count * 3)


def test_after_the_first_byte_nothing_is_tried_again(gateway):
    first, second = ScriptedUpstream(["one", BREAK]), ScriptedUpstream(["one", BREAK])
    text, error = text_of(ask(gateway(first, second), stream=True))
    assert (text, error["code"]) == ("one", "upstream_failed")
    assert len(first.bodies) + len(second.bodies) == 1


def test_an_upstream_that_is_down_is_skipped_and_comes_back(store):
    first, second = ScriptedUpstream(["first"]), ScriptedUpstream(["second"])
    with serving(second) as port, ExitStack() as stack:
        first_port = stack.enter_context(serving(first))
        fleet = Fleet(
            [f"http://127.0.0.1:{each}" for each in (first_port, port)], None, b"", refresh_seconds=0.1
        )
        with (
            running(ModelPool([]), upstreams=UpstreamModels(fleet)) as url,
            httpx.Client(base_url=url) as client,
        ):

            def answers() -> set[str]:
                asked = [ask(client, f"{number}").json() for number in range(24)]
                return {each["choices"][0]["message"]["content"] for each in asked}

            assert answers() == {"first", "second"}
            stack.close()
            assert answers() == {"second"}
            assert not fleet.upstreams[0].is_up
            with serving(first, first_port):
                wait_until(lambda: fleet.upstreams[0].is_up)
                assert answers() == {"first", "second"}
                assert "authorization" not in first.requests[-1][1]


def test_models_come_and_go_with_their_upstreams(gateway):
    upstream = ScriptedUpstream(["one"])
    client = gateway(upstream)
    assert ask(client).status_code == 200
    upstream.card = CARD | {"id": "other", "max_model_len": 77}
    wait_until(lambda: ask(client).status_code == 404)
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["max_model_len"]) == ("other", 77)


def test_silent_upstreams_are_left(gateway, store):
    times = UpstreamTimes(first=0.4, silence=0.3)
    slow, good = ScriptedUpstream([5.0, "late"]), ScriptedUpstream(["good"])
    client = gateway(slow, good, times=times)
    while not slow.bodies:
        assert text_of(ask(client, f"{len(good.bodies)}", stream=True)) == ("good", None)
    wait_until(lambda: slow.open == 0)


def test_silence_after_the_first_byte_ends_the_answer(gateway, store):
    client = gateway(ScriptedUpstream(["one", 5.0, "two"]), times=UpstreamTimes(first=3, silence=0.3))
    text, error = text_of(ask(client, stream=True))
    assert (text, error["code"]) == ("one", "upstream_failed")
    assert billed(store) == (1, PROMPT_TOKENS, 2)


def test_a_client_that_goes_away_ends_the_upstream_s_work(gateway, store):
    upstream = ScriptedUpstream(["one", *[0.05, "more"] * 400])
    client = gateway(upstream)
    with client.stream("POST", "/v1/chat/completions", json=ASKED | {"stream": True}) as response:
        next(response.iter_lines())
        wait_until(lambda: upstream.open == 1)
    wait_until(lambda: upstream.open == 0)
    requests, prompt, completion = billed(store)
    assert (requests, prompt) == (1, PROMPT_TOKENS)
    assert 0 <= completion < 100


def test_a_revoked_key_ends_its_stream(gateway, store):
    from herd.serve.keys import list_keys, revoke_key

    client = gateway(ScriptedUpstream(["one", *[0.05, "more"] * 400]))
    with client.stream("POST", "/v1/chat/completions", json=ASKED | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        revoke_key(store, list_keys(store)[0].id, actor="test")
        assert "invalid_api_key" in "".join(lines)


def test_requests_go_to_the_least_loaded_upstream(gateway):
    slow, quick = ScriptedUpstream(["one", 3.0, "two"]), ScriptedUpstream(["quick"])
    client = gateway(slow, quick, with_keys=False)
    with ExitStack() as stack:
        while not slow.open:
            asked = ASKED | {
                "stream": True,
                "messages": [{"role": "user", "content": f"{len(quick.bodies)}"}],
            }
            stack.enter_context(client.stream("POST", "/v1/chat/completions", json=asked))
            time.sleep(0.05)
        n_before = len(slow.bodies)
        for number in range(5):
            assert ask(client, f"{number}").json()["choices"][0]["message"]["content"] == "quick"
        assert len(slow.bodies) == n_before


def test_a_budget_reserves_what_the_upstream_counts(gateway, store):
    budget = (TokenBudget(unit="tokens", period="day", amount=PROMPT_TOKENS + 50),)
    card = CARD | {"max_model_len": 100_000}  # the upper bound fits the context, but not the budget
    client = gateway(ScriptedUpstream(["one"], card=card), policy=KeyPolicy(budgets=budget))
    assert ask(client).status_code == 200
    assert ask(client).status_code == 429
    assert ask(client, max_tokens=40).status_code == 200


def test_an_upstream_without_a_tokenizer_reserves_an_upper_bound(gateway, store):
    budget = (TokenBudget(unit="tokens", period="day", amount=PROMPT_TOKENS + 50),)
    upstream = ScriptedUpstream(["one"], tokenizes=False)
    client = gateway(upstream, policy=KeyPolicy(budgets=budget))
    assert ask(client).status_code == 429
    assert [path for path, *_ in upstream.requests] == ["/tokenize"]


@pytest.mark.parametrize("with_keys", [False, True])
def test_an_answer_that_may_be_longer_than_the_context_is_limited_to_it(gateway, with_keys):
    upstream = ScriptedUpstream(["one"])
    client = gateway(upstream, with_keys=with_keys)
    response = ask(client, max_tokens=32_000)
    assert upstream.bodies[0]["max_tokens"] == 1000 - PROMPT_TOKENS
    assert "max_tokens" in response.headers["x-herd-warnings"]


def test_no_upstream_at_all_is_a_503(gateway):
    client = gateway()
    assert ask(client).status_code == 503
    assert client.get("/v1/models").json()["data"] == []
