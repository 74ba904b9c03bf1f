"""Ollama's own client against a server with an engine, a gateway before two of them, and scripted answers with tools."""

import json

import ollama
import openai
import pytest

from conftest import CONTEXT
from herd.errors import EngineError

HELLO = [{"role": "user", "content": "six times seven"}]


connect = ollama.Client


@pytest.fixture(scope="module")
def client(either_url):
    return connect(either_url)


def test_an_answer_streamed_whole_and_through_openais_api(client, url):
    options = {"num_predict": 8, "num_ctx": 1024}
    whole = client.chat("tiny", HELLO, options=options)
    *_, last = parts = list(client.chat("tiny:latest", HELLO, options=options, stream=True))
    other = openai.OpenAI(base_url=f"{url}/v1", api_key="x").chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8
    )
    text = "".join(part.message.content for part in parts)
    assert text == whole.message.content == other.choices[0].message.content
    assert [part.done for part in parts].count(True) == 1
    for answer in (whole, last):
        assert (answer.done, answer.done_reason) == (True, other.choices[0].finish_reason)
        assert answer.eval_count == other.usage.completion_tokens
        assert answer.prompt_eval_count == other.usage.prompt_tokens
        assert answer.total_duration >= answer.eval_duration >= 0


def test_generate_uses_the_chat_format_unless_raw(client, url):
    chat = client.chat("tiny", HELLO, options={"num_predict": 8})
    answer = client.generate("tiny", HELLO[0]["content"], options={"num_predict": 8})
    assert answer.response == chat.message.content
    raw = client.generate("tiny", "six times", raw=True, options={"num_predict": 8})
    text = (
        openai.OpenAI(base_url=f"{url}/v1", api_key="x")
        .completions.create(model="tiny", prompt="six times", max_tokens=8)
        .choices[0]
        .text
    )
    assert raw.response == text
    streamed = client.generate("tiny", "six times", raw=True, options={"num_predict": 8}, stream=True)
    assert "".join(part.response for part in streamed) == text


def test_calls_of_tools(scripted):
    client, _ = scripted('{"type": "function", "name": "add", "parameters": {"a": 1}}')

    def add(a: int) -> int:
        """Add.

        Args:
          a: a number
        """
        return a

    whole = client.chat("m", HELLO, tools=[add])
    (part,) = [part for part in client.chat("m", HELLO, tools=[add], stream=True) if part.message.tool_calls]
    for message in (whole.message, part.message):
        (call,) = message.tool_calls
        assert (call.function.name, call.function.arguments) == ("add", {"a": 1})
    dialog = [*HELLO, whole.message, {"role": "tool", "content": "1", "tool_name": "add"}]
    assert client.chat("m", dialog, tools=[add]).message.tool_calls


def test_formats(client, http):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = client.chat("tiny", HELLO, format=schema, options={"num_predict": 60})
    assert isinstance(json.loads(answer.message.content)["ok"], bool)
    refused = http.post("/api/generate", json={"model": "tiny", "prompt": "six", "format": "xml"})
    assert (refused.status_code, "must be json" in refused.json()["error"]) == (400, True)


def test_what_the_server_says_about_its_model(client):
    (model,) = client.list().models
    assert model.model == "tiny"
    shown = client.show("tiny")
    assert shown.modelinfo["llama.context_length"] == CONTEXT
    assert set(shown.capabilities) == {"completion", "tools"}
    assert client.ps().models[0].model == "tiny"


def test_a_request_without_a_prompt_only_loads(client):
    assert client.generate("tiny", "").done_reason == "load"
    assert client.chat("tiny", []).done_reason == "load"


@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_ollamas_form(client, stream):
    def ask(model="tiny", messages=HELLO, **more):
        answer = client.chat(model, messages, stream=stream, **more)
        return list(answer) if stream else answer

    with pytest.raises(ollama.ResponseError, match="does not exist") as error:
        ask("other")
    assert error.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match=f"{CONTEXT:,}"):
        ask(messages=[{"role": "user", "content": "six " * CONTEXT}])
    with pytest.raises(ollama.ResponseError, match="images"):
        ask(messages=[{"role": "user", "content": "six", "images": ["aGVsbG8="]}])
    with pytest.raises(ollama.ResponseError, match="temperature"):
        ask(options={"temperature": -1})


def test_an_error_in_a_stream_is_a_line(scripted):
    client, _ = scripted("one ", EngineError("the page is broken"), "two")
    with pytest.raises(ollama.ResponseError, match="the page is broken"):
        list(client.chat("m", HELLO, stream=True))


def test_lines_end_only_where_a_line_of_json_ends(scripted):
    text = "one\u2028two\u0085three\x0bfour\r\n"
    client, _ = scripted(text)
    assert "".join(part.message.content for part in client.chat("m", HELLO, stream=True)) == text


def test_unknown_options_are_named(http):
    body = {
        "model": "tiny",
        "prompt": "six",
        "stream": False,
        "options": {"num_predict": 2, "mirostat": 1, "num_ctx": 9},
    }
    response = http.post("/api/generate", json=body)
    assert response.json()["herd"]["warnings"] == ["options.mirostat=unknown option, ignored"]
