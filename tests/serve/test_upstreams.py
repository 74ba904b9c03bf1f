"""A gateway before two other Herds: every API answers as if the client had asked them, with keys before it."""

import subprocess
import sys

import anthropic
import httpx
import ollama
import openai
import pytest

from conftest import CONTEXT, ScriptedLoop, running, upstream_models
from herd.errors import ConfigError
from herd.serve.chat import ServedModel
from herd.serve.models import ModelPool
from herd.serve.upstreams import checked_url

CALL = '{"name": "add", "parameters": {"a": 1}}'
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]


@pytest.fixture
def clients(gateway):
    """Return OpenAI clients of the Herd and of the gateway."""
    with (
        openai.OpenAI(base_url=f"{gateway[0]}/v1", api_key="x", max_retries=0) as direct,
        openai.OpenAI(base_url=f"{gateway[1]}/v1", api_key="x", max_retries=0) as through,
    ):
        yield direct, through


def test_models_are_those_of_the_upstreams(clients):
    through = clients[1]
    for client in clients:
        assert [model.id for model in client.models.list()] == ["tiny"]
    card = through.models.retrieve("gpt-4")  # the upstream's alias
    assert card.id == "tiny"
    assert card.max_model_len == CONTEXT


def test_chat_is_the_upstream_s_answer(clients):
    options = {
        "model": "tiny", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "six"}],
        "max_tokens": 12, "n": 2, "logprobs": True, "top_logprobs": 2, "temperature": 0,
    }  # fmt: skip
    direct, through = (client.chat.completions.create(**options) for client in clients)
    assert [c.message.content for c in through.choices] == [c.message.content for c in direct.choices]
    assert [c.finish_reason for c in through.choices] == [c.finish_reason for c in direct.choices]
    for one, other in zip(direct.choices, through.choices, strict=True):
        scores = [
            [(t.token, t.bytes, len(t.top_logprobs)) for t in each.logprobs.content] for each in (one, other)
        ]
        assert scores[0] == scores[1]
    assert through.usage.completion_tokens == direct.usage.completion_tokens == 24
    assert through.usage.prompt_tokens == direct.usage.prompt_tokens
    chunks = list(
        clients[1].chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    for choice in direct.choices:
        parts = [
            c.choices[0].delta.content or ""
            for c in chunks
            if c.choices and c.choices[0].index == choice.index
        ]
        assert "".join(parts) == choice.message.content
    assert chunks[-1].usage.completion_tokens == 24


def test_every_chunk_has_the_usage_so_far_if_it_is_asked_for(clients):
    options = {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 9,
    }
    for client in clients:
        for chunks in (
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "six"}], **options
            ),
            client.completions.create(model="tiny", prompt="six", **options),
        ):
            usages = [chunk.usage for chunk in chunks]
            counts = [usage.completion_tokens for usage in usages]
            assert counts == sorted(counts)
            assert counts[-1] == 9
            assert {usage.prompt_tokens for usage in usages} == {usages[-1].prompt_tokens}


def test_only_requests_with_the_same_salt_share_cached_prompts(gateway):
    text = "calculator expression parameters " * 60
    for number, url in enumerate(gateway):
        cached = []
        for salt in ("a", "a", "b", "b"):
            body = {"prompt": f"{number} {text}", "max_tokens": 1, "cache_salt": salt}
            usage = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"] > 0)
        assert cached == [False, True, False, True]


def test_completions_are_the_upstream_s_answer(clients):
    options = {
        "model": "tiny", "prompt": ["six times", "seven"], "max_tokens": 6, "echo": True, "logprobs": 2,
        "temperature": 0, "stop": "zzz",
    }  # fmt: skip
    direct, through = (client.completions.create(**options) for client in clients)
    assert [choice.text for choice in through.choices] == [choice.text for choice in direct.choices]
    for one, other in zip(direct.choices, through.choices, strict=True):
        assert (other.logprobs.tokens, other.logprobs.text_offset) == (
            one.logprobs.tokens,
            one.logprobs.text_offset,
        )
        assert other.logprobs.token_logprobs == pytest.approx(one.logprobs.token_logprobs, abs=1e-4)
        assert [top.keys() for top in other.logprobs.top_logprobs if top] == [
            top.keys() for top in one.logprobs.top_logprobs if top
        ]
    assert through.usage.total_tokens == direct.usage.total_tokens


def test_the_other_apis(gateway):
    answers = []
    for url in gateway:
        client = anthropic.Anthropic(base_url=url, api_key="x", max_retries=0)
        message = client.messages.create(
            model="tiny",
            max_tokens=8,
            messages=[{"role": "user", "content": "six"}],
            extra_body={"temperature": 0},
        )
        count = client.messages.count_tokens(model="tiny", messages=[{"role": "user", "content": "six"}])
        response = openai.OpenAI(base_url=f"{url}/v1", api_key="x").responses.create(
            model="tiny", input="six", max_output_tokens=8, temperature=0
        )
        chat = ollama.Client(url).chat(
            "tiny", [{"role": "user", "content": "six"}], options={"num_predict": 8}
        )
        raw = ollama.Client(url).generate("tiny", "six", raw=True, options={"num_predict": 8})
        tokens = httpx.post(f"{url}/tokenize", json={"content": "six times"}).json()["tokens"]
        text = httpx.post(f"{url}/detokenize", json={"tokens": tokens}).json()["content"]
        answers.append(
            (message.content[0].text, message.usage.output_tokens, message.usage.input_tokens, message.stop_reason,
             count.input_tokens, response.output_text, response.usage.output_tokens, chat.message.content,
             chat.eval_count, raw.response, tokens, text)
        )  # fmt: skip
    assert answers[0][1] == 8
    assert answers[0] == answers[1]


def test_a_prompt_that_is_too_long_and_other_mistakes_are_the_client_s(clients):
    messages = [{"role": "user", "content": "six times seven " * 2000}]
    for client in clients:
        with pytest.raises(openai.BadRequestError, match="context") as caught:
            client.chat.completions.create(model="tiny", messages=messages)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="tiny", messages=messages, temperature=-1)


def test_a_refusal_to_count_has_the_upstream_s_message(gateway):
    function = {"name": "add", "strict": True, "parameters": {"type": 7}}
    body = {
        "messages": [{"role": "user", "content": "six"}],
        "tools": [{"type": "function", "function": function}],
    }
    direct, through = (httpx.post(f"{url}/v1/chat/completions/input_tokens", json=body) for url in gateway)
    assert (through.status_code, direct.status_code) == (400, 400)
    assert through.json()["error"]["message"] == direct.json()["error"]["message"]


def test_calls_of_tools_and_their_results(tokenizer):
    loop = ScriptedLoop(CALL)
    served = ServedModel("m", loop, tokenizer, CONTEXT)
    with running(served) as first, running(ModelPool([]), upstreams=upstream_models(first)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        asked = [{"role": "user", "content": "add"}]
        message = client.chat.completions.create(model="m", messages=asked, tools=TOOLS).choices[0]
        assert message.finish_reason == "tool_calls"
        call = message.message.tool_calls[0]
        assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
        result = {"role": "tool", "tool_call_id": call.id, "content": "42"}
        dialog = [*asked, message.message.model_dump(exclude_none=True), result]
        stream = client.chat.completions.create(model="m", messages=dialog, tools=TOOLS, stream=True)
        parts = [part for chunk in stream for part in chunk.choices[0].delta.tool_calls or ()]
        assert "".join(part.function.arguments for part in parts) == '{"a": 1}'
        texts = [tokenizer.decode(request.prompt_ids) for request in loop.requests]
        assert "42" in texts[-1]


@pytest.mark.parametrize(
    "url", ["ftp://host", "host:8000", "http://user:secret@host", "http://host/v1?key=secret", "http://"]
)
def test_what_is_no_address_of_a_server_is_refused_without_its_password(url):
    with pytest.raises(ConfigError) as caught:
        checked_url(url)
    if "user" in url:
        assert "secret" not in str(caught.value)
    assert checked_url("http://host:1/base/v1/") == "http://host:1/base"


def test_a_gateway_does_not_load_torch():
    code = "import sys, herd.cli.serve, herd.serve.app, herd.serve.run, herd.serve.upstream_model as u; "
    code += "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
