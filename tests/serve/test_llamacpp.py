"""llama.cpp's own API gives the answers of OpenAI's API in its own form, with token ids and all settings."""

import json
import math

import httpx
import pytest

from conftest import CONTEXT, running
from herd.engine.request import Sampling
from herd.errors import EngineError
from herd.serve.settings import ServeSettings

PROMPT = "six times"


def complete(http, **body):
    """Return the body of a completion, or of an error."""
    return http.post("/completion", json={"prompt": PROMPT, "n_predict": 8} | body).json()


def chunks(http, **body):
    """Return the events of a streamed completion."""
    with http.stream("POST", "/completion", json={"prompt": PROMPT, "stream": True} | body) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_completion_equals_the_one_of_openais_api(http, tokenizer):
    ours = complete(http, return_tokens=True)
    theirs = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8}).json()
    assert ours["content"] == theirs["choices"][0]["text"]
    assert tokenizer.decode(ours["tokens"]) == ours["content"]
    assert len(ours["tokens"]) == ours["tokens_predicted"] == theirs["usage"]["completion_tokens"] == 8
    assert (ours["stop_type"], ours["truncated"], ours["prompt"]) == (
        "limit",
        False,
        "<|begin_of_text|>six times",
    )
    assert complete(http)["tokens"] == []


def test_a_stream_equals_the_whole(http):
    whole = complete(http, return_tokens=True, n_probs=3, n_predict=12)
    *pieces, last = chunks(http, n_probs=3, n_predict=12)
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert [id_ for piece in pieces for id_ in piece["tokens"]] == whole["tokens"]
    scores = [score for piece in pieces for score in piece["completion_probabilities"]]
    assert scores == whole["completion_probabilities"]
    assert [piece["stop"] for piece in (*pieces, last)] == [False] * len(pieces) + [True]
    assert (last["content"], last["tokens_predicted"]) == ("", 12)
    assert last["timings"]["predicted_n"] == 12


def test_probabilities_are_the_models_own(http, tokenizer):
    scores = complete(http, n_probs=5)["completion_probabilities"]
    theirs = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, "logprobs": 5}).json()
    assert [each["logprob"] for each in scores] == theirs["choices"][0]["logprobs"]["token_logprobs"]
    for each in scores:
        assert [len(each["top_logprobs"]), each["top_logprobs"][0]["id"]] == [5, each["id"]]  # greedy
        for token in (each, *each["top_logprobs"]):
            assert bytes(token["bytes"]) == tokenizer.token_bytes(token["id"])


@pytest.mark.parametrize(
    "form",
    [
        lambda text, ids: {"prompt_string": text},
        lambda text, ids: ids,
        lambda text, ids: [ids[0], text],
        lambda text, ids: [[*ids]],
    ],
)
def test_a_prompt_may_have_texts_and_ids(http, tokenizer, form):
    ids = tokenizer.encode(PROMPT, bos=True)
    assert complete(http, prompt=form(PROMPT, ids))["content"] == complete(http)["content"]


def test_several_prompts_have_several_answers(http):
    both = complete(http, prompt=[PROMPT, {"prompt_string": "seven"}])
    assert [each["index"] for each in both] == [0, 1]
    assert both[0]["content"] == complete(http)["content"]
    assert both[1]["content"] == complete(http, prompt="seven")["content"]
    assert [each["tokens_predicted"] for each in both] == [8, 8]
    last = [chunk for chunk in chunks(http, prompt=[PROMPT, "seven"], n_predict=3) if chunk["stop"]]
    assert [(each["index"], each["tokens_predicted"]) for each in last] == [(0, 3), (1, 3)]


def test_special_tokens_in_a_prompt_are_read_here_and_only_here(http, tokenizer):
    text = "six<|eot_id|>"
    assert complete(http, prompt=text)["tokens_evaluated"] == len(tokenizer.encode("six", bos=True)) + 1
    usage = http.post("/v1/completions", json={"prompt": text, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(tokenizer.encode(text, bos=True)) > 3


def test_a_dialog_as_text_gives_the_answer_of_a_chat(http):
    dialog = {"messages": [{"role": "user", "content": "six times seven?"}]}
    text = http.post("/apply-template", json=dialog).json()["prompt"]
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    answer = http.post("/v1/chat/completions", json=dialog | {"max_tokens": 12}).json()
    assert complete(http, prompt=text, n_predict=12)["content"] == answer["choices"][0]["message"]["content"]
    assert complete(http, prompt=text)["tokens_evaluated"] == answer["usage"]["prompt_tokens"]
    without = http.post("/apply-template", json=dialog | {"add_generation_prompt": False}).json()["prompt"]
    assert text.startswith(without)
    assert "assistant" not in without


def test_reasoning_of_earlier_answers_reaches_the_template(http, served, tokenizer):
    template = "{% for m in messages %}[{{ m.reasoning_content }}]{{ m.content }}{% endfor %}"
    from dataclasses import replace

    own = replace(served, tokenizer=tokenizer.with_settings(chat_template=template))
    user, thought = (
        {"role": "user", "content": "a"},
        {"type": "thinking", "thinking": "because", "signature": ""},
    )
    answer = {"role": "assistant", "content": "b", "reasoning_content": "because"}
    with running(own) as url, httpx.Client(base_url=url) as client:
        text = client.post("/apply-template", json={"messages": [user, answer, user]}).json()["prompt"]
        assert text == "[]a[because]b[]a"
        blocks = {"role": "assistant", "content": [thought, {"type": "text", "text": "b"}]}
        counted = client.post("/v1/messages/count_tokens", json={"messages": [user, blocks, user]}).json()
        assert counted["input_tokens"] == len(tokenizer.encode(text, bos=False))


def test_biases_forbid_tokens_by_id_and_by_text(http, tokenizer):
    best = complete(http, n_predict=1, n_probs=2)["completion_probabilities"][0]["top_logprobs"]
    first, second = (token["id"] for token in best)
    for bias in ([[first, False]], [[first, -100]], {str(first): -100}):
        assert complete(http, n_predict=1, logit_bias=bias, return_tokens=True)["tokens"] == [second]
    (id_,) = tokenizer.encode("s")
    for bias in ([["s", 100]], {"s": 100}):
        assert complete(http, n_predict=1, logit_bias=bias, return_tokens=True)["tokens"] == [id_]
    settings = complete(http, n_predict=1, logit_bias=[[first, False], [7, 2.5]])["generation_settings"]
    assert settings["logit_bias"] == [{"token": first, "bias": None}, {"token": 7, "bias": 2.5}]


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_the_end_of_an_answer_can_be_ignored(http, tokenizer, path):
    dialog = {"messages": [{"role": "user", "content": "six"}]}
    end = {str(tokenizer.eos_id): 100}
    body = {"prompt": PROMPT, "logit_bias": end, "n_predict" if path == "/completion" else "max_tokens": 9}
    body |= dialog if "chat" in path else {}
    whole = http.post(path, json=body).json()
    assert whole.get("tokens_predicted", whole.get("usage", {}).get("completion_tokens")) == 1
    long = http.post(path, json=body | {"ignore_eos": True}).json()
    assert long.get("tokens_predicted", long.get("usage", {}).get("completion_tokens")) == 9


def test_an_answer_ends_with_the_context_or_a_stop_string(http):
    full = complete(http, prompt=[5] * (CONTEXT - 10), n_predict=-1, ignore_eos=True)
    assert (full["tokens_predicted"], full["truncated"], full["stop_type"]) == (10, True, "limit")
    text = complete(http)["content"]
    stopped = complete(http, stop=[text[3:5]])
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", text[3:5])
    assert stopped["content"] == text[: text.index(text[3:5])]


def test_fields_can_be_chosen(http):
    chosen = complete(http, response_fields=["content", "generation_settings/n_predict", "nothing/here"])
    assert chosen == {"content": complete(http)["content"], "generation_settings/n_predict": 8}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[True]]}, "prompt"),
        ({"prompt": {"prompt_string": "x", "multimodal_data": "AA"}}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"n_predict": 0}, "n_predict"),
        ({"logit_bias": [3]}, "logit_bias"),
        ({"logit_bias": [[3, 200]]}, "logit_bias of token 3"),
        ({"logit_bias": [[None, 1]]}, "a token id of logit_bias"),
        ({"stop": ["a"] * 99}, "stop"),
        ({"grammar": "root ::= (", "json_schema": {}}, "grammar"),
        ({"json_schema": {"type": 3}}, "json_schema"),
    ],
)
def test_what_cannot_be_read_is_refused(http, body, param):
    error = complete(http, **body)["error"]
    assert error["code"] in (400, "invalid_schema") or error["type"] == "invalid_request_error"
    assert param in error["message"]


def test_the_properties_and_the_slots_of_a_server(http):
    props = http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == CONTEXT
    assert props["default_generation_settings"]["params"]["temperature"] == 0
    assert props["model_alias"] == "tiny"
    slots = http.get("/slots").json()
    assert [slot["is_processing"] for slot in slots] == [False] * props["total_slots"]


def test_a_server_without_the_page(served):
    with running(served, ServeSettings(has_page=False)) as url:
        assert httpx.get(url).status_code == 404
        assert httpx.get(f"{url}/v1/models").status_code == 200


def test_only_minus_infinity_is_a_bias_beyond_the_bounds():
    assert Sampling(logit_bias={3: -math.inf}).changes_logits
    for bias in (math.inf, math.nan, -101.0):
        with pytest.raises(EngineError, match="logit_bias of token 3"):
            Sampling(logit_bias={3: bias})
