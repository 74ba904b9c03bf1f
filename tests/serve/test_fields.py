"""Every row of the table of fields does what its class says, and the table and the wire types agree."""

import pytest

from herd.serve.about import DetokenizeRequest, TokenizeRequest
from herd.serve.errors import ApiError
from herd.serve.fields import MAX_WARNINGS, field_table, sort_fields
from herd.serve.openai_chat import ChatRequest
from herd.serve.openai_completions import CompletionRequest

ROWS = [row for rows in field_table().values() for row in rows.values()]
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
BODIES = {
    "chat": {"messages": [{"role": "user", "content": "six"}], "max_tokens": 1},
    "completions": {"prompt": "six", "max_tokens": 1},
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
    "row",
    [row for row in ROWS if row.api in PATHS and row.effect != "honoured"],
    ids=lambda row: f"{row.api}-{row.name}",
)
def test_each_field_has_its_effect_over_http(row, http):
    response = http.post(PATHS[row.api], json=BODIES[row.api] | {row.name: row.example})
    if row.effect == "refused":
        assert response.status_code == 400
        assert response.json()["error"]["param"] == row.name
        return
    assert response.status_code == 200
    warnings = response.json().get("herd", {}).get("warnings", [])
    assert warnings == ([f"{row.name}={row.reason}"] if row.effect == "warned" else [])
    assert response.headers.get("x-herd-warnings", "") == "; ".join(warnings)


@pytest.mark.parametrize(
    ("api", "model"),
    [
        ("chat", ChatRequest),
        ("completions", CompletionRequest),
        ("tokenize", TokenizeRequest),
        ("detokenize", DetokenizeRequest),
    ],
)
def test_the_honoured_fields_are_those_of_the_wire_type(api, model):
    honoured = {name for name, row in field_table()[api].items() if row.effect == "honoured"}
    assert honoured == set(model.model_fields)


def test_the_table_has_every_field_of_the_openai_package():
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase as Chat
    from openai.types.completion_create_params import CompletionCreateParamsBase as Completion

    assert set(Chat.__annotations__) - set(field_table()["chat"]) == set()
    assert set(Completion.__annotations__) - set(field_table()["completions"]) == set()


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
