"""A request that has been read: who sends it, what it asks for, and the model that answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

from fastapi import Request
from starlette.responses import JSONResponse, Response

from .auth import Principal
from .models import use_model
from .settings import ServeSettings
from .source import Servable
from .tools import ToolOffer
from .wire import RequestT, read_request

MAX_HEADER = 4000
"""Characters of the header with warnings. Proxies refuse headers that are much longer."""


@dataclass(frozen=True)
class Exchange(Generic[RequestT]):
    """A request of ``principal``: what is ``asked``, and the model that is ``served`` until it is answered.

    ``warnings`` are told to the client with the answer, and more may be added.
    """

    request: Request
    principal: Principal
    asked: RequestT
    served: Servable[Any]
    warnings: list[str]

    @property
    def settings(self) -> ServeSettings:
        """The settings of the server."""
        settings: ServeSettings = self.request.app.state.settings
        return settings

    @property
    def offer(self) -> ToolOffer:
        """The tools on this server that the key may use, and the limit on tools."""
        return ToolOffer(self.settings.max_tools, self.request.app.state.tools.granted_to(self.principal))

    @property
    def headers(self) -> dict[str, str]:
        """The header with the warnings so far, in ASCII and without control characters."""
        if not self.warnings:
            return {}
        text = "; ".join(self.warnings).encode("ascii", "replace").decode()
        return {"x-herd-warnings": "".join(c if c.isprintable() else " " for c in text)[:MAX_HEADER]}

    def json(self, body: dict[str, Any]) -> Response:
        """Return a response with a body of JSON."""
        return JSONResponse(body, headers=self.headers)


async def open_exchange(
    request: Request, principal: Principal, api: str, kind: type[RequestT]
) -> Exchange[RequestT]:
    """Read the body of a request and load the model that it names. Raises `ApiError`.

    ``api`` is the name of the API in `fields.yaml`, and ``kind`` has its honoured fields.
    """
    asked, warnings = await read_request(request, api, kind)
    served = await use_model(request, principal, asked.model_name)
    return Exchange(request, principal, asked, served, warnings)
