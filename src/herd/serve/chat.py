"""The model of this process's engine: a dialog or a text becomes a prompt that is ready to be answered.

An API translates its request into a `ChatCall` or `TextCall` and gets a `ReadyPrompt`, in which everything
has been checked that can be checked before computing. `engine_source.py` turns the tokens of the engine into
events.
"""

from __future__ import annotations

import math
import warnings as python_warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastapi.concurrency import run_in_threadpool

from ..engine.constraint import Constraint
from ..engine.request import Request, Sampling
from ..text.answers import AnswerParser
from ..text.chat_format import ChatFormat
from ..text.tokenizer import Tokenizer
from .calls import ChatCall, EmbeddingCall, TextCall, checked_sampling
from .dialog import shape_dialog
from .embedding_source import EmbeddingPrompt, EmbeddingSource
from .engine_source import start_engine_source
from .forms import AnswerForm, CallsFirstParser, answer_form
from .problems import BadRequest, PromptTooLong
from .source import AnswerSource, Servable
from .tools import OfferedTool

if TYPE_CHECKING:
    from ..engine.loop import EngineLoop, EngineStats
    from .auth import Principal

ANY_NAME = "*"


@dataclass(frozen=True)
class ServedModel(Servable["ReadyPrompt | EmbeddingPrompt"]):
    """A model with its engine in this process, and the settings of its checkpoint.

    ``sampling`` has the checkpoint's defaults by the names of `Sampling`. ``adapter`` is the one that a
    request has chosen ("": none). ``parallel`` is the number of answers that are generated at once.
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
    parallel: int = 1

    def with_adapter(self, name: str) -> ServedModel:
        return replace(self, adapter=name)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def has_chat(self) -> bool:
        return not self.is_base and self.tokenizer.chat is not None

    @property
    def chat(self) -> ChatFormat:
        """The format of dialogs. Raises `BadRequest` if the model only continues text."""
        chat = None if self.is_base else self.tokenizer.chat
        if chat is None:
            why = "is a base model" if self.is_base else "has no chat template"
            raise BadRequest(f"{self.name} {why}: it continues text, with /v1/completions", "model")
        return chat

    def sampling_of(self, changes: Mapping[str, Any]) -> Sampling:
        """Return the checkpoint's settings with those of a request that are not None.

        ``ignore_eos`` forbids all tokens that end an answer.
        """
        if changes.get("ignore_eos"):
            forbidden = dict.fromkeys(sorted(self.tokenizer.stop_ids), -math.inf)
            changes = {**changes, "logit_bias": {**(changes.get("logit_bias") or {}), **forbidden}}
        return checked_sampling(self.sampling, changes)

    async def prepare_chat(self, call: ChatCall) -> ReadyPrompt:
        return await run_in_threadpool(prepare_chat, self, call)

    async def prepare_text(self, call: TextCall) -> ReadyPrompt:
        return await run_in_threadpool(prepare_text, self, call)

    async def prepare_embeddings(self, call: EmbeddingCall) -> list[EmbeddingPrompt]:
        dim = self.loop.engine.model.config.dim
        if call.dimensions not in (None, dim):
            raise BadRequest(
                f"dimensions={call.dimensions}: embeddings of this model have {dim}", "dimensions"
            )

        def encode() -> list[list[int]]:
            return [text_ids(self, each, call.param) for each in call.inputs]

        return [EmbeddingPrompt(await run_in_threadpool(encode), self.adapter)]

    async def encode_chat(self, call: ChatCall) -> list[int]:
        prompt = await run_in_threadpool(lambda: prepare_chat(self, call, any_length=True))
        return prompt.ids

    async def chat_text(self, call: ChatCall, *, generation_prompt: bool) -> str:
        """Return a dialog as text, without the token that begins every text."""
        return await run_in_threadpool(chat_text, self, call, generation_prompt)

    async def encode(self, text: str, *, bos: bool, special: bool) -> list[int]:
        return await run_in_threadpool(lambda: self.tokenizer.encode(text, bos=bos, special=special))

    async def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.tokenizer.vocab_size, "tokens")
        return self.tokenizer.decode(ids)

    async def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        return [self.tokenizer.token_bytes(id_) for id_ in ids]

    async def start(
        self, prompts: Sequence[ReadyPrompt | EmbeddingPrompt], principal: Principal
    ) -> AnswerSource:
        if isinstance(prompts[0], EmbeddingPrompt):
            return EmbeddingSource(self.loop, prompts[0], principal.cache_group, principal.key_id)
        ready = [prompt for prompt in prompts if isinstance(prompt, ReadyPrompt)]
        return await start_engine_source(self.loop, self.tokenizer, ready, principal)

    def stats(self) -> EngineStats:
        return self.loop.stats()

    def close(self, drain_seconds: float = 0.0) -> None:
        self.loop.close(drain_seconds)


@dataclass(frozen=True)
class ReadyPrompt:
    """A prompt that has been checked, and how to read the answer.

    ``make_parser`` returns a new parser for each of the ``n`` answers (None: all of it is text). ``tools``
    are those that the model may call, by name. ``echo``: the answer begins with the prompt, and with its
    log-probabilities if those of the answer are wanted.
    """

    ids: list[int]
    sampling: Sampling
    n: int = 1
    form: AnswerForm = field(default_factory=AnswerForm)
    make_parser: Callable[[], AnswerParser] | None = None
    tools: Mapping[str, OfferedTool] = field(default_factory=dict)
    echo: bool = False
    adapter: str = ""
    cache_salt: str = ""

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def request(self, tenant: str, owner: str) -> Request:
        """Return the request for the engine."""
        more: dict[str, Any] = {}
        if self.cache_salt:
            tenant = f"{tenant}\0{self.cache_salt}"
        if self.echo and self.sampling.logprobs is not None:
            more["prompt_logprobs"] = self.sampling.logprobs
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
    with _noting(call.warnings):
        dialog = shape_dialog(call.messages, tools, chat, call.warnings)
        form = _form(call, tools, dialog.call_format, tokenizer)
        rendered = chat.render(dialog.messages, tools=dialog.tools, generation_prompt=True)
    ids = rendered.ids + (tokenizer.encode(call.prefill) if call.prefill else [])
    if not any_length:
        check_length(ids, served.context)

    def make_parser() -> AnswerParser:
        if form.constraint is None:
            return chat.parser(tools=offered.keys() if form.has_calls else False)
        if form.calls_first:
            return CallsFirstParser(dialog.call_format, drops_space=tokenizer.adds_space)
        return AnswerParser(tools=form.has_calls, drops_space=tokenizer.adds_space)

    sampling = served.sampling_of(call.sampling)
    room = served.context - len(ids)
    if (call.sampling.get("max_tokens") or 0) > room > 0:
        call.warnings.append(f"max_tokens=the context has room for {room:,} tokens after this prompt")
    offered = {tool.name: tool for tool in tools}
    return ReadyPrompt(
        ids, sampling, call.n, form, make_parser, offered, adapter=served.adapter, cache_salt=call.cache_salt
    )


def chat_text(served: ServedModel, call: ChatCall, generation_prompt: bool) -> str:
    """Return a dialog as the chat format writes it, without the token that begins every text."""
    with _noting(call.warnings):
        dialog = shape_dialog(call.messages, call.tools, served.chat, call.warnings)
        ids = served.chat.render(dialog.messages, tools=dialog.tools, generation_prompt=generation_prompt).ids
    start = served.tokenizer.start_ids
    return served.tokenizer.decode(ids[len(start) :] if ids[: len(start)] == start else ids)


@contextmanager
def _noting(warnings: list[str]) -> Iterator[None]:
    """Add what Python's warnings say meanwhile to those of a request."""
    with python_warnings.catch_warnings(record=True) as noted:
        python_warnings.simplefilter("always")
        yield
    warnings += [f"messages={note.message}" for note in noted]


def _form(call: ChatCall, tools: Sequence[OfferedTool], call_format: str, tokenizer: Tokenizer) -> AnswerForm:
    if call.grammar is None:
        return answer_form(
            tokenizer, call_format, tools, call.tool_choice, call.parallel_calls, call.schema, call.warnings
        )
    if tools:
        raise BadRequest(f"a {call.grammar.kind} excludes tools: leave one out", "tools")
    return AnswerForm(call.grammar)


def prepare_text(served: ServedModel, call: TextCall) -> ReadyPrompt:
    """Return the prompt for a continuation of a text, or of token ids."""
    ids = text_ids(served, call.prompt, "prompt")
    constraint = call.grammar or (None if call.schema is None else Constraint.json_schema(call.schema))
    sampled = served.sampling_of(call.sampling)
    form = AnswerForm(constraint)
    return ReadyPrompt(
        ids, sampled, call.n, form, echo=call.echo, adapter=served.adapter, cache_salt=call.cache_salt
    )


def text_ids(served: ServedModel, prompt: str | list[int], param: str) -> list[int]:
    """Return the token ids of a text of its own, or the given ones as they are. Raises `BadRequest`."""
    tokenizer = served.tokenizer
    ids = tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt)
    if not ids:
        ids = list(tokenizer.prefix_ids)
    if not isinstance(prompt, str):
        check_ids(ids, tokenizer.vocab_size, param)
    check_length(ids, served.context)
    return ids


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise `BadRequest` for a token id outside the vocabulary."""
    for id_ in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= id_ < vocab_size:
            raise BadRequest(f"{param}: token {id_} is outside the vocabulary of {vocab_size:,}", param)


def check_length(ids: Sequence[int], context: int) -> None:
    """Raise `BadRequest` if a prompt leaves no room for an answer. Prompts are never shortened."""
    if len(ids) >= context:
        raise PromptTooLong(len(ids), context)
