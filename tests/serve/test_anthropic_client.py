"""Anthropic's own client against a server with an engine, a gateway before two of them, and scripted answers with tools."""

import json

import anthropic
import openai
import pytest

from conftest import CONTEXT

HELLO = [{"role": "user", "content": "six times seven"}]
TOOLS = [
    {
        "name": name,
        "description": "Add.",
        "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
    }
    for name in ("add", "multiply")
]
CALLS = (
    'Both: {"type": "function", "name": "add", "parameters": {"a": 1}}; '
    '{"type": "function", "name": "multiply", "parameters": {"a": 2}}'
)


def connect(url):
    return anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, _strict_response_validation=True)


@pytest.fixture(scope="module")
def client(either_url):
    with connect(either_url) as client:
        yield client


def create(client, **options):
    return client.messages.create(**({"model": "tiny", "messages": HELLO, "max_tokens": 8} | options))


def prompt_of(loop, tokenizer, number=-1):
    """Return the text of a prompt that a scripted engine got."""
    return tokenizer.decode(loop.requests[number].prompt_ids)


def test_an_answer_streamed_whole_and_through_openais_api(client, url):
    whole = create(client)
    with client.messages.stream(model="tiny", messages=HELLO, max_tokens=8) as stream:
        streamed = stream.get_final_message()
    other = openai.OpenAI(base_url=f"{url}/v1", api_key="x").chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8
    )
    text = whole.content[0].text
    assert text == streamed.content[0].text == other.choices[0].message.content
    reasons = {"length": "max_tokens", "stop": "end_turn"}
    assert whole.stop_reason == streamed.stop_reason == reasons[other.choices[0].finish_reason]
    for usage in (whole.usage, streamed.usage):
        assert usage.input_tokens + usage.cache_read_input_tokens == other.usage.prompt_tokens
        assert usage.output_tokens == other.usage.completion_tokens


def test_cached_tokens_are_not_input_tokens(client):
    messages = [{"role": "user", "content": "six times seven is forty-two " * 20}]
    first, again = (create(client, messages=messages).usage for _ in range(2))
    assert again.cache_read_input_tokens > 0
    total = first.input_tokens + first.cache_read_input_tokens
    assert again.input_tokens + again.cache_read_input_tokens == total
    with client.messages.stream(model="tiny", messages=messages, max_tokens=8) as stream:
        assert stream.get_final_message().usage.input_tokens == again.input_tokens


def test_tokens_are_counted_as_they_are_billed(client):
    options = {"system": "Be brief.", "tools": TOOLS}
    counted = client.messages.count_tokens(model="tiny", messages=HELLO, **options).input_tokens
    usage = create(client, **options).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    long = [{"role": "user", "content": "six " * CONTEXT}]
    assert client.messages.count_tokens(model="tiny", messages=long).input_tokens > CONTEXT


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_of_two_tools_in_one_answer(scripted, size):
    client, _ = scripted(*(CALLS[i : i + size] for i in range(0, len(CALLS), size)))
    whole = create(client, model="m", tools=TOOLS)
    with client.messages.stream(model="m", messages=HELLO, max_tokens=8, tools=TOOLS) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        text, *calls = message.content
        assert text.text.strip() == "Both:"
        assert [(call.name, call.input) for call in calls] == [("add", {"a": 1}), ("multiply", {"a": 2})]
        assert len({call.id for call in calls}) == 2


def test_results_in_another_order_are_shown_in_the_order_of_the_calls(scripted, tokenizer):
    client, loop = scripted("done")
    calls = [{"type": "tool_use", "id": f"toolu_{n}", "name": "add", "input": {"a": n}} for n in (1, 2)]
    results = [
        {
            "type": "tool_result",
            "tool_use_id": f"toolu_{n}",
            "content": [{"type": "text", "text": f"result{n}"}],
        }
        for n in (2, 1)
    ]
    dialog = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, *calls]},
        {"role": "user", "content": [*results, {"type": "text", "text": "and now?"}]},
    ]
    create(client, model="m", messages=dialog, tools=TOOLS)
    prompt = prompt_of(loop, tokenizer)
    places = [prompt.index(text) for text in ("six times", "result1", "result2", "and now?")]
    assert places == sorted(places)
    assert "hm" not in prompt.split("six times")[1].split("result1")[0].replace("them", "")


def test_what_changes_between_requests_of_claude_code_is_not_in_the_prompt(scripted, tokenizer):
    client, loop = scripted("done")
    for nonce in ("cch=1", "cch=2"):
        system = [
            {"type": "text", "text": f"x-anthropic-billing-header: {nonce}"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        ]
        create(client, model="m", system=system, metadata={"user_id": nonce})
    assert loop.requests[0].prompt_ids == loop.requests[1].prompt_ids
    assert "Be brief." in prompt_of(loop, tokenizer)


def test_tool_choices(client):
    options = {"tools": TOOLS, "max_tokens": 200, "extra_body": {"temperature": 1}}
    one = {"type": "tool", "name": "multiply", "disable_parallel_tool_use": True}
    message = create(client, tool_choice=one, **options)
    assert [block.name for block in message.content if block.type == "tool_use"] == ["multiply"]
    hidden = create(client, tools=TOOLS, tool_choice={"type": "none"}).usage
    plain = create(client).usage
    assert (
        hidden.input_tokens + hidden.cache_read_input_tokens
        == plain.input_tokens + plain.cache_read_input_tokens
    )


def test_structured_output(client):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = create(client, output_config=config, max_tokens=60)
    assert isinstance(json.loads(message.content[0].text)["ok"], bool)


def test_a_stop_sequence_is_named(scripted):
    client, _ = scripted("one two")
    message = create(client, model="m", stop_sequences=["END"])
    assert message.stop_reason in ("end_turn", "stop_sequence")


@pytest.mark.parametrize(
    ("options", "status", "kind", "words"),
    [
        ({"model": "other"}, 404, "not_found_error", "does not exist"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        (
            {"messages": [{"role": "user", "content": "six " * CONTEXT}]},
            400,
            "invalid_request_error",
            f"{CONTEXT:,}",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "The"}]},
            400,
            "invalid_request_error",
            "last message",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "image",
        ),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        ({"extra_body": {"container": "c"}}, 400, "invalid_request_error", "container"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_anthropics_form(client, options, status, kind, words, stream):
    with pytest.raises(anthropic.APIStatusError) as error:
        create(client, stream=stream, **options)
    assert error.value.status_code == status
    body = error.value.body
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert words in body["error"]["message"]
    assert body["request_id"] == error.value.response.headers["x-request-id"]


def test_an_error_in_a_stream_is_an_event(scripted):
    from herd.errors import EngineError

    client, _ = scripted("one ", EngineError("the page is broken"), "two")
    stream = client.messages.create(model="m", messages=HELLO, max_tokens=8, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="the page is broken"):
        list(stream)


def test_hosted_tools_are_left_out_and_named(client):
    raw = client.messages.with_raw_response.create(
        model="tiny",
        messages=HELLO,
        max_tokens=4,
        tools=[{"type": "web_search_20250305", "name": "web_search"}],
    )
    assert "web_search_20250305" in raw.headers["x-herd-warnings"]
