"""Turn whatever a handler raises into the `ApiError` that a client sees.

Errors of Herd's other rooms are told by their class, and a bug becomes a 500 that does not tell a client
anything about the inside.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from pydantic import ValidationError

from ..errors import (
    ChatError,
    ConstraintError,
    ContextError,
    EngineBusyError,
    EngineError,
    HerdError,
    TokenizerError,
)
from .errors import ApiError

log = logging.getLogger("herd.serve")


class BadRequest(ApiError):
    """A request that cannot be served as it is. ``param`` names the field at fault."""

    status, type = 400, "invalid_request_error"


def parsed_json(text: str, where: str) -> Any:
    """Return the value of a JSON text inside a request. Raises `BadRequest` if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{where} is not JSON: {str(error)[:100]}", where) from None


class PromptTooLong(BadRequest):
    """A prompt that leaves no room for an answer. ``numbers`` are in the body of the error, for programs."""

    def __init__(self, n_tokens: int, context: int) -> None:
        super().__init__(
            f"the prompt has {n_tokens:,} tokens, which exceeds the available context size: this model's "
            f"maximum context length is {context:,} tokens, prompt and answer together; shorten the prompt",
            "messages",
            code="context_length_exceeded",
        )
        self.numbers = {"n_prompt_tokens": n_tokens, "n_ctx": context}


class ServerFault(ApiError):
    """A failure of the server, not of the request."""


class Overloaded(ApiError):
    """A server that cannot take another request now."""

    status, type, code, retry_after = 503, "overloaded_error", "overloaded", 2.0


def api_error(error: BaseException, submitting: bool = False) -> ApiError:
    """Return the `ApiError` that tells a client about ``error``. Logs bugs with their traceback.

    An error of the engine is the request's fault while ``submitting``, and the server's afterwards.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return validation_error(error)
    if isinstance(error, ContextError):
        return BadRequest(str(error), "messages", code="context_length_exceeded")
    if isinstance(error, EngineBusyError):
        return Overloaded(str(error))
    if isinstance(error, ConstraintError):
        return BadRequest(str(error), code="invalid_schema")
    if isinstance(error, ChatError | TokenizerError):
        return BadRequest(str(error), "messages")
    if isinstance(error, EngineError) and submitting:
        return BadRequest(str(error))
    if isinstance(error, HerdError):
        log.error("a request failed: %s", error)
        return ServerFault(str(error))
    log.error("a request failed by a bug", exc_info=error)
    return ServerFault("the server failed at this request; its log says more")


def validation_error(error: ValidationError) -> BadRequest:
    """Return the first problem of a body that does not fit its wire type, with the path of the field."""
    problem = error.errors(include_url=False, include_context=False)[0]
    path = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part and part not in ("str", "int", "float", "bool"):  # names of branches
            path += f".{part}" if path else part
    value = repr(problem.get("input"))
    shown = "" if problem["type"] == "missing" else f"={value[:60]}{'…' * (len(value) > 60)}"
    return BadRequest(f"{path}{shown}: {problem['msg'][:300]}", path or None)


def error_headers(error: ApiError) -> dict[str, str]:
    """Return the headers by which clients decide whether and when to try again."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def openai_error(error: ApiError) -> dict[str, Any]:
    """Return the body of an error as OpenAI's API has it."""
    fields: dict[str, Any] = {name: getattr(error, name) for name in ("message", "type", "param", "code")}
    if isinstance(error, PromptTooLong):
        fields |= {"type": "exceed_context_size_error"} | error.numbers  # as llama.cpp's clients expect
    return {"error": fields}
