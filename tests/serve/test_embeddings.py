"""Embeddings over HTTP: OpenAI's client and Ollama's against a server with a real engine, and through a gateway."""

from __future__ import annotations

import base64
import struct

import httpx
import ollama
import openai
import pytest
import torch
from test_fields import REQUESTS
from test_upstream_failures import billed

from conftest import CONTEXT, running, wait_until
from herd.serve.keys import KeyPolicy, TokenBudget, create_key
from herd.serve.prices import TokenPrice, set_price
from herd.serve.usage import read_usage

TEXTS = ["six times seven", "calculator", "", "Wie schön! " * 60]


@pytest.fixture(scope="module")
def client(either_url):
    with openai.OpenAI(base_url=f"{either_url}/v1", api_key="any", max_retries=0) as client:
        yield client


def expected(served, ids) -> list[float]:
    with torch.inference_mode():
        mean_D = served.loop.engine.model(torch.tensor([ids]))[0].double().mean(0)
    return (mean_D / mean_D.norm()).tolist()


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=True) or list(tokenizer.prefix_ids)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_they_are_the_normalized_means_of_the_hidden_states(client, served, tokenizer, encoding):
    more = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model="tiny", input=TEXTS, **more)
    ids = [ids_of(tokenizer, text) for text in TEXTS]
    assert [each.index for each in answer.data] == [0, 1, 2, 3]
    for each, one in zip(answer.data, ids, strict=True):
        numbers = each.embedding
        if isinstance(numbers, str):
            numbers = struct.unpack(f"<{served.loop.engine.model.config.dim}f", base64.b64decode(numbers))
        assert list(numbers) == pytest.approx(expected(served, one), abs=1e-5)
    n_tokens = sum(map(len, ids))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (n_tokens, n_tokens)


def test_token_ids_are_taken_as_they_are(client, served, tokenizer):
    ids = [ids_of(tokenizer, text) for text in TEXTS]
    several = client.embeddings.create(model="tiny", input=ids).data
    single = client.embeddings.create(model="tiny", input=ids[1]).data
    for each, one in zip([*several, *single], [*ids, ids[1]], strict=True):
        assert each.embedding == pytest.approx(expected(served, one), abs=1e-5)


def test_many_texts(client, tokenizer):
    texts = [f"{n} " * (1 + n % 7) for n in range(300)]
    answer = client.embeddings.create(model="tiny", input=texts)
    assert [each.index for each in answer.data] == list(range(300))
    one = client.embeddings.create(model="tiny", input=texts[299]).data[0].embedding
    assert answer.data[299].embedding == pytest.approx(one, abs=1e-6)
    assert answer.usage.prompt_tokens == sum(len(ids_of(tokenizer, text)) for text in texts)


def test_what_cannot_be_embedded_is_refused(client, served):
    dim = served.loop.engine.model.config.dim
    assert client.embeddings.create(model="tiny", input="six", dimensions=dim).data
    for wrong, words in (
        ({"dimensions": dim - 1}, f"embeddings of this model have {dim}"),
        ({"input": "six " * CONTEXT}, "context"),
        ({"input": []}, "send 1 to 2048"),
        ({"input": ["a"] * 2049}, "send 1 to 2048"),
        ({"input": [[10**6]]}, "outside the vocabulary"),
        ({"input": [7.5]}, "input"),
        ({"extra_body": {"encoding_format": "int8"}}, "encoding_format"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.embeddings.create(**({"model": "tiny", "input": "six"} | wrong))
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="six")


def test_the_forms_of_llamacpp_and_ollama(either_url, client):
    texts = ["six times", "seven"]
    known = [each.embedding for each in client.embeddings.create(model="tiny", input=texts).data]
    body = httpx.post(f"{either_url}/embedding", json={"content": texts}).json()
    assert [each["index"] for each in body] == [0, 1]
    assert [each["embedding"][0] for each in body] == [pytest.approx(each, abs=1e-6) for each in known]
    answer = ollama.Client(either_url).embed("tiny", texts)
    assert [list(each) for each in answer.embeddings] == [pytest.approx(each, abs=1e-6) for each in known]
    assert answer.prompt_eval_count == client.embeddings.create(model="tiny", input=texts).usage.prompt_tokens


def test_keys_budgets_and_the_bill(served, store, tokenizer):
    n = len(ids_of(tokenizer, "six times"))
    budget = (TokenBudget(unit="tokens", period="day", amount=3 * n),)
    keys = {
        "alice": KeyPolicy(budgets=budget, models={"tiny"}), "chat": KeyPolicy(scopes={"chat"}),
        "other": KeyPolicy(models={"x"}),
    }  # fmt: skip
    tokens = {name: create_key(store, name, policy, actor="test")[1] for name, policy in keys.items()}
    set_price(store, "tiny", TokenPrice(2_000_000, 0, 0), "EUR", "test")
    with running(served, store=store) as url:

        def embed(name, inputs):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=tokens[name], max_retries=0) as client:
                return client.embeddings.create(model="tiny", input=inputs, encoding_format="float")

        answer = embed("alice", ["six times", "six times"])
        assert answer.herd["cost"] == {"amount": f"{2 * 2 * n / 1e6:.6f}".rstrip("0"), "currency": "EUR"}
        with pytest.raises(openai.RateLimitError, match="budget"):
            embed("alice", ["six times", "six times"])
        embed("alice", "six times")
        for name in ("chat", "other"):
            with pytest.raises(openai.PermissionDeniedError):
                embed(name, "six")
    assert billed(store) == (2, 3 * n, 0)
    assert sum(row.money for row in read_usage(store)) == 3 * n * 2


def test_a_client_that_leaves_ends_the_work_and_is_not_billed(served, loop, store):
    _, token = create_key(store, "alice", KeyPolicy(), actor="test")
    with (
        running(served, store=store) as url,
        httpx.Client(base_url=url, headers={"x-api-key": token}) as http,
    ):
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/embeddings", json={"input": ["six times seven " * 100] * 500}, timeout=0.3)
        wait_until(lambda: loop.stats().active == 0 and loop.stats().waiting == 0)
        assert billed(store) == (0, 0, 0)


def test_the_table_has_every_field_of_the_openai_package():
    from openai.types.embedding_create_params import EmbeddingCreateParams

    assert set(EmbeddingCreateParams.__annotations__) == set(REQUESTS["embeddings"][2].model_fields)
