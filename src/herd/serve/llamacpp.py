"""llama.cpp's own API beside OpenAI's: ``/completion``, ``/apply-template``, ``/props`` and ``/slots``.

Clients of this API write the chat template themselves, or let ``/apply-template`` write it, and send the text
as a prompt. So texts that spell special tokens become these tokens here, and only here. Only models of this
process have this API.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.responses import Response

from .. import __version__
from ..engine.request import Sampling
from ..text.tokenizer import Tokenizer
from .answer import LiveAnswer
from .auth import ForCompletions, ForMetrics, ForModels, ForTokenize
from .calls import ChatCall, TextCall
from .chat import ServedModel
from .dialog import read_messages
from .events import AnswerEvent, AnswerText, Choice, ScoredToken
from .exchange import open_exchange
from .forms import enforceable_schema, grammar_constraint
from .models import use_model
from .openai_completions import MAX_PROMPTS
from .problems import BadRequest
from .respond import AnswerWriter, respond, sse_data
from .tools import read_tools
from .wire import RequestModel, SamplingFields, StopStrings, documented

router = APIRouter()
PROMPT_STRING = "prompt_string"


class LlamaCppRequest(SamplingFields):
    """The honoured fields of a request to ``/completion`` (`fields.yaml` has the others)."""

    prompt: str | dict[str, Any] | list[Any]
    n_predict: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-1)
    stop: StopStrings = None
    repeat_penalty: float | None = Field(None, gt=0)
    logit_bias: list[Any] | dict[str, Any] | None = None
    n_probs: int | None = Field(None, ge=0, le=100)
    return_tokens: bool | None = None
    response_fields: list[str] | None = Field(None, max_length=64)


class TemplateRequest(RequestModel):
    """A dialog to write as the text of a prompt."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None


@router.post("/completion", **documented(LlamaCppRequest))
async def completion(request: Request, principal: ForCompletions) -> Response:
    """Continue one or more prompts."""
    exchange = await open_exchange(request, principal, "llamacpp", LlamaCppRequest)
    asked, served = exchange.asked, _own_model(exchange.served)
    calls = await run_in_threadpool(_text_calls, asked, served, exchange.warnings)
    prompts = [await served.prepare_text(call) for call in calls]
    return await respond(exchange, prompts, LlamaCppWriter(served, asked), stream=bool(asked.stream))


@router.post("/apply-template", **documented(TemplateRequest))
async def apply_template(request: Request, principal: ForTokenize) -> Response:
    """Return a dialog as the text of a prompt, without the token that ``/completion`` puts before it."""
    exchange = await open_exchange(request, principal, "apply_template", TemplateRequest)
    asked, served, warnings = exchange.asked, _own_model(exchange.served), exchange.warnings
    tools = read_tools(asked.tools, warnings, exchange.offer)
    call = ChatCall(read_messages(asked.messages, warnings), tools=tools, warnings=warnings)
    text = await served.chat_text(call, generation_prompt=asked.add_generation_prompt is not False)
    return exchange.json({"prompt": text})


@router.get("/props")
async def props(request: Request, principal: ForModels) -> dict[str, Any]:
    """Return the properties of the model: its context, its settings and its chat template."""
    served = _own_model(await use_model(request, principal, request.query_params.get("model")))
    tokenizer = served.tokenizer
    return {
        "default_generation_settings": {
            "n_ctx": served.context,
            "params": generation_settings(served.sampling_of({})),
        },
        "total_slots": served.parallel,
        "model_alias": served.name,
        "model_path": served.facts.get("file", served.name),
        "modalities": {"vision": False, "audio": False},
        "chat_template": tokenizer.chat_template or "",
        "bos_token": tokenizer.token_names.get("bos_token", ""),
        "eos_token": tokenizer.token_names.get("eos_token", ""),
        "build_info": f"herd-{__version__}",
    }


@router.get("/slots")
async def slots(request: Request, principal: ForMetrics) -> list[dict[str, Any]]:
    """Return one entry for each answer that can be generated at once: whether one is."""
    served = _own_model(await use_model(request, principal, request.query_params.get("model")))
    active = served.stats().active
    return [
        {"id": number, "n_ctx": served.context, "is_processing": number < active}
        for number in range(served.parallel)
    ]


def generation_settings(sampling: Sampling) -> dict[str, Any]:
    """Return the settings of an answer by llama.cpp's names. A bias of null forbids its token."""
    same = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
    return {name: getattr(sampling, name) for name in same} | {
        "n_predict": sampling.max_tokens or -1,
        "seed": -1 if sampling.seed is None else sampling.seed,
        "repeat_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
        "n_probs": sampling.logprobs or 0,
        "logit_bias": [
            {"token": id_, "bias": bias if math.isfinite(bias) else None}
            for id_, bias in sampling.logit_bias.items()
        ],
    }


def _own_model(served: Any) -> ServedModel:
    if not isinstance(served, ServedModel):
        raise BadRequest(f"{served.name} runs on another server: use /v1/completions", "model", status=501)
    return served


def _text_calls(asked: LlamaCppRequest, served: ServedModel, warnings: list[str]) -> list[TextCall]:
    tokenizer = served.tokenizer
    prompts = [_encoded(tokenizer, parts) for parts in _prompts(asked.prompt)]
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise BadRequest(f"prompt has {len(prompts)} texts: send 1 to {MAX_PROMPTS}", "prompt")
    if asked.n_predict == 0:
        raise BadRequest(
            "n_predict=0 asks for no token: send at least 1, or -1 for all that fit", "n_predict"
        )
    wants_ids = asked.stream or asked.return_tokens
    sampling = asked.sampling() | {
        "max_tokens": served.context if asked.n_predict == -1 else asked.n_predict,
        "seed": None if asked.seed == -1 else asked.seed,
        "stop": tuple(asked.stop or ()),
        "repetition_penalty": asked.repeat_penalty,
        "logit_bias": _biases(asked.logit_bias, tokenizer),
        "logprobs": asked.n_probs or (0 if wants_ids else None),
    }
    schema, grammar = None, None
    if asked.json_schema is not None:
        schema = enforceable_schema(asked.json_schema, True, "json_schema", warnings)
    if asked.grammar:
        if schema is not None:
            raise BadRequest("grammar excludes json_schema: leave one out", "grammar")
        grammar = grammar_constraint(asked.grammar)
    return [TextCall(ids, sampling, 1, schema, grammar, cache_salt=asked.cache_salt or "") for ids in prompts]


def _prompts(given: Any) -> list[Any]:
    """Return the prompts of a request, each as a list of texts and token ids.

    A list with a token id is one prompt, and a list of anything else has several.
    """
    is_one = isinstance(given, str | Mapping) or any(type(each) is int for each in given)
    return [_parts(each) for each in ([given] if is_one else given)]


def _parts(prompt: Any) -> list[str | int]:
    if isinstance(prompt, Mapping):
        if set(prompt) != {PROMPT_STRING}:
            raise BadRequest(
                f"prompt: an object has {PROMPT_STRING} only; the model reads text only", "prompt"
            )
        prompt = prompt[PROMPT_STRING]
    parts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(parts, list) or not all(type(each) in (str, int) for each in parts):
        raise BadRequest("prompt must be a text, a list of texts and token ids, or a list of such", "prompt")
    return parts


def _encoded(tokenizer: Tokenizer, parts: Sequence[str | int]) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(parts):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part, bos=number == 0, special=True)
    return ids


def _biases(given: Any, tokenizer: Tokenizer) -> dict[int, float] | None:
    """Return biases by token id. A text means all of its tokens, and the bias false forbids a token."""
    if given is None:
        return None
    biases: dict[int, float] = {}
    for pair in given.items() if isinstance(given, Mapping) else given:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRequest("logit_bias must be a list of [token, bias]", "logit_bias")
        token, bias = pair
        if isinstance(token, str):
            is_id = isinstance(given, Mapping) and token.isascii() and token.isdecimal() and len(token) < 10
            ids = [int(token)] if is_id else tokenizer.encode(token)
        else:
            ids = [token]
        biases |= dict.fromkeys(ids, -math.inf if bias is False else bias)
    return biases


class LlamaCppWriter(AnswerWriter):
    """Writes an answer as llama.cpp's completion, or as its chunks."""

    def __init__(self, served: ServedModel, asked: LlamaCppRequest) -> None:
        self._served, self._asked = served, asked
        self._choices: dict[int, Choice] = {}

    def event(self, event: AnswerEvent) -> bytes:
        """Return the chunk of a piece of text. The chunks of ends come last, with the times."""
        self._choices.setdefault(event.index, Choice(event.index)).add(event)
        if not isinstance(event, AnswerText):
            return b""
        chunk = {
            "index": event.index,
            "content": event.text,
            "tokens": [score.id for score in event.logprobs],
            "stop": False,
            "tokens_predicted": self._answer.tokens.get(event.index, 0),
            "tokens_evaluated": self._answer.prompts[event.index].n_tokens,
        }
        return sse_data(chunk | self._probabilities(event.logprobs))

    def end(self, answer: LiveAnswer) -> bytes:
        """Return the last chunk of each choice."""
        return b"".join(
            sse_data(self._whole(choice, answer, is_chunk=True)) for choice in self._choices.values()
        )

    def body(self, choices: Sequence[Choice], answer: LiveAnswer) -> Any:
        """Return a completion, or a list of them for several prompts."""
        bodies = [self._whole(choice, answer) for choice in choices]
        return bodies if isinstance(self._asked.prompt, list) and len(bodies) > 1 else bodies[0]

    def _whole(self, choice: Choice, answer: LiveAnswer, *, is_chunk: bool = False) -> dict[str, Any]:
        prompt: Any = answer.prompts[choice.index]
        predicted = answer.tokens.get(choice.index, 0)
        wants_ids = self._asked.return_tokens and not is_chunk
        body = {
            "index": choice.index,
            "content": "" if is_chunk else choice.text,
            "tokens": [score.id for score in choice.logprobs] if wants_ids else [],
            "stop": True,
            "model": self._served.name,
            "tokens_predicted": predicted,
            "tokens_evaluated": prompt.n_tokens,
            "tokens_cached": answer.usage.cached_tokens,
            "generation_settings": generation_settings(prompt.sampling),
            "prompt": self._served.tokenizer.decode(prompt.ids),
            "has_new_line": "\n" in choice.text,
            "truncated": choice.reason == "length" and prompt.n_tokens + predicted >= self._served.context,
            "stop_type": "limit" if choice.reason == "length" else "word" if choice.stop_string else "eos",
            "stopping_word": choice.stop_string or "",
            "timings": answer.usage.timings,
        }
        if not is_chunk:
            body |= self._probabilities(choice.logprobs)
        return _selected(body | answer.warned, self._asked.response_fields or ())

    def _probabilities(self, scores: Sequence[ScoredToken]) -> dict[str, Any]:
        if not self._asked.n_probs:
            return {}

        def token(id_: int | None, raw: bytes, nats: float | None) -> dict[str, Any]:
            text = raw.decode("utf-8", "replace")
            return {"id": id_, "token": text, "bytes": list(raw), "logprob": max(nats or 0.0, -9999.0)}

        rows = []
        for score in scores:
            top = [token(id_, *pair) for id_, pair in zip(score.top_ids, score.top, strict=True)]
            rows.append(token(score.id, score.raw, score.logprob) | {"top_logprobs": top})
        return {"completion_probabilities": rows}


def _selected(body: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a body that are named, e.g. ``generation_settings/seed``. No name: all of them."""
    if not names:
        return body
    out = {}
    for name in names:
        value: Any = body
        for key in name.split("/"):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            out[name] = value
    return out
