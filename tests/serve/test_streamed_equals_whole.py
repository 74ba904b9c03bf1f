"""A stream and a whole response say the same, however the text of the answer is divided into tokens."""

import asyncio
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CONTEXT, ScriptedLoop
from herd.serve.answer import LiveAnswer
from herd.serve.anthropic import MessageWriter
from herd.serve.auth import Principal
from herd.serve.calls import ChatCall, TextCall
from herd.serve.chat import ServedModel, prepare_chat, prepare_text
from herd.serve.ledger import Unmetered
from herd.serve.openai_chat import ChatWriter
from herd.serve.openai_completions import CompletionRequest, CompletionWriter
from herd.serve.openai_responses import ResponsesRequest, ResponseWriter
from herd.serve.respond import EventStream, collect
from herd.serve.settings import ServeSettings
from herd.serve.steps import begin_step
from herd.serve.tools import OfferedTool

CALL = '{"type": "function", "name": "add", "parameters": {"a": 1, "b": "two\\n🙂"}}'
ANSWERS = [
    "Hello, world! 🙂",
    CALL,
    f"I will add.\n{CALL}",
    f"{CALL}; {CALL}",
    f"Before {CALL} between {CALL} after",
    '<|python_tag|>add.call(a=1, b="x")',
    '<function=add>{"a": 1}</function>',
    '{"type": "function", "name": "add", "parameters": {"a": ',
    '{"name": "Anna", "age": 3}',
    "```json\n" + CALL + "\n```",
    '{"tool_calls": [{"name": "add", "args": {"a": 1}}]}',
    '{"name": "Ann", "parameters": {}}',
    '{"type": "function", "name": "unknown", "parameters": {}}',
    " [1, 2, 3] and <b>bold</b>; {not: a call}",
    "",
]
TOOL = OfferedTool("add", "Add.", {"type": "object", "properties": {"a": {"type": "integer"}}})


def divided(text, cuts):
    """Return the pieces of a text between the cuts."""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def answered(tokenizer, pieces, *, writer_of, prompt_of, reason="stop", n=1):
    """Return the whole body and the stream's events, of two answers with the same script."""

    async def both():
        loop = ScriptedLoop(*pieces, reason=reason)
        served = ServedModel("m", loop, tokenizer, CONTEXT)
        out = []
        for streamed in (False, True):
            prompt = prompt_of(served)
            step = await begin_step(served, [prompt], Principal.local(), lambda *_: reservation())
            answer = LiveAnswer(served, [prompt], step, [])
            writer = writer_of(served, prompt)
            if streamed:
                stream = EventStream(answer, writer, ServeSettings(), {})
                chunks = [writer.begin(answer)] + [chunk async for chunk in stream._chunks()]
                out.append(events_of(b"".join(chunks)))
            else:
                out.append(writer.body(await collect(answer), answer))
            answer.close()
        return out

    return asyncio.run(both())


def reservation():
    """Return a reservation at no price."""
    return Unmetered().reserve(
        Principal.local(), model="m", endpoint="", prompt_tokens=1, max_completion_tokens=1, request_id=""
    )


def events_of(stream):
    """Return the JSON documents of a stream of server-sent events."""
    lines = [
        line.removeprefix("data: ") for line in stream.decode().splitlines() if line.startswith("data: ")
    ]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def joined(events):
    """Return the message and finish reason of each choice that a client puts together from chunks."""
    messages: dict[int, dict] = {}
    for event in events:
        for choice in event["choices"]:
            message = messages.setdefault(choice["index"], {"content": "", "calls": [], "reason": None})
            assert message["reason"] is None, "nothing comes after the finish reason"
            message["reason"] = choice["finish_reason"]
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["calls"]):  # the first chunk of a call is complete
                    assert call["type"] == "function"
                    assert call["id"]
                    assert call["function"]["name"]
                    message["calls"].append([call["function"]["name"], ""])
                message["calls"][call["index"]][1] += call["function"]["arguments"]
    return messages


@pytest.mark.parametrize("answer", ANSWERS)
@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 500), max_size=40), n=st.integers(1, 2), length=st.booleans())
def test_chat_with_tools(tokenizer, answer, cuts, n, length):
    def prompt_of(served):
        call = ChatCall([{"role": "user", "content": "six"}], {}, (TOOL,), n=n)
        return prepare_chat(served, call)

    body, events = answered(
        tokenizer,
        divided(answer, cuts),
        writer_of=lambda served, prompt: ChatWriter(served.name, None),
        prompt_of=prompt_of,
        reason="length" if length else "stop",
    )
    messages = joined(events)
    assert len(messages) == len(body["choices"]) == n
    for choice in body["choices"]:
        message = messages[choice["index"]]
        assert message["content"] == (choice["message"]["content"] or "")
        calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
        assert message["calls"] == [[call["name"], call["arguments"]] for call in calls]
        assert message["reason"] == choice["finish_reason"]
    warnings = [w for event in events for w in event.get("herd", {}).get("warnings", ())]
    assert warnings == body.get("herd", {}).get("warnings", [])


@pytest.mark.parametrize("answer", ANSWERS)
@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, 500), max_size=40), length=st.booleans())
def test_messages_and_responses_with_tools(tokenizer, answer, cuts, length):
    def prompt_of(served):
        return prepare_chat(served, ChatCall([{"role": "user", "content": "six"}], {}, (TOOL,)))

    script = {"prompt_of": prompt_of, "reason": "length" if length else "stop"}
    pieces = divided(answer, cuts)
    body, events = answered(tokenizer, pieces, writer_of=lambda *_: MessageWriter("m"), **script)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    whole = {
        "text": "".join(block["text"] for block in body["content"] if block["type"] == "text"),
        "calls": [block["input"] for block in body["content"] if block["type"] == "tool_use"],
    }
    assert "".join(delta.get("text", "") for delta in deltas) == whole["text"]
    assert [json.loads(d["partial_json"]) for d in deltas if "partial_json" in d] == whole["calls"]
    assert events[-2]["delta"]["stop_reason"] == body["stop_reason"]
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    assert starts == list(range(len(starts)))
    assert starts == [event["index"] for event in events if event["type"] == "content_block_stop"]

    asked = ResponsesRequest(input="six")
    body, events = answered(
        tokenizer, pieces, writer_of=lambda served, _: ResponseWriter(served.name, asked), **script
    )
    for output in (body["output"], events[-1]["response"]["output"]):
        texts = [item["content"][0]["text"] for item in output if item["type"] == "message"]
        calls = [json.loads(item["arguments"]) for item in output if item["type"] == "function_call"]
        assert {"text": "".join(texts), "calls": calls} == whole
    assert events[-1]["response"]["status"] == body["status"]


@pytest.mark.parametrize(
    ("answer", "n_calls", "content", "reason"),
    [
        ("Hello", 0, "Hello", "stop"),
        (CALL, 1, None, "tool_calls"),
        (f"{CALL}; {CALL}", 2, None, "tool_calls"),
        (f"Look: {CALL}", 1, "Look:", "tool_calls"),
        (f"<function_call>{CALL.replace('parameters', 'args')}</function_call>", 1, None, "tool_calls"),
        ('{"name": "Ann", "parameters": {}}', 0, '{"name": "Ann", "parameters": {}}', "stop"),
    ],
)
def test_the_whole_body_is_what_clients_expect(tokenizer, answer, n_calls, content, reason):
    def prompt_of(served):
        return prepare_chat(served, ChatCall([{"role": "user", "content": "six"}], {}, (TOOL,)))

    body, _ = answered(
        tokenizer, [answer], writer_of=lambda served, _: ChatWriter(served.name, None), prompt_of=prompt_of
    )
    choice = body["choices"][0]
    assert choice["message"]["content"] == content
    assert choice["finish_reason"] == reason
    calls = choice["message"].get("tool_calls", [])
    assert len(calls) == n_calls
    assert all(json.loads(call["function"]["arguments"]) == {"a": 1, "b": "two\n🙂"} for call in calls)


@settings(max_examples=30)
@given(text=st.text(max_size=60), cuts=st.lists(st.integers(0, 60), max_size=10), echo=st.booleans())
def test_completions(tokenizer, text, cuts, echo):
    asked = CompletionRequest(prompt="six times", echo=echo)
    body, events = answered(
        tokenizer,
        divided(text, cuts),
        writer_of=lambda served, _: CompletionWriter(served.name, asked),
        prompt_of=lambda served: prepare_text(served, TextCall("six times", echo=echo)),
    )
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(choice["text"] for choice in choices) == body["choices"][0]["text"]
    assert body["choices"][0]["text"] == ("six times" if echo else "") + text
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]


def test_a_chunk_is_written_before_the_next_tokens_are_billed(tokenizer):
    """uvloop writes at the end of an iteration, and `kill -9` may come before that."""
    sent: list[bytes] = []
    written: list[bytes] = []
    noted: list[tuple[int, int]] = []

    async def send(message):
        if body := message.get("body"):
            sent.append(body)
            asyncio.get_running_loop().call_soon(written.append, body)

    async def run():
        served = ServedModel("m", ScriptedLoop(*"abcdefgh"), tokenizer, CONTEXT)
        prompt = prepare_chat(served, ChatCall([{"role": "user", "content": "six"}], {}))
        step = await begin_step(served, [prompt], Principal.local(), lambda *_: reservation())
        advance = step.reservation.advance
        step.reservation.advance = lambda *n: (noted.append((len(sent), len(written))), advance(*n))
        answer = LiveAnswer(served, [prompt], step, [])
        await asyncio.sleep(0.2)  # all tokens are ready
        await EventStream(answer, ChatWriter(served.name, None), ServeSettings(), {})(
            {}, asyncio.Event().wait, send
        )

    asyncio.run(run())
    assert len(noted) >= 8
    assert all(n_sent == n_written for n_sent, n_written in noted)
