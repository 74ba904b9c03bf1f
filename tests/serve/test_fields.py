"""Every row of the table of fields does what its class says, and the table and the wire types agree."""

import pytest

from herd.serve.about import DetokenizeRequest, TokenizeRequest
from herd.serve.anthropic import CountRequest, MessagesRequest
from herd.serve.embeddings import EmbeddingRequest, LlamaCppEmbeddingRequest, OllamaEmbedRequest
from herd.serve.errors import ApiError
from herd.serve.fields import MAX_WARNINGS, field_table, sort_fields
from herd.serve.llamacpp import LlamaCppRequest, TemplateRequest
from herd.serve.ollama import GenerateRequest, OllamaChatRequest, OllamaModel
from herd.serve.openai_chat import ChatRequest
from herd.serve.openai_completions import CompletionRequest
from herd.serve.openai_responses import InputRequest, ResponsesRequest

ROWS = [row for rows in field_table().values() for row in rows.values()]
HELLO = {"messages": [{"role": "user", "content": "six"}]}
SHORT = {"stream": False, "options": {"num_predict": 1}}
REQUESTS = {
    "chat": ("/v1/chat/completions", HELLO | {"max_tokens": 1}, ChatRequest),
    "completions": ("/v1/completions", {"prompt": "six", "max_tokens": 1}, CompletionRequest),
    "embeddings": ("/v1/embeddings", {"input": "six"}, EmbeddingRequest),
    "llamacpp_embedding": ("/embedding", {"content": "six"}, LlamaCppEmbeddingRequest),
    "ollama_embed": ("/api/embed", {"model": "tiny", "input": "six"}, OllamaEmbedRequest),
    "llamacpp": ("/completion", {"prompt": "six", "n_predict": 1}, LlamaCppRequest),
    "apply_template": ("/apply-template", HELLO, TemplateRequest),
    "messages": ("/v1/messages", HELLO | {"max_tokens": 1}, MessagesRequest),
    "count_tokens": ("/v1/messages/count_tokens", HELLO, CountRequest),
    "responses": ("/v1/responses", {"input": "six", "max_output_tokens": 1}, ResponsesRequest),
    "input_tokens": ("/v1/responses/input_tokens", {"input": "six"}, InputRequest),
    "ollama_chat": ("/api/chat", HELLO | {"model": "tiny"} | SHORT, OllamaChatRequest),
    "ollama_generate": ("/api/generate", {"model": "tiny", "prompt": "six"} | SHORT, GenerateRequest),
    "ollama_show": ("/api/show", {"model": "tiny"}, OllamaModel),
    "tokenize": ("/tokenize", {"content": "six"}, TokenizeRequest),
    "detokenize": ("/detokenize", {"tokens": [1]}, DetokenizeRequest),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.api}-{row.name}")
def test_each_field_has_the_effect_of_its_class(row):
    if row.effect == "honoured":
        assert sort_fields(row.api, {row.name: 1}) == ({row.name: 1}, [])
        return
    assert row.example is not None, "the table needs an example of this field"
    assert sort_fields(row.api, {row.name: None}) == ({}, [])
    for value in row.harmless:
        assert sort_fields(row.api, {row.name: value}) == ({}, [])
    if row.effect == "refused":
        with pytest.raises(ApiError) as error:
            sort_fields(row.api, {row.name: row.example})
        assert (error.value.status, error.value.param) == (400, row.name)
        assert row.name in error.value.message
        assert row.reason in error.value.message
    else:
        honoured, warnings = sort_fields(row.api, {row.name: row.example})
        assert honoured == {}
        assert warnings == ([f"{row.name}={row.reason}"] if row.effect == "warned" else [])


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.effect != "honoured"], ids=lambda row: f"{row.api}-{row.name}"
)
def test_each_field_has_its_effect_over_http(row, http):
    path, body, _ = REQUESTS[row.api]
    response = http.post(path, json=body | {row.name: row.example})
    if row.effect == "refused":
        assert response.status_code == 400
        error = response.json()["error"]
        assert f"{row.name} is not supported" in (error if isinstance(error, str) else error["message"])
        return
    assert response.status_code == 200
    warnings = [f"{row.name}={row.reason}"] if row.effect == "warned" else []
    assert response.headers.get("x-herd-warnings", "") == "; ".join(warnings)
    if row.api not in ("count_tokens", "input_tokens"):  # their bodies have room for a number only
        assert response.json().get("herd", {}).get("warnings", []) == warnings


@pytest.mark.parametrize("api", REQUESTS)
def test_the_honoured_fields_are_those_of_the_wire_type(api):
    honoured = {name for name, row in field_table()[api].items() if row.effect == "honoured"}
    assert honoured == set(REQUESTS[api][2].model_fields)


def test_the_table_has_every_field_of_the_openai_package():
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase as Chat
    from openai.types.completion_create_params import CompletionCreateParamsBase as Completion
    from openai.types.responses.response_create_params import ResponseCreateParamsBase as Responses

    assert set(Chat.__annotations__) - set(field_table()["chat"]) == set()
    assert set(Responses.__annotations__) - set(field_table()["responses"]) == set()
    assert set(Completion.__annotations__) - set(field_table()["completions"]) == set()


def test_the_table_has_every_field_of_the_anthropic_package():
    from anthropic.types.message_count_tokens_params import MessageCountTokensParams as Count
    from anthropic.types.message_create_params import MessageCreateParamsBase as Messages

    assert set(Messages.__annotations__) - set(field_table()["messages"]) == set()
    assert set(Count.__annotations__) - set(field_table()["count_tokens"]) == set()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("temprature", "; did you mean temperature?"), ("max_token", "; did you mean max_tokens?"), ("zzz", "")],
)
def test_an_unknown_field_gives_a_warning_with_the_nearest_name(name, hint):
    assert sort_fields("chat", {name: 1}) == ({}, [f"{name}=unknown field, ignored{hint}"])
    with pytest.raises(ApiError, match="unknown field") as error:
        sort_fields("chat", {name: 1}, strict=True)
    assert error.value.message.endswith(hint)


def test_the_number_of_warnings_is_bounded():
    _, warnings = sort_fields("chat", {f"field{number}": 1 for number in range(1000)})
    assert len(warnings) == MAX_WARNINGS + 1
    assert warnings[-1] == f"and {1000 - MAX_WARNINGS} more"
