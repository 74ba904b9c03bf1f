"""Requests of clients, independent of any API. Every API translates its requests into these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..engine.request import Sampling
from ..errors import EngineError
from .problems import BadRequest
from .tools import OfferedTool, ToolChoice

if TYPE_CHECKING:
    from ..engine.constraint import Constraint


@dataclass
class ChatCall:
    """A request for the next message of a dialog.

    ``messages`` are as `dialog.read_messages` returns them. ``sampling`` has fields of `Sampling`; None means
    the checkpoint's default. ``schema`` is the JSON schema of the answer's text. ``warnings`` are told to the
    client, and more are added. ``prefill`` is the beginning of the answer, which the model continues.
    ``grammar`` is the form of the answer's text, instead of a ``schema`` and without tools. Only requests of
    one ``cache_salt`` and of the same group of keys share cached prompts. ``passed`` are fields that a model
    of another server gets as they are, and a model of this process never.
    """

    messages: list[dict[str, Any]]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[OfferedTool] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_calls: bool = True
    schema: dict[str, Any] | None = None
    n: int = 1
    warnings: list[str] = field(default_factory=list)
    prefill: str = ""
    grammar: Constraint | None = None
    cache_salt: str = ""
    passed: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class TextCall:
    """A request to continue a text, or token ids, which are taken as they are.

    ``echo``: the answer begins with the prompt. The other fields are those of `ChatCall`.
    """

    prompt: str | list[int]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    schema: dict[str, Any] | None = None
    grammar: Constraint | None = None
    echo: bool = False
    cache_salt: str = ""
    passed: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class EmbeddingCall:
    """A request for the embeddings of texts, or of token ids, which are taken as they are.

    ``param`` is the field that they came in. ``dimensions`` is the size that the client wants. ``passed`` is
    as in `ChatCall`.
    """

    inputs: Sequence[str | list[int]]
    param: str
    dimensions: int | None = None
    passed: Mapping[str, Any] = field(default_factory=dict)


def checked_sampling(defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> Sampling:
    """Return a model's settings, replaced by those of a request that are not None. Raises `BadRequest`.

    ``ignore_eos`` is left out: only the model knows the tokens that it means.
    """
    given = {name: value for name, value in changes.items() if value is not None and name != "ignore_eos"}
    try:
        return Sampling(**{"max_tokens": None, **defaults, **given})
    except EngineError as error:
        name = str(error).partition("=")[0]
        raise BadRequest(str(error), name if name in changes else None) from None
