"""What a gateway passes on to other servers as it is, and what it controls so that limits and bills stay exact."""

# ruff: noqa: F811
from __future__ import annotations

import base64
import json
import struct

import openai
import pytest
from test_upstream_failures import ASKED, CARD, PROMPT_TOKENS, ScriptedUpstream, ask, billed, gateway  # noqa: F401

from herd.serve.fields import sort_fields
from herd.serve.keys import KeyPolicy, TokenBudget

LARGE = CARD | {"max_model_len": 100_000}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk=", "detail": "low"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}


def look(*parts) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, *parts]}]


@pytest.fixture
def upstream():
    return ScriptedUpstream(["one ", "two"], card=LARGE)


@pytest.fixture
def client(gateway, upstream):
    http = gateway(upstream)
    key = http.headers["authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=key, max_retries=0) as client:
        yield client


def test_fields_that_only_the_other_server_knows_reach_it_as_they_are(client, upstream, store):
    structure = {"type": "structural_tag", "format": {"type": "any_text"}}
    passed = {
        "chat_template_kwargs": {"enable_thinking": False}, "top_a": 0.1, "min_tokens": 2, "bad_words": ["x"],
        "thinking": {"type": "disabled"}, "grammar": 'root ::= "a"',
    }  # fmt: skip
    raw = client.chat.completions.with_raw_response.create(
        **ASKED, reasoning_effort="none", verbosity="low", response_format=structure, extra_body=passed
    )
    body = upstream.bodies[0]
    assert {name: body[name] for name in passed} == passed
    assert (body["reasoning_effort"], body["verbosity"], body["response_format"]) == (
        "none",
        "low",
        structure,
    )
    assert "x-herd-warnings" not in raw.headers
    assert raw.parse().usage.completion_tokens == 5
    assert billed(store) == (1, PROMPT_TOKENS, 5)
    client.completions.create(model="m", prompt="six", suffix="end", extra_body={"top_a": 0.1})
    assert (upstream.bodies[1]["suffix"], upstream.bodies[1]["top_a"]) == ("end", 0.1)
    client.responses.create(model="m", input="six", reasoning={"effort": "high"})
    assert upstream.bodies[2]["reasoning_effort"] == "high"


def test_fields_of_messages_that_only_the_other_server_knows_reach_it(client, upstream):
    message = {"role": "user", "content": "six", "name": "bob", "cache_control": {"type": "ephemeral"}}
    client.chat.completions.create(model="m", messages=[message])
    assert upstream.bodies[0]["messages"] == [message]


def test_what_could_change_the_cost_or_escape_a_limit_is_never_passed_on(client, upstream, store):
    withheld = {
        "n_predict": -1, "best_of": 9, "prompt": "x", "priority": -9, "models": ["dear"], "service_tier": "priority",
        "kv_transfer_params": {"remote_host": "10.0.0.1"}, "id_slot": 1, "store": True, "use_beam_search": True,
        "prompt_cache_key": "shared", "web_search_options": {}, "max_output_tokens": 10**6,
    }  # fmt: skip
    controlled = {"stream_options": {"include_usage": False}, "stream": False, "cache_salt": "mine"}
    raw = client.chat.completions.with_raw_response.create(**ASKED, extra_body=withheld | controlled)
    body = upstream.bodies[0]
    assert not withheld.keys() & body.keys()
    assert (body["max_tokens"], body["stream"], "n" in body) == (50, True, False)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert body["cache_salt"] != "mine"
    for name in withheld.keys() - {"prompt_cache_key"}:
        assert f"{name}=" in raw.headers["x-herd-warnings"]
    assert billed(store) == (1, PROMPT_TOKENS, 5)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"messages": look({"type": "image_url", "image_url": {"url": "http://10.0.0.1/a.png"}})}, "messages[0].content[1]"),
        ({"messages": look({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})}, "messages[0].content[1]"),
        ({"messages": look({"type": "image_url", "image_url": None, "uuid": "x"})}, "messages[0].content[1]"),
        ({"messages": look(PICTURE, {"type": "file", "file": {"file_id": "x"}})}, "messages[0].content[2]"),
        ({"messages": [*look(PICTURE), {"role": "system", "content": [PICTURE]}]}, "messages[1].content[0]"),
    ],
    ids=str,
)  # fmt: skip
def test_what_this_server_must_decide_is_refused(client, upstream, more, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            **{**ASKED, **{k: more[k] for k in more if k == "messages"}}, extra_body=more
        )
    assert error.value.param == param
    assert upstream.bodies == []


def test_pictures_and_sounds_reach_the_model_and_cost_what_its_server_says(client, upstream, store):
    parts = [PICTURE | {"uuid": "of-another-client"}, SOUND]
    answer = client.chat.completions.create(model="m", messages=look(*parts), max_tokens=9)
    assert answer.choices[0].message.content == "one two"
    assert upstream.bodies[0]["messages"] == look(PICTURE, SOUND)
    assert billed(store) == (1, PROMPT_TOKENS, 5)
    assert [path for path, *_ in upstream.requests] == [
        "/v1/chat/completions"
    ]  # /tokenize would count the text only
    with pytest.raises(openai.BadRequestError, match="counted"):
        client.post("/chat/completions/input_tokens", body={"messages": look(PICTURE)}, cast_to=object)


@pytest.mark.parametrize("room", [99_999, 100_009])
def test_a_request_with_a_picture_reserves_the_whole_context(gateway, upstream, room):
    budget = (TokenBudget(unit="tokens", period="day", amount=room),)
    http = gateway(upstream, policy=KeyPolicy(budgets=budget))
    response = ask(http, messages=look(PICTURE), max_tokens=9)
    assert response.status_code == (200 if room >= 100_009 else 429)


def test_what_a_passed_field_may_add_to_the_prompt_is_reserved(gateway):
    upstream = ScriptedUpstream(["one"], card=LARGE)
    http = gateway(
        upstream, policy=KeyPolicy(budgets=(TokenBudget(unit="tokens", period="day", amount=500),))
    )
    assert ask(http, documents=[{"text": "x" * 1000}]).status_code == 429
    assert ask(http, chat_template_kwargs={"enable_thinking": False}).status_code == 200
    counted = [body for path, _, body in upstream.requests if path == "/tokenize"]
    assert counted[-1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_strict_gateway_passes_on_no_unknown_field():
    with pytest.raises(Exception, match="top_a: unknown field"):
        sort_fields("chat", {"top_a": 1}, strict=True, is_upstream=True)
    assert sort_fields("chat", {"reasoning_effort": "low"}, strict=True, is_upstream=True)[0]


def embedding(index, numbers=(0.5, -1.0)) -> dict:
    return {"index": index, "embedding": list(numbers)}


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ([embedding(1, (1.0, 2.0)), embedding(0)], 200),
        ([embedding(0), {"index": 1, "embedding": base64.b64encode(struct.pack("<2f", 1, 2)).decode()}], 200),
        ([embedding(0)], 502),
        ([embedding(0), embedding(1, (float("nan"), 1.0))], 502),
        ([embedding(0), embedding(1, ("a",))], 502),
        ([embedding(0), {"index": 1, "embedding": "!"}], 502),
        ("what", 502),
    ],
    ids=str,
)
def test_an_upstream_s_own_embeddings(gateway, store, data, status):
    usage = {"prompt_tokens": 11, "total_tokens": 11}
    upstream = ScriptedUpstream((200, {"data": data, "usage": usage}), card=CARD | {"owned_by": "someone"})
    http = gateway(upstream)
    asked = {
        "model": "m",
        "input": ["a", "b"],
        "dimensions": 2,
        "input_type": "query",
        "user": "bob",
        "priority": 1,
    }
    response = http.post("/v1/embeddings", json=asked)
    assert response.status_code == status, response.text
    ((path, _, body),) = upstream.requests
    assert (path, body["input"], body["encoding_format"]) == ("/v1/embeddings", ["a", "b"], "base64")
    assert (body["dimensions"], body["input_type"]) == (2, "query")
    assert not {"user", "priority", "stream", "max_tokens"} & body.keys()
    if status == 200:
        assert [each["embedding"] for each in response.json()["data"]] == [[0.5, -1.0], [1.0, 2.0]]
        assert response.json()["usage"]["prompt_tokens"] == 11
    assert billed(store) == ((1, 11, 0) if status == 200 else (0, 0, 0))


def test_the_refusals_of_an_upstream(gateway, store):
    upstream = ScriptedUpstream((400, {"error": {"message": "not an embedding model"}}), (500, {}))
    http = gateway(upstream)
    for status, words in ((400, "not an embedding model"), (502, "failed")):
        response = http.post("/v1/embeddings", json={"model": "m", "input": "a"})
        assert (response.status_code, words in json.dumps(response.json())) == (status, True)
    assert billed(store) == (0, 0, 0)
