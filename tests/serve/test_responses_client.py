"""OpenAI's own client on the Responses API, directly and through a gateway, with a real engine and with scripted answers."""

import json

import openai
import pytest

from herd.errors import EngineError

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": False}
CALLS = (
    'Both: {"type": "function", "name": "add", "parameters": {"a": 1}}; '
    '{"type": "function", "name": "n__add", "parameters": {"a": 2}}'
)


def connect(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, _strict_response_validation=True)


@pytest.fixture(scope="module")
def client(either_url):
    with connect(either_url) as client:
        yield client


def create(client, **options):
    return client.responses.create(
        **({"model": "tiny", "input": "six times seven", "max_output_tokens": 16} | options)
    )


def test_an_answer_streamed_whole_and_through_chat_completions(client):
    whole = create(client)
    *_, last = events = list(create(client, stream=True))
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "six times seven"}], max_tokens=16
    )
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == last.response.output_text == chat.choices[0].message.content
    assert last.type == f"response.{whole.status}"
    assert (whole.status == "incomplete") == (chat.choices[0].finish_reason == "length")
    assert whole.incomplete_details is None or whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.output_tokens == last.response.usage.output_tokens == chat.usage.completion_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_the_events_of_a_stream_build_the_output_of_the_last_one(scripted, size):
    client, _ = scripted(*(CALLS[i : i + size] for i in range(0, len(CALLS), size)))
    tools = [TOOL, {"type": "namespace", "name": "n", "tools": [TOOL]}]
    events = list(create(client, model="m", tools=tools, stream=True))
    items: list[dict] = []
    for event in events:
        if event.type == "response.output_item.added":
            assert event.output_index == len(items)
            items.append({"type": event.item.type, "text": "", "id": event.item.id})
        elif event.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
            assert event.item_id == items[event.output_index]["id"]
            items[event.output_index]["text"] += event.delta
        elif event.type in ("response.output_text.done", "response.function_call_arguments.done"):
            final = event.text if event.type == "response.output_text.done" else event.arguments
            assert items[event.output_index]["text"] == final
        elif event.type == "response.output_item.done":
            assert event.item.id == items[event.output_index]["id"]
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    output = events[-1].response.output
    assert [item.type for item in output] == [item["type"] for item in items]
    message, *calls = output
    assert message.content[0].text == items[0]["text"]
    assert [(call.name, call.namespace, json.loads(call.arguments)) for call in calls] == [
        ("add", None, {"a": 1}),
        ("add", "n", {"a": 2}),
    ]
    whole = create(client, model="m", tools=tools)
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    assert whole.output_text == message.content[0].text


def test_a_second_turn_with_the_items_of_the_first(scripted, tokenizer):
    client, loop = scripted(CALLS)
    tools = [TOOL, {"type": "namespace", "name": "n", "tools": [TOOL]}]
    first = create(client, model="m", tools=tools)
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": f"result{number}"}
        for number, call in reversed(list(enumerate(first.output[1:])))
    ]
    items = [item.model_dump(exclude_none=True) for item in first.output]
    dialog = [{"role": "user", "content": [{"type": "input_text", "text": "six"}]}, *items, *results]
    create(client, model="m", tools=tools, input=dialog)
    prompt = tokenizer.decode(loop.requests[-1].prompt_ids)
    places = [prompt.index(text) for text in ("six", '"n__add"', "result0", "result1")]
    assert places[0] < places[2] < places[3]


def test_instructions_are_the_system_message(scripted, tokenizer):
    client, loop = scripted("ok")
    developer = {"role": "developer", "content": "Be kind."}
    create(client, model="m", instructions="Be brief.", input=[developer, {"role": "user", "content": "six"}])
    prompt = tokenizer.decode(loop.requests[-1].prompt_ids)
    assert "Be brief.\n\nBe kind." in prompt


def test_a_required_call_and_structured_output(client):
    response = create(
        client,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
        temperature=1,
    )
    assert [item.type for item in response.output] == ["function_call"]
    form = {"type": "json_schema", "name": "s", "schema": PARAMETERS, "strict": True}
    text = create(client, text={"format": form}, max_output_tokens=80).output_text
    assert set(json.loads(text)) == {"a"}


def test_logprobs(client):
    response = create(client, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = response.output[0].content[0].logprobs
    assert 0 <= response.usage.output_tokens - len(logprobs) <= 1  # a stop token has none
    assert all(len(each.top_logprobs) == 2 for each in logprobs)
    streamed = [
        each
        for event in create(client, include=["message.output_text.logprobs"], top_logprobs=2, stream=True)
        if event.type == "response.output_text.delta"
        for each in event.logprobs
    ]
    assert [each.logprob for each in streamed] == [each.logprob for each in logprobs]


def test_input_tokens_are_those_that_are_billed(client):
    counted = client.responses.input_tokens.count(model="tiny", input="six times seven").input_tokens
    assert counted == create(client).usage.input_tokens


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "messages[0].content[0]",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(client, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        create(client, **options)
    assert error.value.param == param


def test_an_error_in_a_stream_is_an_event(scripted):
    client, _ = scripted("one ", EngineError("the page is broken"), "two")
    *_, last = create(client, model="m", stream=True)
    assert last.type == "error"
    assert last.message.endswith("the page is broken")
