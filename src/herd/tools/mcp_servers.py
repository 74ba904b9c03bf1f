"""MCP servers that the operator has named in a file, and their tools.

All connections belong to one thread, so whatever a server sends, nobody else waits for it to be read. The
list of a server's tools is read and hashed once, when Herd starts. If it changes later, a server could
smuggle instructions into descriptions that the operator has never seen: the server is then disabled. A server
that crashes is started again at its next call. One that does not answer in time is ended with everything that
it started.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import ConfigError, ToolError
from .stdio_server import StdioServer

if TYPE_CHECKING:
    from mcp import Client

log = logging.getLogger("herd.tools")
T = TypeVar("T")

START_SECONDS = 30.0
CALL_SECONDS = 60.0
RECHECK_SECONDS = 60.0
"""How long a list of tools is taken to be unchanged, unless the server says that it has changed."""
RESTART_SECONDS = 1.0
"""Shortest time between two starts of a server that fails."""
MAX_TOOLS, MAX_PAGES = 256, 32


class ServerEntry(BaseModel):
    """A server in the file: a program (``command``, ``args``, ``env``) or an address with ``headers``.

    ``timeout_ms`` is the longest that a call may take, in milliseconds (default: `CALL_SECONDS`).
    """

    model_config = ConfigDict(extra="ignore", strict=True)
    command: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    url: str | None = None
    headers: dict[str, str] = {}
    timeout_ms: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> ServerEntry:
        if (self.command is None) == (self.url is None):
            raise ValueError("give either a command or a url")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("a url begins with http:// or https://")
        return self


def read_server_file(path: Path) -> dict[str, ServerEntry]:
    """Return the servers of a file ``{"mcpServers": {NAME: {…}}}`` by name, as desktop programs have them.

    Raises ConfigError if it cannot be read.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["mcpServers"]
        return {name: ServerEntry.model_validate(entry) for name, entry in listed.items()}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f'{path}: must be JSON like {{"mcpServers": {{"files": {{"command": …}}}}}}'
        ) from None


@dataclass(frozen=True)
class RemoteTool:
    """A tool of an MCP server. ``parameters`` is the JSON schema of its arguments."""

    server: str
    name: str
    description: str
    parameters: Mapping[str, Any]


def list_digest(tools: Sequence[RemoteTool]) -> str:
    """Return the SHA-256 of the names, descriptions and schemas of tools, in hexadecimal."""
    rows = sorted(
        (tool.name, tool.description, json.dumps(tool.parameters, sort_keys=True)) for tool in tools
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class McpServers:
    """Connections to servers. `tools` are those of all servers that started. Close it, or use it in ``with``.

    A server that does not start is left out, and the log says so.
    """

    def __init__(self, entries: Mapping[str, ServerEntry], call_seconds: float = CALL_SECONDS) -> None:
        import mcp  # noqa: F401  # takes a second or more, which is not the servers' fault

        for logger in ("mcp", "client"):  # a server could fill the log with its mistakes
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="herd-mcp", daemon=True)
        self._thread.start()
        self._servers = {name: _Connection(name, entry, call_seconds) for name, entry in entries.items()}
        self.tools: list[RemoteTool] = self._submit(self._start()).result()

    def call(self, server: str, tool: str, arguments: Mapping[str, Any]) -> Future[tuple[str, bool]]:
        """Call a tool. The result is (text for the model, whether the tool worked). Safe from any thread."""
        return self._submit(self._servers[server].call(tool, arguments))

    def is_disabled(self, server: str) -> bool:
        """Return whether a server is disabled because its tools have changed."""
        return self._servers[server].is_disabled

    def close(self) -> None:
        """End all servers and everything that they started."""
        if self._thread.is_alive():
            self._submit(self._end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> McpServers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _start(self) -> list[RemoteTool]:
        lists = await asyncio.gather(*(server.start() for server in self._servers.values()))
        return [tool for tools in lists for tool in tools]

    async def _end(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers.values()))


class _Connection:
    """One server: the session that is open, and the digest of its list of tools."""

    def __init__(self, name: str, entry: ServerEntry, call_seconds: float) -> None:
        self._name, self._entry = name, entry
        self._call_seconds = entry.timeout_ms / 1000 if entry.timeout_ms else call_seconds
        self._program = StdioServer(entry.command, entry.args, entry.env) if entry.command else None
        self._client: Client | None = None
        self._task: asyncio.Task[None] | None = None
        self._leave = asyncio.Event()
        self._lock = asyncio.Lock()
        self._digest: str | None = None
        self._checked_at = self._started_at = float("-inf")
        self.is_disabled = False

    async def start(self) -> list[RemoteTool]:
        """Connect for the first time and return the tools, or none if that fails."""
        try:
            client = await self._connected()
            async with asyncio.timeout(START_SECONDS):
                tools = await self._list(client)
        except Exception as error:
            log.warning("MCP server %s is left out: %s", self._name, self._reason(error))
            await self.close()
            self.is_disabled = True
            return []
        self._digest, self._checked_at = list_digest(tools), time.monotonic()
        return tools

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """Call a tool and return (text, whether it worked)."""
        try:
            async with asyncio.timeout(self._call_seconds):
                client = await self._usable()
                if self._program is not None:
                    self._program.expect()
                result = await client.call_tool(tool, dict(arguments))
        except ToolError as error:
            return f"error: {error}", False
        except TimeoutError:
            if self._program is not None:
                self._program.kill()
            await self.close()
            return f"error: {self._name} did not answer within {self._call_seconds:g} s and was ended", False
        except Exception as error:
            if self._client is None or self._is_over():
                await self.close()
                return f"error: {self._name} ended: {self._reason(error)}", False
            return f"error: {self._reason(error)}", False
        return _text(result), not result.is_error

    async def close(self) -> None:
        """End the session, and the server if it is a program of ours."""
        task, self._task, self._client = self._task, None, None
        self._leave.set()
        if task is not None:
            with suppress(BaseException):
                await asyncio.wait_for(task, 10)

    async def _usable(self) -> Client:
        """Return a session whose list of tools is the one that was hashed at the start."""
        async with self._lock:
            if not self.is_disabled:
                client = await self._connected()
                if time.monotonic() - self._checked_at < RECHECK_SECONDS:
                    return client
                if list_digest(await self._list(client)) == self._digest:
                    self._checked_at = time.monotonic()
                    return client
                self.is_disabled = True
                log.error(
                    "MCP server %s is disabled: its list of tools has changed since the start", self._name
                )
                await self.close()
        raise ToolError(f"{self._name} is disabled on this server, because its list of tools has changed")

    async def _connected(self) -> Client:
        if self._client is not None and not self._is_over():
            return self._client
        await self.close()
        await asyncio.sleep(self._started_at + RESTART_SECONDS - time.monotonic())
        self._started_at, self._checked_at = time.monotonic(), float("-inf")
        self._leave = asyncio.Event()
        ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._task = asyncio.ensure_future(self._hold(ready, self._leave))
        try:
            async with asyncio.timeout(START_SECONDS):
                self._client = await asyncio.shield(ready)
        except BaseException:
            await self.close()
            raise
        return self._client

    async def _hold(self, ready: asyncio.Future[Client], leave: asyncio.Event) -> None:
        """Keep a session open until ``leave`` is set. The task that opens a session must close it."""
        from mcp import Client
        from mcp_types import Implementation

        from .. import __version__
        from .mcp_http import http_transport

        entry = self._entry
        transport = (
            self._program.connect() if self._program else http_transport(str(entry.url), entry.headers)
        )
        try:
            async with Client(
                transport,
                client_info=Implementation(name="herd", version=__version__),
                message_handler=self._on_message,
                read_timeout_seconds=self._call_seconds,
                cache=None,
            ) as client:
                ready.set_result(client)
                await leave.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(ToolError(self._reason(error)))

    async def _on_message(self, message: Any) -> None:
        from mcp_types import ToolListChangedNotification

        root = getattr(message, "root", message)
        if isinstance(root, ToolListChangedNotification):
            self._checked_at = float("-inf")

    async def _list(self, client: Client) -> list[RemoteTool]:
        """Return all tools of a server. Raises ToolError if there are too many."""
        tools: list[RemoteTool] = []
        cursor = None
        for _ in range(MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += [
                RemoteTool(self._name, tool.name, tool.description or "", tool.input_schema)
                for tool in page.tools
            ]
            cursor = page.next_cursor
            if cursor is None and len(tools) <= MAX_TOOLS:
                return tools
        raise ToolError(f"it lists more than {MAX_TOOLS} tools")

    def _is_over(self) -> bool:
        return self._task is None or self._task.done() or bool(self._program and self._program.is_over)

    def _reason(self, error: BaseException) -> str:
        """Return why something failed on one line."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        problem = self._program.problem if self._program and self._is_over() else ""
        text = problem or str(error) or type(error).__name__
        return " ".join(text.split())[:300]


def _text(result: Any) -> str:
    """Return the text of a result. What is not text is named only, because the model cannot read it."""
    parts = [part.text if part.type == "text" else f"[{part.type} left out]" for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(parts)
