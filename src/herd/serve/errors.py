"""Errors that the server answers with: one class per meaning, with the HTTP status and advice on retrying.

The OpenAI and Anthropic SDKs repeat a request after 408, 409, 429 and 5xx. They obey ``Retry-After`` and
``x-should-retry``, so an error that a second try cannot cure says ``should_retry=False``.
"""

from __future__ import annotations

from ..errors import HerdError


class ApiError(HerdError):
    """An answer other than success. Each API renders it as its own error body.

    ``type`` and ``code`` are OpenAI's words. ``param`` names the field of the request that is at fault.
    ``retry_after`` is in seconds. ``should_retry`` None lets the client decide.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.type, self.code, self.param = message, status, type, code, param
        self.retry_after, self.should_retry = retry_after, should_retry


class Unauthorized(ApiError):
    """A request without a valid key."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=401, type="authentication_error", code="invalid_api_key")


class Forbidden(ApiError):
    """A valid key that may not do this."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=403, type="permission_error", code="permission_denied")


class NotFound(ApiError):
    """A thing that does not exist, or that this key may not know about."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=404, type="invalid_request_error", code="not_found")


class BudgetExceeded(ApiError):
    """A request whose worst case exceeds the rest of a budget. Trying again does not help."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message, status=429, type="insufficient_quota", code="insufficient_quota", should_retry=False
        )


class RateLimited(ApiError):
    """More requests or tokens per minute than allowed. ``retry_after`` is None if waiting cannot help."""

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(
            message,
            status=429,
            type="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after=retry_after,
            should_retry=retry_after is not None,
        )


class TooManyConcurrent(ApiError):
    """More open requests than the key allows."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            status=429,
            type="rate_limit_error",
            code="too_many_concurrent_requests",
            retry_after=1.0,
            should_retry=True,
        )


class DuplicateRequest(ApiError):
    """A request id that is in progress, or that has been answered and billed."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(
            message,
            status=409,
            type="invalid_request_error",
            code="duplicate_request",
            retry_after=retry_after,
            should_retry=retry_after is not None,
        )


class StoreError(ApiError):
    """Keys and ledger that cannot be read or written now. Requests with keys are refused until they can."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            status=503,
            type="server_error",
            code="store_unavailable",
            retry_after=2.0,
            should_retry=True,
        )
