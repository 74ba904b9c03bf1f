"""Where answers come from: a model that can be asked (`Servable`), and one answer of it (`AnswerSource`).

The APIs, `respond.py` and `answer.py` know only these classes. `chat.py` and `engine_source.py` are the model
of this process's engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .events import AnswerUsage, Piece

if TYPE_CHECKING:
    from ..engine.loop import EngineStats
    from ..engine.request import Sampling
    from .auth import Principal
    from .calls import ChatCall, EmbeddingCall, TextCall


class CheckedPrompt(Protocol):
    """A prompt that has been checked, to be answered ``n`` times."""

    @property
    def n(self) -> int:
        """The number of answers."""

    @property
    def n_tokens(self) -> int:
        """The number of tokens, or an upper bound of it if only another program can count them."""

    @property
    def sampling(self) -> Sampling:
        """The settings of the answers."""

    def max_completion_tokens(self, context: int) -> int:
        """Return the most tokens that all answers together can have."""


PromptT = TypeVar("PromptT", bound=CheckedPrompt)


class AnswerSource(Protocol):
    """A model's answer to one or more prompts, while it is generated, for one reader on the event loop."""

    warnings: Sequence[str] = ()
    """What the client is told at the end. Complete when all pieces were read."""

    def pieces(self) -> AsyncIterator[Piece]:
        """Yield the answer as it is generated. Raises an error if it ends early."""

    @property
    def usage(self) -> AnswerUsage:
        """Tokens and times up to now."""

    @property
    def prompt_tokens(self) -> int:
        """The number of the prompts' tokens to bill, as far as it is known now, or 0 for the reserved number.

        Cheap, like `cached_tokens`: it is read before each write.
        """
        return 0

    @property
    def cached_tokens(self) -> int:
        """The number of the prompts' tokens that came from the cache."""
        return 0

    def cancel(self) -> None:
        """End the answer early, from any thread. `pieces` then raises."""


class Servable(Protocol[PromptT]):
    """A model that clients can ask, wherever it runs.

    ``aliases`` are other names that clients may use. "*": any name. ``adapters`` are the adapters on the
    model, whose names clients use like those of models. ``context`` is in tokens, ``created`` in seconds
    since 1970. ``facts`` are shown to clients that ask about the model. ``fingerprint`` changes if the same
    request may get another answer. ``is_upstream``: it is on another server.
    """

    is_upstream: bool = False
    name: str
    context: int
    aliases: frozenset[str]
    adapters: frozenset[str]
    created: int
    facts: Mapping[str, Any]
    fingerprint: str

    def with_adapter(self, name: str) -> Servable[PromptT]:
        """Return the model with one of its ``adapters`` switched on."""
        raise KeyError(name)

    @property
    def vocab_size(self) -> int | None:
        """The number of token ids, if it is known."""

    @property
    def has_chat(self) -> bool:
        """Whether the model answers dialogs. Otherwise it only continues text."""

    async def prepare_chat(self, call: ChatCall) -> PromptT:
        """Return the prompt of a dialog. Raises `ApiError` for what cannot be served."""

    async def prepare_text(self, call: TextCall) -> PromptT:
        """Return the prompt for a continuation of a text. Raises `ApiError` for what cannot be served."""

    async def prepare_embeddings(self, call: EmbeddingCall) -> Sequence[PromptT]:
        """Return the prompts for embeddings, with as many answers. Raises `ApiError` likewise."""

    async def encode_chat(self, call: ChatCall) -> list[int]:
        """Return the token ids of a dialog's prompt, also of one that exceeds the context."""

    async def encode(self, text: str, *, bos: bool, special: bool) -> list[int]:
        """Return the token ids of a text."""

    async def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Raises `ApiError` for an id outside the vocabulary."""

    async def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token."""

    async def measure(self, prompts: Sequence[PromptT], *, billed: bool, refused: bool = False) -> None:
        """Find the number of tokens of prompts that have only an upper bound of it, if it is needed.

        Called before prompts are reserved, and again if the upper bound was ``refused``.
        """
        return None

    async def start(self, prompts: Sequence[PromptT], principal: Principal) -> AnswerSource:
        """Begin to answer. Returns once the request has passed all checks, or raises `ApiError`."""

    def stats(self) -> EngineStats | None:
        """Return the state of the engine, if it runs in this process. Safe from any thread."""

    def close(self, drain_seconds: float = 0.0) -> None:
        """Let open answers finish for so long, and end the rest. Called from a thread of its own."""
