"""Keys and the ledger through the whole application: every route, every credential, and a bill for every answer."""

import json
import re
import threading
import time

import httpx
import pytest
from billing import rows_of, totals
from fastapi import APIRouter
from fastapi.testclient import TestClient
from test_auth import hostile_tokens
from test_metrics import STATS

from conftest import CONTEXT, ScriptedLoop, running, wait_until
from herd.engine.engine import Engine
from herd.engine.loop import EngineLoop
from herd.engine.request import Request, Sampling
from herd.errors import EngineError
from herd.serve.app import create_app
from herd.serve.auth import all_routes, refuse_unscoped, scope_of
from herd.serve.chat import ServedModel
from herd.serve.keys import SCOPES, KeyPolicy, TokenBudget, create_key, find_key, revoke_key, rotate_key
from herd.serve.prices import TokenPrice, set_price
from herd.serve.settings import ServeSettings
from herd.serve.store import now_ms

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "six"}], "max_tokens": 20}
SETTINGS = ServeSettings(ping_seconds=0.1, stall_seconds=5, drain_seconds=0)


def scripted(tokenizer, *pieces, **options) -> ServedModel:
    loop = ScriptedLoop(*pieces, **options)
    loop.close = lambda seconds: None
    return ServedModel("m", loop, tokenizer, CONTEXT)


@pytest.fixture
def client(store, tokenizer):
    app = create_app(scripted(tokenizer, "a", "b"), store, SETTINGS)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def guarded(client) -> list[tuple[str, str, str]]:
    """Return (method, path, scope) of every route of the application that needs a key."""
    routes = [route for route in all_routes(client.app.routes) if scope_of(route) != "public"]
    return [
        (method, re.sub(r"\{[^}]*\}", "x", route.path), scope_of(route))
        for route in routes
        for method in route.methods
    ]


def headers_of(token: str) -> list[dict[str, str]]:
    return [{"authorization": f"Bearer {token}"}, {"x-api-key": token}]


def test_every_route_refuses_every_wrong_credential(store, client):
    _, revoked = create_key(store, "revoked", KeyPolicy(scopes=set(SCOPES)), actor="test")
    _, rotated = create_key(store, "rotated", KeyPolicy(scopes=set(SCOPES)), actor="test")
    _, expired = create_key(
        store, "expired", KeyPolicy(scopes=set(SCOPES)), actor="test", expires_ms=now_ms() + 20
    )
    revoke_key(store, "revoked", "test")
    rotate_key(store, "rotated", "test")
    narrow = {
        scope: create_key(store, f"not {scope}", KeyPolicy(scopes=set(SCOPES) - {scope}), actor="test")[1]
        for scope in SCOPES
    }
    _, good = create_key(store, "good", KeyPolicy(scopes=set(SCOPES)), actor="test")
    time.sleep(0.03)
    before = totals(store), len(rows_of(store))
    routes = guarded(client)
    assert {scope for _, _, scope in routes} >= {
        "chat",
        "completions",
        "models",
        "tokenize",
        "usage",
        "metrics",
        "admin",
    }
    for method, path, scope in routes:
        wrong = [
            {},
            {"cookie": f"key={good}; authorization={good}"},
            {"authorization": good},
            {"authorization": "Bearer"},
        ]
        for token in ("nonsense", revoked, rotated, expired, good[:-1], good + "x", *hostile_tokens()[::40]):
            wrong += [
                {name: value.encode() for name, value in headers.items()} for headers in headers_of(token)
            ]
        for headers in wrong:
            answer = client.request(method, path, headers=headers, params={"key": good, "api_key": good})
            assert answer.status_code == 401, (method, path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
        for headers in headers_of(narrow[scope]):
            assert client.request(method, path, headers=headers).status_code == 403, (method, path)
        for headers in headers_of(good):
            assert client.request(method, path, headers=headers).status_code not in (401, 403), (method, path)
        good = create_key(
            store, f"good for {method} {path}".replace("/", " "), KeyPolicy(scopes=set(SCOPES)), actor="t"
        )[1]
    assert (totals(store), len(rows_of(store))) == before


def test_no_other_spelling_of_a_route_avoids_the_check(client):
    for method, path, _ in guarded(client):
        first, *rest = path.strip("/").split("/")
        inner = "/".join(rest)
        spellings = [f"{path}{end}" for end in ("/", "%00", ";x", "?x", ".json", "%20", "/.")]
        spellings += [
            f"{start}{path}" for start in ("/", "/.", "/x/..", "/%2e", "/health/..", "/health/%2e%2e")
        ]
        spellings += [path.replace("/", "//"), path.upper(), f"/{first}/%2e/{inner}", f"/{first}%2f{inner}"]
        for spelling in spellings:
            for verb in (method, "HEAD", "OPTIONS", "PUT", "TRACE"):
                status = client.request(
                    verb, f"http://127.0.0.1{spelling}", follow_redirects=False
                ).status_code
                assert status in (400, 401, 404, 405), (verb, spelling, status)


def test_an_application_with_an_unguarded_route_does_not_start(client):
    router = APIRouter()

    @router.get("/forgotten")
    def forgotten():
        return "?"

    with pytest.raises(RuntimeError, match="/forgotten"):
        refuse_unscoped([*all_routes(client.app.routes), *router.routes])


def user(store, name="alice", **policy) -> dict[str, str]:
    return {"authorization": f"Bearer {create_key(store, name, KeyPolicy(**policy), actor='test')[1]}"}


@pytest.mark.parametrize("stream", [False, True])
def test_the_bill_is_the_usage_that_the_client_sees(store, client, stream):
    set_price(store, "m", TokenPrice(1_000_000, 0, 5_000_000), "EUR", "test")
    body = BODY | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    answer = client.post(CHAT, json=body, headers=user(store))
    assert answer.status_code == 200
    if stream:
        lines = [
            line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")
        ]
        usage = next(value["usage"] for line in lines[::-1] if (value := json.loads(line)).get("usage"))
    else:
        usage = answer.json()["usage"]
    (row,) = rows_of(store)
    assert (row.status, row.endpoint, row.model) == ("completed", CHAT, "m")
    assert (row.prompt_tokens, row.completion_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert row.completion_tokens == 3  # two pieces and the stop token
    assert row.money == row.prompt_tokens + 5 * 3


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_have_the_right_status_and_advice(store, client, stream):
    limited = user(store, budgets=(TokenBudget(unit="tokens", period="day", amount=5),))
    answer = client.post(CHAT, json=BODY | {"stream": stream}, headers=limited)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "false")
    assert answer.json()["error"]["code"] == "insufficient_quota"
    slow = user(store, "slow", requests_per_minute=1)
    assert client.post(CHAT, json=BODY, headers=slow).status_code == 200
    answer = client.post(CHAT, json=BODY | {"stream": stream}, headers=slow)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "true")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    other = user(store, "other", models={"another"})
    assert client.post(CHAT, json=BODY | {"stream": stream}, headers=other).status_code == 403
    assert len(rows_of(store)) == 1


def test_a_repeated_request_with_an_idempotency_key_is_billed_once(store, client):
    alice = user(store) | {"idempotency-key": "retry-1"}
    assert client.post(CHAT, json=BODY, headers=alice).status_code == 200
    again = client.post(CHAT, json=BODY, headers=alice)
    assert (again.status_code, again.headers["x-should-retry"]) == (409, "false")
    assert totals(store)[0] == 1
    for bad in ("", "x" * 129, "a\tb"):
        assert client.post(CHAT, json=BODY, headers=alice | {"idempotency-key": bad}).status_code == 400


def test_an_error_before_the_first_byte_bills_nothing_and_may_be_repeated(store, tokenizer):
    served = scripted(tokenizer, EngineError("broken"))
    with TestClient(create_app(served, store, SETTINGS), base_url="http://127.0.0.1") as client:
        alice = user(store) | {"idempotency-key": "retry-1"}
        for _ in range(3):
            assert client.post(CHAT, json=BODY, headers=alice).status_code == 500
    assert totals(store) == (0,) * 7
    assert [row.status for row in rows_of(store)] == ["failed"]


def test_a_store_that_is_away_is_a_503(store, client, monkeypatch):
    alice = user(store)

    def away(durable=False):
        from herd.serve.errors import StoreError

        raise StoreError("away (test)")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", away)
        answer = client.post(CHAT, json=BODY, headers=alice)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "true")
        patch.setattr(store, "read", away)
        assert client.get("/v1/models", headers=alice).status_code == 503
    assert client.post(CHAT, json=BODY, headers=alice).status_code == 200
    assert totals(store)[0] == 1


def test_revoking_a_key_ends_its_streams_and_bills_what_was_delivered(store, tokenizer):
    pieces = [piece for _ in range(300) for piece in ("a", 0.05)]
    served = scripted(tokenizer, *pieces)
    alice = user(store)
    with running(served, SETTINGS, store) as url:
        events: list[str] = []

        def read() -> None:
            with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}, headers=alice) as response:
                events.extend(line for line in response.iter_lines() if line.startswith("data: "))

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: served.loop.generations and served.loop.generations[0].n_read > 3)
        revoke_key(store, "alice", "test")
        n_read = served.loop.generations[0].n_read
        reader.join(10)
        assert not reader.is_alive()
        assert served.loop.generations[0].cancelled
        assert (
            served.loop.generations[0].n_read - n_read <= 30
        )  # at 20 a second, with room for a busy machine
    assert "revoked" in events[-1]
    assert "[DONE]" not in events[-1]
    (row,) = rows_of(store)
    received = sum('"content":"a"' in event for event in events)
    assert (row.status, row.completion_tokens) == ("failed", received)


@pytest.mark.parametrize("stream", [False, True])
def test_revoking_a_key_ends_its_requests_that_wait_for_the_engine(
    store, tokenizer, loop, stream, monkeypatch
):
    with EngineLoop(Engine(loop.engine.model, tokenizer, max_batch=1)) as narrow:
        step = narrow.engine.step
        monkeypatch.setattr(narrow.engine, "step", lambda: (time.sleep(0.005), step())[1])
        served = ServedModel("m", narrow, tokenizer, CONTEXT)
        no_stop = dict.fromkeys(tokenizer.stop_ids, -100.0)
        (busy,) = narrow.submit(Request([5], Sampling(max_tokens=None, logit_bias=no_stop)))
        alice = user(store)
        with running(served, SETTINGS, store) as url:
            answers: list[httpx.Response] = []
            body = BODY | {"stream": stream}
            reader = threading.Thread(
                target=lambda: answers.append(httpx.post(url + CHAT, json=body, headers=alice, timeout=60))
            )
            reader.start()
            wait_until(lambda: rows_of(store))
            revoke_key(store, "alice", "test")
            reader.join(20)
            assert not busy.done, "the engine became free, so nothing was tested"
            busy.cancel()
        assert not reader.is_alive()
    assert "revoked" in answers[0].text
    assert answers[0].status_code == (200 if stream else 401)
    assert (rows_of(store)[0].status, totals(store)) == ("failed", (0,) * 7)


def test_tokens_that_were_held_back_are_not_billed(store, tokenizer):
    served = scripted(tokenizer, "a", "b", "", 5.0, "c")  # the third token has no text of its own yet
    alice = user(store)
    with running(served, SETTINGS, store) as url:
        with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}, headers=alice) as response:
            lines = response.iter_lines()
            while '"content":"b"' not in next(lines):
                pass
            wait_until(lambda: served.loop.generations[0].n_read >= 3)
        wait_until(lambda: rows_of(store)[0].status != "open")
    assert rows_of(store)[0].completion_tokens == 2


def test_a_client_that_leaves_is_billed_for_what_it_got(store, tokenizer):
    served = scripted(tokenizer, *[piece for _ in range(25) for piece in ("a", 0.04)])
    alice = user(store, concurrent=1)
    with running(served, SETTINGS, store) as url:
        with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}, headers=alice) as response:
            lines = response.iter_lines()
            received = 0
            while received < 5:
                received += '"content":"a"' in next(lines)
        wait_until(lambda: rows_of(store)[0].status == "cancelled")
        assert 5 <= rows_of(store)[0].completion_tokens < 25
        again = httpx.post(url + CHAT, json=BODY, headers=alice | {"x-try": "2"}, timeout=30)
        assert again.status_code == 200
    assert totals(store)[5:] == (0, 0)


def test_cached_prompts_are_shared_within_a_group_and_with_nobody_else(store, served):
    team = [user(store, name, cache_group="team") for name in ("a", "b")]
    alone, other = user(store, "alone"), user(store, "other", cache_group="others")
    info = find_key(store, "alone")
    thief = user(store, "thief", cache_group=info.id)  # names a group as the other key's own
    words = " ".join(f"word{number}" for number in range(60))
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 1}
    with TestClient(create_app(served, store, SETTINGS), base_url="http://127.0.0.1") as client:

        def cached(headers) -> int:
            usage = client.post(CHAT, json=body, headers=headers).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        assert cached(team[0]) == 0
        assert cached(team[1]) > 64
        assert cached(alone) == 0
        assert cached(alone) > 64
        assert cached(other) == 0
        assert cached(thief) == 0
    assert sorted(row.cached_tokens > 64 for row in rows_of(store) if row.key_id == info.id) == [False, True]


def test_metrics_and_stats_need_their_scope_and_count(store, client):
    alice, watcher = user(store), user(store, "watcher", scopes={"metrics"})
    client.post(CHAT, json=BODY, headers=alice)
    client.post(CHAT, json=BODY, headers={"authorization": "Bearer nonsense"})
    client.app.state.models.slots[0].served.loop.stats = lambda: STATS
    text = client.get("/metrics", headers=watcher).text
    assert f'herd_requests_total{{endpoint="{CHAT}",model="m",status="completed"}} 1.0' in text
    assert 'herd_tokens_total{kind="completion",model="m"} 3.0' in text
    assert 'herd_refused_total{code="invalid_api_key"} 1.0' in text
    assert 'herd_engine_active{model="m"} 2.0' in text
    assert client.get("/herd/v1/stats", headers=watcher).json()["m"]["waiting"] == 3


def test_a_server_without_keys_has_no_keys_to_manage(tokenizer):
    app = create_app(scripted(tokenizer, "a"), None, SETTINGS)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.post(CHAT, json=BODY).status_code == 200
        for path in ("/herd/v1/keys", "/herd/v1/usage", "/herd/v1/keys/x"):
            assert client.get(path).status_code == 404
