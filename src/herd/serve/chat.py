"""The one path from every API to the engine: a dialog or a text becomes a prompt that is ready to be answered.

An API translates its request into a `ChatCall` (or `TextCall`) and gets a `ReadyPrompt`, in which everything
has been checked that can be checked before computing. `answer.py` submits it and turns the tokens into events.
"""

from __future__ import annotations

import warnings as python_warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..engine.request import Request, Sampling
from ..errors import EngineError
from ..text.answers import AnswerParser
from ..text.chat_format import ChatFormat
from ..text.tokenizer import Tokenizer
from .dialog import shape_dialog
from .forms import AnswerForm, CallsFirstParser, answer_form
from .problems import BadRequest, PromptTooLong
from .tools import OfferedTool, ToolChoice

if TYPE_CHECKING:
    from ..engine.constraint import Constraint
    from ..engine.loop import EngineLoop

ANY_NAME = "*"


@dataclass(frozen=True)
class ServedModel:
    """A model with its engine, its names and the settings of its checkpoint.

    ``aliases`` are other names that clients may use. "*": any name. ``sampling`` has the checkpoint's defaults
    by the names of `Sampling`. ``adapters`` are the adapters on the model, whose names clients use like those of
    models. ``adapter`` is the one that a request has chosen ("": none). ``facts`` are shown to clients that ask
    about the model. ``created`` is in seconds since 1970. ``fingerprint`` changes if the same request may get
    another answer.
    """

    name: str
    loop: EngineLoop
    tokenizer: Tokenizer
    context: int
    aliases: frozenset[str] = frozenset()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    is_base: bool = False
    created: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = "herd"
    adapters: frozenset[str] = frozenset()
    adapter: str = ""

    @property
    def chat(self) -> ChatFormat:
        """The format of dialogs. Raises `BadRequest` if the model only continues text."""
        chat = None if self.is_base else self.tokenizer.chat
        if chat is None:
            why = "is a base model" if self.is_base else "has no chat template"
            raise BadRequest(f"{self.name} {why}: it continues text, with /v1/completions", "model")
        return chat

    def sampling_of(self, changes: Mapping[str, Any]) -> Sampling:
        """Return the checkpoint's settings with those of a request that are not None."""
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            return Sampling(**{"max_tokens": None, **self.sampling, **given})
        except EngineError as error:
            name = str(error).partition("=")[0]
            raise BadRequest(str(error), name if name in changes else None) from None


@dataclass
class ChatCall:
    """A request for the next message of a dialog, in the terms of no API in particular.

    ``messages`` are as `dialog.read_messages` returns them. ``sampling`` has fields of `Sampling`; None means
    the checkpoint's default. ``schema`` is the JSON schema of the answer's text. ``warnings`` are told to the
    client, and more are added. ``prefill`` is the beginning of the answer, which the model continues.
    ``grammar`` is the form of the answer's text, instead of a ``schema`` and without tools.
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


@dataclass(frozen=True)
class ReadyPrompt:
    """A prompt that has been checked, and how to read the answer.

    ``make_parser`` returns a new parser for each of the ``n`` answers (None: all of it is text). ``tools`` are
    those that the model may call, by name. ``prompt_logprobs`` asks for the prompt's log-probabilities too.
    """

    ids: list[int]
    sampling: Sampling
    n: int = 1
    form: AnswerForm = field(default_factory=AnswerForm)
    make_parser: Callable[[], AnswerParser] | None = None
    tools: Mapping[str, OfferedTool] = field(default_factory=dict)
    prompt_logprobs: int | None = None
    adapter: str = ""

    def request(self, tenant: str, owner: str) -> Request:
        """Return the request for the engine."""
        more: dict[str, Any] = {}
        if self.prompt_logprobs is not None:
            more["prompt_logprobs"] = self.prompt_logprobs
        return Request(
            self.ids, self.sampling, constraint=self.form.constraint, tenant=tenant, owner=owner,
            adapter=self.adapter, **more,
        )  # fmt: skip

    def max_completion_tokens(self, context: int) -> int:
        """Return the most tokens that all answers together can have."""
        room = context - len(self.ids)
        return self.n * min(self.sampling.max_tokens or room, room)


def prepare_chat(served: ServedModel, call: ChatCall, *, any_length: bool = False) -> ReadyPrompt:
    """Render a dialog and check everything about the request. Raises `ApiError` for what cannot be served.

    ``any_length``: the prompt may exceed the context, because its tokens are only counted.
    """
    chat, tokenizer = served.chat, served.tokenizer
    tools = () if call.tool_choice.mode == "none" else tuple(call.tools)
    with python_warnings.catch_warnings(record=True) as noted:
        python_warnings.simplefilter("always")
        dialog = shape_dialog(call.messages, tools, chat, call.warnings)
        form = _form(call, tools, dialog.call_format, tokenizer)
        rendered = chat.render(dialog.messages, tools=dialog.tools, generation_prompt=True)
    call.warnings += [f"messages={note.message}" for note in noted]
    ids = rendered.ids + (tokenizer.encode(call.prefill) if call.prefill else [])
    if not any_length:
        check_length(ids, served.context)

    def make_parser() -> AnswerParser:
        if form.constraint is None:
            return chat.parser(tools=form.has_calls)
        if form.calls_first:
            return CallsFirstParser(dialog.call_format, drops_space=tokenizer.adds_space)
        return AnswerParser(tools=form.has_calls, drops_space=tokenizer.adds_space)

    sampling = served.sampling_of(call.sampling)
    room = served.context - len(ids)
    if (call.sampling.get("max_tokens") or 0) > room > 0:
        call.warnings.append(f"max_tokens=the context has room for {room:,} tokens after this prompt")
    offered = {tool.name: tool for tool in tools}
    return ReadyPrompt(ids, sampling, call.n, form, make_parser, offered, adapter=served.adapter)


def _form(call: ChatCall, tools: Sequence[OfferedTool], call_format: str, tokenizer: Tokenizer) -> AnswerForm:
    if call.grammar is None:
        return answer_form(
            tokenizer, call_format, tools, call.tool_choice, call.parallel_calls, call.schema, call.warnings
        )
    if tools or call.schema is not None:
        raise BadRequest("grammar excludes tools and response_format: leave one out", "grammar")
    return AnswerForm(call.grammar)


def prepare_text(
    served: ServedModel,
    prompt: str | Sequence[int],
    sampling: Mapping[str, Any],
    n: int = 1,
    constraint: Constraint | None = None,
    prompt_logprobs: int | None = None,
) -> ReadyPrompt:
    """Return the prompt for a continuation of a text, or of token ids, which are taken as they are."""
    tokenizer = served.tokenizer
    ids = tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt)
    if not ids:
        ids = list(tokenizer.prefix_ids)
    if not isinstance(prompt, str):
        check_ids(ids, tokenizer.vocab_size, "prompt")
    check_length(ids, served.context)
    form = AnswerForm(constraint)
    sampled = served.sampling_of(sampling)
    return ReadyPrompt(ids, sampled, n, form, prompt_logprobs=prompt_logprobs, adapter=served.adapter)


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise `BadRequest` for a token id outside the vocabulary."""
    for id_ in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= id_ < vocab_size:
            raise BadRequest(f"{param}: token {id_} is outside the vocabulary of {vocab_size:,}", param)


def check_length(ids: Sequence[int], context: int) -> None:
    """Raise `BadRequest` with both numbers if a prompt leaves no room for an answer. It is never shortened."""
    if len(ids) >= context:
        raise PromptTooLong(len(ids), context)
