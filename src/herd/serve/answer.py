"""Answers in progress: whatever happens to one, it is settled once and what it uses is freed.

A `LiveAnswer` is one request of a client, with one or more choices. It ends by itself, by an error, with a client
that goes away, with a server that stops, or with a key that is revoked.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import Unauthorized
from .events import AnswerEvent, AnswerUsage
from .ledger import Reservation, Status
from .problems import api_error
from .source import AnswerSource, CheckedPrompt, Servable

if TYPE_CHECKING:
    from .auth import Principal

ENDED = "this key was revoked, or has expired, while the answer was generated"


class LiveAnswer:
    """The choices of one request while they are generated. `events` yields them as they come.

    ``warnings`` are told to the client at the end. `close` must be called in every case. It calls ``finished`` with
    the end's status and the usage.
    """

    def __init__(
        self,
        served: Servable[Any],
        prompts: Sequence[CheckedPrompt],
        source: AnswerSource,
        reservation: Reservation,
        warnings: list[str],
        has_ended: Callable[[], bool] = lambda: False,
        finished: Callable[[Status, AnswerUsage], None] = lambda status, usage: None,
    ) -> None:
        self.id = secrets.token_hex(12)
        self.served, self.prompts, self.warnings = served, prompts, warnings
        self._source, self._reservation = source, reservation
        self._has_ended, self._finished = has_ended, finished
        self._status: Status = "cancelled"
        self._closed = False
        self._delivered = 0

    @property
    def usage(self) -> AnswerUsage:
        """Tokens and times up to now."""
        return self._source.usage

    async def events(self, *, delivers: bool) -> AsyncIterator[AnswerEvent]:
        """Yield events as they are generated. Raises `ApiError`.

        ``delivers``: the client gets each event at once, so that it is billed from then on. Tokens that are held
        back, e.g. of an incomplete tool call, are billed with the event that has them.
        """
        delivered: dict[int, int] = {}
        try:
            async for piece in self._source.pieces():
                if self._has_ended():
                    raise Unauthorized(ENDED)
                if delivers and piece.events:
                    delivered[piece.index] = piece.tokens
                    self._advance(sum(delivered.values()))
                for event in piece.events:
                    yield event
            self.warnings += self._source.warnings
            self._status = "completed"
        except Exception as error:
            self._status = "failed"
            raise api_error(Unauthorized(ENDED) if self._has_ended() else error) from None

    def deliver(self) -> None:
        """Bill the whole answer, which is about to be sent at once."""
        self._advance(self.usage.completion_tokens)

    def _advance(self, n_tokens: int) -> None:
        self._delivered = n_tokens
        self._reservation.advance(n_tokens, self._source.cached_tokens, self._source.prompt_tokens)

    def cancel(self) -> None:
        """End the answer early, from any thread. `events` then raises."""
        self._source.cancel()

    @property
    def remarks(self) -> dict[str, Any]:
        """What Herd tells clients beside the answer: warnings, and its cost if the model has a price."""
        source = self._source
        cost = self._reservation.cost(self._delivered, source.cached_tokens, source.prompt_tokens)
        remarks = {"warnings": self.warnings, "cost": cost}
        return {name: value for name, value in remarks.items() if value}

    def close(self) -> None:
        """Cancel what is still generated, and settle the bill. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self.cancel()
        usage = self.usage
        # An answer of which nothing was delivered bills nothing, but what was computed counts towards the key's limits.
        tokens = self._delivered or usage.completion_tokens
        self._reservation.settle(tokens, self._source.cached_tokens, self._status, self._source.prompt_tokens)
        self._finished(self._status, usage)


async def start_answer(
    served: Servable[Any],
    prompts: Sequence[CheckedPrompt],
    principal: Principal,
    reservation: Reservation,
    warnings: list[str],
    has_ended: Callable[[], bool] = lambda: False,
    finished: Callable[[Status, AnswerUsage], None] = lambda status, usage: None,
) -> LiveAnswer:
    """Begin to answer prompts. Raises `ApiError`, after settling the reservation with nothing, if that fails."""
    try:
        source = await served.start(prompts, principal)
    except BaseException as error:
        reservation.settle(0, 0, "failed")
        if isinstance(error, Exception):
            raise api_error(error) from None
        raise
    return LiveAnswer(served, prompts, source, reservation, warnings, has_ended, finished)
