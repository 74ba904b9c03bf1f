"""A model of other servers, offered like one of this process, with the same APIs, keys, limits and bills."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..engine.request import Sampling
from .calls import ChatCall, EmbeddingCall, TextCall, checked_sampling
from .http_client import HttpError
from .models import ModelPool, ModelSlot
from .problems import BadRequest, Overloaded, PromptTooLong
from .source import AnswerSource, Servable
from .upstream_source import STOPPING, UpstreamPrompt, UpstreamSource
from .upstream_wire import (
    MAX_TOKENS,
    chat_body,
    check_passed,
    embedding_body,
    encoded,
    error_message,
    prompt_size,
    text_body,
    tokenize_body,
)
from .upstreams import Fleet

if TYPE_CHECKING:
    from .auth import Principal

DEFAULT_CONTEXT = 32_768
"""Context of a model whose upstream does not tell it, unless the operator does."""
EMBEDDED_AT_ONCE = 128
"""Texts of one request to an upstream, whose embeddings have 16 MiB at most together."""
EMBEDDING = Sampling(max_tokens=1)
WIRE_DEFAULTS = {"temperature": 1.0}
"""What OpenAI's API says is used if a client does not ask for anything else."""


class UpstreamModels:
    """The models of upstreams in a pool, kept in step with what the upstreams have.

    ``aliases`` are further names of the first model. A model of this process hides one of the same name.
    """

    def __init__(self, fleet: Fleet, aliases: frozenset[str] = frozenset()) -> None:
        self.fleet, self._aliases = fleet, aliases
        self._slots: dict[str, ModelSlot] = {}

    async def start(self, pool: ModelPool) -> None:
        """Put the models into the pool, and go on doing so until `stop`."""
        await self.fleet.start(lambda: self._update(pool))

    async def stop(self) -> None:
        """Stop asking the upstreams."""
        await self.fleet.stop()

    def _update(self, pool: ModelPool) -> None:
        cards = self.fleet.cards()
        for name in self._slots.keys() - cards.keys():
            pool.slots.remove(self._slots.pop(name))
        taken = {slot.name for slot in pool.slots}
        for name, card in cards.items():
            slot = self._slots.get(name)
            if slot is None and name not in taken:
                own = self._aliases if not pool.slots else frozenset()
                told = card.get("aliases")
                others = frozenset(str(each) for each in told) if isinstance(told, list) else frozenset()
                slot = ModelSlot.of(UpstreamModel(self.fleet, name, card, (own | others) - taken))
                pool.slots.append(slot)
                self._slots[name] = slot
            elif slot is not None and isinstance(slot.served, UpstreamModel):
                slot.served.describe(card)
                slot.context, slot.facts = slot.served.context, slot.served.facts


class UpstreamModel(Servable[UpstreamPrompt]):
    """A model that upstreams have.

    A request reserves the upper bound of `upstream_wire.prompt_size`, and is billed what the upstream says.
    If that is too much for a key or the context, prompts are counted by the upstream's ``/tokenize`` (vLLM,
    Herd).
    """

    is_upstream = True
    adapters: frozenset[str] = frozenset()
    fingerprint = "herd-upstream"

    def __init__(self, fleet: Fleet, name: str, card: Mapping[str, Any], aliases: frozenset[str]) -> None:
        self._fleet, self.name, self.aliases = fleet, name, aliases
        self._open: weakref.WeakSet[UpstreamSource] = weakref.WeakSet()
        self._closing = False
        self.describe(card)

    def describe(self, card: Mapping[str, Any]) -> None:
        """Take over what an upstream tells about the model."""
        meta = card.get("meta") if isinstance(card.get("meta"), Mapping) else {}
        known = (card.get("max_model_len"), card.get("context_length"), meta.get("n_ctx") if meta else None)
        told = next((each for each in known if isinstance(each, int) and each > 1), None)
        self.context = told or self._fleet.context or DEFAULT_CONTEXT
        self._tells_context = told is not None
        created = card.get("created")
        self.created = created if isinstance(created, int) else int(time.time())
        self.facts = dict(meta or {})

    @property
    def vocab_size(self) -> int | None:
        return None

    @property
    def has_chat(self) -> bool:
        return True

    async def prepare_chat(self, call: ChatCall) -> UpstreamPrompt:
        body = chat_body(call, self.name)
        return self._prompt("/v1/chat/completions", body, call, {tool.name: tool for tool in call.tools})

    async def prepare_text(self, call: TextCall) -> UpstreamPrompt:
        return self._prompt("/v1/completions", text_body(call, self.name), call, {})

    async def prepare_embeddings(self, call: EmbeddingCall) -> list[UpstreamPrompt]:
        prompts = []
        for start in range(0, len(call.inputs), EMBEDDED_AT_ONCE):
            inputs = call.inputs[start : start + EMBEDDED_AT_ONCE]
            body = embedding_body(inputs, call.dimensions, self.name)
            estimate, most = prompt_size(body)
            prompt = UpstreamPrompt(
                "/v1/embeddings", body, EMBEDDING, len(inputs), estimate, most, passed=call.passed,
                is_countable=False, embeds=True,
            )  # fmt: skip
            prompt.bound += prompt.passed_tokens
            prompts.append(prompt)
        return prompts

    async def encode_chat(self, call: ChatCall) -> list[int]:
        check_passed(call.passed)
        body = chat_body(call, self.name)
        if prompt_size(body)[1] == MAX_TOKENS:
            raise BadRequest("the tokens of pictures and sounds cannot be counted beforehand", "messages")
        return list((await self._ask("/tokenize", tokenize_body(body, call.passed)))["tokens"])

    async def encode(self, text: str, *, bos: bool, special: bool) -> list[int]:
        answer = await self._ask("/tokenize", {"model": self.name, "prompt": text, "add_special_tokens": bos})
        return list(answer["tokens"])

    async def decode(self, ids: Sequence[int]) -> str:
        answer = await self._ask("/detokenize", {"model": self.name, "tokens": list(ids)})
        return str(answer["prompt"])

    async def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        raise BadRequest("with_pieces is not supported for a model of another server", "with_pieces")

    async def measure(
        self, prompts: Sequence[UpstreamPrompt], *, billed: bool, refused: bool = False
    ) -> None:
        """Count the tokens of prompts, if an upstream can and must. Raises `PromptTooLong`.

        It must if the upper bound was refused or exceeds the context, or if a stream that breaks would leave
        the number unknown. Counting is a request of its own, which costs time. An answer that may be longer
        than the room is limited to it, because vLLM refuses to begin it.
        """
        upstream = self._fleet.choose(self.name)
        prompts = [prompt for prompt in prompts if prompt.is_countable]
        if not prompts or upstream is None or upstream.counts_tokens is False:
            return
        most = max(prompt.bound + (prompt.sampling.max_tokens or 0) for prompt in prompts)
        may_not_fit = self._tells_context and most > self.context
        if not (refused or may_not_fit or (billed and not upstream.tells_usage(self.name))):
            return

        async def count(prompt: UpstreamPrompt) -> int | None:
            body = encoded(tokenize_body(prompt.body, prompt.passed))
            try:
                status, answer = await self._fleet.ask(upstream, "/tokenize", body)
                counted = int(json.loads(answer)["count"]) if status == 200 else None
            except (HttpError, ValueError, KeyError, TypeError):
                return None  # what is wrong with the upstream is seen when it is to answer
            if status in (404, 405, 501):
                upstream.counts_tokens = False
            return counted

        for prompt, counted in zip(prompts, await asyncio.gather(*map(count, prompts)), strict=True):
            if counted is None:
                continue
            prompt.counted = min(counted, prompt.bound)
            if not self._tells_context:
                continue
            if (room := self.context - counted) <= 0:
                raise PromptTooLong(counted, self.context)
            if (prompt.sampling.max_tokens or 0) > room:
                prompt.body["max_tokens"] = room
                prompt.warnings.append(
                    f"max_tokens=the context has room for {room:,} tokens after this prompt"
                )

    async def start(self, prompts: Sequence[UpstreamPrompt], principal: Principal) -> AnswerSource:
        if self._closing:
            raise Overloaded(STOPPING)
        source = UpstreamSource(self._fleet, self.name, prompts, principal.cache_group)
        self._open.add(source)
        try:
            await source.accepted()
        except BaseException:
            source.cancel()
            raise
        return source

    def stats(self) -> None:
        return None

    def close(self, drain_seconds: float = 0.0) -> None:
        self._closing = True
        end = time.monotonic() + drain_seconds
        while (sources := [each for each in list(self._open) if each.is_open]) and time.monotonic() < end:
            time.sleep(0.05)
        for source in sources:
            source.cancel()

    def _prompt(
        self, path: str, body: dict[str, Any], call: ChatCall | TextCall, tools: Mapping[str, Any]
    ) -> UpstreamPrompt:
        check_passed(call.passed)
        sampling = checked_sampling(WIRE_DEFAULTS, call.sampling)
        if sampling.max_tokens is None and not self._tells_context:
            body["max_tokens"] = self.context
        estimate, most = prompt_size(body)
        warnings = call.warnings if isinstance(call, ChatCall) else []
        prompt = UpstreamPrompt(
            path, body, sampling, call.n, min(estimate, self.context), self.context, tools, call.cache_salt,
            warnings, passed=call.passed, is_countable=most < MAX_TOKENS,
        )  # fmt: skip
        prompt.bound = min(most + prompt.passed_tokens, self.context)
        return prompt

    async def _ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return an upstream's answer to a short request. Raises `ApiError`."""
        upstream = self._fleet.choose(self.name)
        if upstream is None:
            raise Overloaded(f"no upstream with the model {self.name} is up; try again later")
        try:
            status, answer = await self._fleet.ask(upstream, path, encoded(body))
            if status == 200:
                return dict(json.loads(answer))
        except (HttpError, ValueError, TypeError):
            raise Overloaded("the upstream did not answer; try again later") from None
        if status in (400, 422):
            raise BadRequest(error_message(answer)[0] or "the upstream refused the request")
        raise BadRequest(
            f"the upstream of {self.name} has no {path}, so its tokens cannot be counted here", status=501
        )
