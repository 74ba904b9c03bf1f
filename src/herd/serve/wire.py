"""What the wire types of the APIs have in common: reading a request and the settings of sampling."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..engine.constraint import MAX_TEXT
from .body import read_json
from .fields import sort_fields
from .problems import BadRequest, api_error
from .settings import ServeSettings

MAX_STOP_CHARACTERS = 1000
FORMS = (
    "response_format", "json_schema", "grammar", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "structured_outputs",
)  # fmt: skip
"""Fields with the form of an answer: OpenAI's, llama.cpp's and vLLM's. Another server reads more of them."""


def check_stop_strings(stop: Any) -> Any:
    """Return ``stop``. Raises ValueError, for pydantic, if a string is empty or too long."""
    texts = [stop] if isinstance(stop, str) else stop or ()
    if any(not 0 < len(text) <= MAX_STOP_CHARACTERS for text in texts):
        raise ValueError(f"stop strings must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stop


StopStrings = Annotated[list[str] | None, AfterValidator(check_stop_strings)]


class RequestModel(BaseModel):
    """A request body: the honoured fields of an API. Numbers must be numbers, not text."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None

    @property
    def model_name(self) -> str | None:
        """The name of the model that is to answer, or None for the first one."""
        return self.model

    def check_limits(self, settings: ServeSettings) -> None:
        """Raise `BadRequest` for more choices or stop strings than the server allows."""
        if (n := getattr(self, "n", None) or 1) > settings.max_choices:
            raise BadRequest(f"n={n} is more than this server's limit of {settings.max_choices}", "n")
        for name in ("stop", "stop_sequences"):
            stop = getattr(self, name, None)
            if isinstance(stop, list) and len(stop) > settings.max_stop:
                raise BadRequest(f"{name} has {len(stop)} strings, the limit is {settings.max_stop}", name)


RequestT = TypeVar("RequestT", bound=RequestModel)


class StreamOptions(BaseModel, strict=True):
    """Options of a stream: a last chunk, or every chunk (``continuous_usage_stats``), has the usage."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(RequestModel):
    """The fields that the completions of OpenAI and llama.cpp share. By default the checkpoint decides."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    ignore_eos: bool | None = None
    stream: bool | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = Field(None, max_length=MAX_TEXT)
    cache_salt: str | None = Field(None, max_length=256)

    def sampling(self) -> dict[str, Any]:
        """Return the settings of these fields by the names of `engine.Sampling`."""
        same = {"temperature", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty"}
        top_k = 0 if self.top_k == -1 else self.top_k
        return self.model_dump(include=same | {"ignore_eos"}) | {"top_k": top_k}


class CompletionFields(SamplingFields):
    """The fields that OpenAI's chat completions and completions have in common.

    For a model of another server, ``model_extra`` has the fields that go there as they are.
    """

    model_config = ConfigDict(extra="allow")

    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[str | list[str] | None, AfterValidator(check_stop_strings)] = None
    n: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = Field(None, max_length=MAX_TEXT)
    guided_choice: list[str] | None = None
    guided_grammar: str | None = Field(None, max_length=MAX_TEXT)
    structured_outputs: dict[str, Any] | None = None
    user: str | None = None

    def sampling(self) -> dict[str, Any]:
        """Return the settings by the names of `engine.Sampling`, without max_tokens and logprobs."""
        return super().sampling() | {
            "repetition_penalty": self.repetition_penalty,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "logit_bias": _biases(self.logit_bias),
        }

    @property
    def forms(self) -> dict[str, Any]:
        """The fields with the form of the answer, by their names."""
        return {name: form for name in FORMS if (form := getattr(self, name)) is not None}

    @property
    def passed(self) -> dict[str, Any]:
        """The fields that a model of another server gets as they are: unknown ones, and forms.

        ``json_schema`` becomes a ``response_format``, which every server knows.
        """
        forms = {name: form for name, form in self.forms.items() if name != "json_schema"}
        return {**(self.model_extra or {}), **forms}


async def read_request(request: Request, api: str, model: type[RequestT]) -> tuple[RequestT, list[str]]:
    """Return the honoured fields of a request and warnings about others. Raises `ApiError`."""
    settings: ServeSettings = request.app.state.settings
    body = await read_json(request, settings)
    is_upstream = request.app.state.models.is_upstream(body.get("model"))
    honoured, warnings = sort_fields(api, body, strict=settings.strict, is_upstream=is_upstream)
    try:
        parsed = model.model_validate(honoured)
    except ValueError as error:
        raise api_error(error) from None
    parsed.check_limits(settings)
    return parsed, warnings


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """Return the arguments of a route that describe its body, which `read_request` reads."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    inner = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, inner)}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}, "response_model": None}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a schema with references replaced by what they refer to."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}


def _biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    """Return biases by token id. JSON has only text as keys."""
    if biases is None:
        return None
    out = {}
    for text, bias in biases.items():
        if not text.isascii() or not text.isdecimal() or len(text) > 9:
            raise BadRequest(f"logit_bias: {text[:40]!r} is not a token id", "logit_bias")
        if not -100 <= bias <= 100:
            raise BadRequest(f"logit_bias of token {text}: {bias} must be between -100 and 100", "logit_bias")
        out[int(text)] = bias
    return out
