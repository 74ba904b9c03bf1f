"""OpenAI's own client against a real server with a real engine, and a gateway before two, on a tiny random model."""

import contextlib
import json

import openai
import pytest
import torch

from conftest import CONTEXT, wait_until

HELLO = [{"role": "user", "content": "six times seven"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(either_url):
    with openai.OpenAI(
        base_url=f"{either_url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(**({"model": "tiny", "messages": HELLO, "max_tokens": 8} | options))


def test_an_answer_streamed_and_whole(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 8
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_include_usage_has_no_usage(client):
    for options in ({}, {"stream_options": {"include_usage": False}}):
        assert all(chunk.usage is None and chunk.choices for chunk in chat(client, stream=True, **options))


def test_a_seed_repeats_an_answer(client):
    first, again, other = (
        chat(client, temperature=1, seed=seed).choices[0].message.content for seed in (5, 5, 6)
    )
    assert first == again != other


def test_several_choices(client):
    answer = chat(client, n=3, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens == 24
    texts = ["", "", ""]
    for chunk in chat(client, n=3, temperature=1, seed=1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


def test_logprobs(client):
    answer = chat(client, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 8
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in tokens)  # greedy
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == (
        answer.choices[0].message.content
    )
    streamed = [
        token
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == tokens
    assert chat(client).choices[0].logprobs is None


def test_stop_and_bias(client, tokenizer):
    text = chat(client).choices[0].message.content
    stopped = chat(client, stop=[text[3:6], "zzzz"])
    assert stopped.choices[0].message.content == text[: text.find(text[3:6])]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == text[3:6]  # of several, the one that ended the answer
    biased = chat(client, logit_bias={"75": 100}, logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert [bytes(token.bytes) for token in biased] == [tokenizer.token_bytes(75)] * 2


def test_structured_output(client):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    answer = chat(client, response_format=form, max_tokens=100, temperature=1, seed=3)
    value = json.loads(answer.choices[0].message.content)
    assert isinstance(value["ok"], bool)
    assert value["size"] in ("small", "large")
    text = chat(client, response_format={"type": "json_object"}, max_tokens=60).choices[0].message.content
    assert text.lstrip().startswith("{")


def tool(name, strict=None, parameters=SCHEMA):
    function = {"name": name, "parameters": parameters}
    return {"type": "function", "function": function | ({} if strict is None else {"strict": strict})}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"f", "g"}), ({"type": "function", "function": {"name": "g"}}, {"g"})]
)
def test_a_required_call_is_made_and_valid(client, choice, names, stream):
    options = {
        "tools": [tool("f"), tool("g")],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 200,
        "temperature": 1,
        "seed": 11,
    }
    if stream:
        with client.chat.completions.stream(model="tiny", messages=HELLO, **options) as events:
            for _ in events:
                pass
            answer = events.get_final_completion()
    else:
        answer = chat(client, **options)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None or stream
    (call,) = message.tool_calls
    assert call.function.name in names
    assert set(json.loads(call.function.arguments)) == {"ok", "size"}


def test_tool_choice_none_hides_the_tools(client):
    assert chat(client, tools=[tool("f")], tool_choice="none").usage == chat(client).usage


def test_a_strict_schema_that_cannot_be_enforced_is_refused_and_another_warned_about(client):
    hard = {"type": "object", "properties": {"a": {"type": "string", "format": "no-such-format"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be enforced") as error:
        chat(client, tools=[tool("f", True, hard)])
    assert error.value.code == "invalid_schema"
    answer = chat(client, tools=[tool("f", False, hard)], tool_choice="required", parallel_tool_calls=False)
    assert "not enforced" in answer.herd["warnings"][0]


def test_tool_types_that_cannot_run_here_are_left_out_and_named(client):
    inner = {"type": "function"} | tool("f")["function"]
    hosted = [{"type": "web_search"}, {"type": "namespace", "name": "n", "tools": [inner]}]
    answer = chat(client, tools=hosted, tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    assert answer.herd["warnings"][0].startswith("tools[0]=a tool of type 'web_search'")
    assert answer.choices[0].message.tool_calls[0].function.name == "n__f"


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(client):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=f"maximum context length is {CONTEXT:,}") as error:
            chat(client, messages=[{"role": "user", "content": "six " * CONTEXT}], stream=stream)
        assert error.value.code == "context_length_exceeded"
        assert error.value.body["n_ctx"] == CONTEXT < error.value.body["n_prompt_tokens"]


def test_a_full_context_ends_an_answer_by_its_length(client):
    answer = chat(
        client, messages=[{"role": "user", "content": "six " * (CONTEXT // 2 - 60)}], max_tokens=10 * CONTEXT
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == CONTEXT


def test_the_wrong_model_is_404_and_an_alias_works(client):
    with pytest.raises(openai.NotFoundError, match="this server has: gpt-4, tiny"):
        chat(client, model="gpt-5")
    assert chat(client, model="gpt-4").model == "tiny"


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len, model.meta["n_ctx"]) == ("tiny", CONTEXT, CONTEXT)
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completions(client, tokenizer):
    text = client.completions.create(model="tiny", prompt="six times", max_tokens=6)
    ids = client.completions.create(
        model="tiny", prompt=tokenizer.encode("six times", bos=True), max_tokens=6
    )
    assert text.choices == ids.choices
    both = client.completions.create(model="tiny", prompt=["six times", "seven"], n=2, max_tokens=6)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == text.choices[0].text
    lenient = openai.OpenAI(
        base_url=client.base_url, api_key="x"
    )  # the strict type has no null finish_reason
    streamed = lenient.completions.create(model="tiny", prompt="six times", max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text


@pytest.mark.parametrize("bos", [True, False])
def test_echo_with_logprobs_scores_the_prompt_as_the_model_does(client, loop, tokenizer, bos):
    text = "six times seven is forty-two"
    ids = tokenizer.encode(text, bos=bos)
    options = {"model": "tiny", "prompt": ids, "max_tokens": 2, "echo": True, "logprobs": 2, "temperature": 0}
    lenient = openai.OpenAI(base_url=client.base_url, api_key="x")  # strict types have no null logprob
    choice = lenient.completions.create(**options).choices[0]
    with torch.no_grad():
        logits_NV = loop.engine.model.logits(torch.tensor([ids]))[0].float()
    expected = logits_NV.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    scores = choice.logprobs.token_logprobs[: len(ids) - bos]
    assert scores[0 if bos else 1 :] == pytest.approx(expected, abs=1e-3)
    assert bos or scores[0] is None
    assert choice.text.startswith(text)
    assert "".join(choice.logprobs.tokens[: len(ids) - bos]) == text
    assert len(choice.logprobs.tokens) == len(ids) - bos + 2
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs[1:])
    streamed = [chunk.choices[0].logprobs for chunk in lenient.completions.create(**options, stream=True)]
    assert [x for part in streamed if part for x in part.token_logprobs] == choice.logprobs.token_logprobs


def test_a_client_that_closes_a_stream_ends_the_generation(client, loop):
    stream = chat(client, stream=True, max_tokens=900, temperature=1, logit_bias={"5": 1})
    next(iter(stream))
    stream.close()
    wait_until(lambda: loop.stats().active == 0)
    assert loop.stats().decoded_tokens >= 1


def test_the_assistants_last_message_can_be_continued(client, tokenizer):
    messages = [*HELLO, {"role": "assistant", "content": "six times"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    answer = chat(client, messages=messages, extra_body=options)
    more = answer.usage.prompt_tokens - chat(client).usage.prompt_tokens
    assert more == len(tokenizer.encode("six times"))
    with pytest.raises(openai.BadRequestError, match="exclude each other"):
        chat(client, messages=messages, extra_body=options | {"add_generation_prompt": True})
    with pytest.raises(openai.BadRequestError, match="must be the assistant's"):
        chat(client, extra_body={"continue_final_message": True})


def test_tokens_of_a_request_are_counted_without_an_answer(client, http):
    body = {"messages": HELLO, "tools": [tool("f")]}
    counted = http.post("/v1/chat/completions/input_tokens", json=body).json()["input_tokens"]
    assert counted == chat(client, tools=body["tools"]).usage.prompt_tokens


def test_a_grammar_in_the_form_of_llamacpp(client):
    grammar = {"grammar": 'root ::= "yes" | "no" " "{2} "way"'}
    answer = chat(client, extra_body=grammar, temperature=1, seed=1).choices[0].message.content
    assert answer in ("yes", "no  way")
    text = (
        client.completions.create(model="tiny", prompt="six", extra_body=grammar, max_tokens=9)
        .choices[0]
        .text
    )
    assert text in ("yes", "no  way")
    for broken in ("root ::= (a", "", "#", "root ::= a", 'root ::= "', "root ::= (" * 5000):
        with pytest.raises(openai.BadRequestError, match="grammar cannot be read"):
            chat(client, extra_body={"grammar": broken})
    with pytest.raises(openai.BadRequestError, match="grammar excludes tools"):
        chat(client, extra_body=grammar, tools=[tool("f")])


@pytest.mark.parametrize(
    ("form", "answers"),
    [
        ({"guided_regex": "a{2}|no way"}, ["aa", "no way"]),
        ({"guided_choice": ["six (6)", 'a "b"\n', "🙂"]}, ["six (6)", 'a "b"\n', "🙂"]),
        ({"guided_grammar": 'root ::= "yes" | "no" " "{2} "way"'}, ["yes", "no  way"]),
        ({"guided_json": {"enum": ["x", 7]}}, ['"x"', "7"]),
        ({"guided_json": '{"enum": [true]}'}, ["true"]),
        ({"structured_outputs": {"choice": ["one", "two"], "regex": None}}, ["one", "two"]),
        ({"structured_outputs": {"regex": "o{3}"}}, ["ooo"]),
        ({"structured_outputs": {"grammar": 'root ::= "y"'}}, ["y"]),
        ({"structured_outputs": {"json": {"const": 1}}}, ["1"]),
        ({"json_schema": {"const": 2}}, ["2"]),
    ],
    ids=str,
)
def test_the_forms_of_vllm(client, form, answers):
    for seed in (1, 2):
        answer = chat(client, extra_body=form, temperature=1, seed=seed, max_tokens=20).choices[0]
        assert (answer.message.content in answers, answer.finish_reason) == (True, "stop")
        options = {"prompt": "six", "temperature": 1, "seed": seed, "max_tokens": 20}
        text = client.completions.create(model="tiny", extra_body=form, **options).choices[0].text
        assert text in answers


@pytest.mark.parametrize(
    ("forms", "words"),
    [
        ({"guided_regex": "("}, "malformed"),
        ({"guided_choice": []}, "guided_choice must be a list of texts"),
        ({"guided_json": "{"}, "guided_json is not JSON"),
        ({"guided_json": {"type": 7}}, "guided_json cannot be enforced"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar cannot be read"),
        ({"guided_regex": "a", "grammar": 'root ::= "a"'}, "guided_regex excludes grammar"),
        ({"guided_regex": "a", "tools": [tool("f")]}, "a regular expression excludes tools"),
        ({"structured_outputs": {}}, "structured_outputs must have one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs must have one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag is not supported"),
        ({"structured_outputs": {"regex": 7}}, "structured_outputs.regex must be text"),
    ],
    ids=str,
)
def test_a_form_that_cannot_be_followed_is_refused(client, forms, words):
    with pytest.raises(openai.BadRequestError, match=words):
        chat(client, extra_body=forms)


@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_that_would_crash_the_parser_fails_alone(client, strict):
    deep: dict = {"type": "null"}
    for _ in range(900):
        deep = {"anyOf": [deep, {"type": "array", "items": deep}]}
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}
    for schema in (deep, {"$ref": "#/$defs/d0", "$defs": chain | {"d3000": {"type": "null"}}}):
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": strict}}
        with contextlib.suppress(openai.BadRequestError, RecursionError):
            chat(client, response_format=form, max_tokens=2)
    assert chat(client).choices


def test_a_hostile_pattern_ends_its_own_request_only(client):
    pattern = {"type": "string", "pattern": "(a|a?)+" * 40 + "{1000}"}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": pattern, "strict": True}}
    with contextlib.suppress(openai.BadRequestError):
        chat(client, response_format=form, max_tokens=2)
    assert chat(client).choices
