"""Errors that the server answers with: one class per meaning, with the HTTP status and advice on retrying.

The OpenAI and Anthropic SDKs repeat a request after 408, 409, 429 and 5xx. They obey ``Retry-After`` and
``x-should-retry``, so an error that a second try cannot cure says ``should_retry=False``.
"""

from __future__ import annotations

from ..errors import HerdError


class ApiError(HerdError):
    """An answer other than success. Each API renders it as its own error body.

    Every class sets the HTTP status, OpenAI's words ``type`` and ``code``, and whether a second try can help
    (``again``; None lets the client decide). ``param`` names the field of the request that is at fault.
    ``retry_after`` is in seconds.
    """

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after: float | None = None
    again: bool | None = None

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        own = {"status": status, "code": code, "retry_after": retry_after}
        vars(self).update({name: value for name, value in own.items() if value is not None})

    @property
    def should_retry(self) -> bool | None:
        """Return the advice on a second try, which helps if there is a time to wait for. None: no advice."""
        return True if self.retry_after is not None else self.again


class Unauthorized(ApiError):
    """A request without a valid key."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ApiError):
    """A valid key that may not do this."""

    status, type, code = 403, "permission_error", "permission_denied"


class NotFound(ApiError):
    """A thing that does not exist, or that this key may not know about."""

    status, type, code = 404, "invalid_request_error", "not_found"


class BudgetExceeded(ApiError):
    """A request whose worst case exceeds the rest of a budget. Trying again does not help."""

    status, type, code, again = 429, "insufficient_quota", "insufficient_quota", False


class RateLimited(ApiError):
    """More requests or tokens per minute than allowed. Without ``retry_after``, waiting cannot help."""

    status, type, code, again = 429, "rate_limit_error", "rate_limit_exceeded", False


class TooManyConcurrent(ApiError):
    """More open requests than the key allows."""

    status, type, code, retry_after = 429, "rate_limit_error", "too_many_concurrent_requests", 1.0


class DuplicateRequest(ApiError):
    """A request id that is in progress, or that has been answered and billed."""

    status, type, code, again = 409, "invalid_request_error", "duplicate_request", False


class StoreError(ApiError):
    """Keys and ledger that cannot be read or written now. Requests with keys are refused until they can."""

    status, code, retry_after = 503, "store_unavailable", 2.0
