"""The connection to an MCP server that is a program on this machine: one JSON message per line.

The program gets a minimal environment, so no secrets of ours. Whatever it does, nothing of it is left once
the connection is closed (`keeper.py`), and what it writes takes a bounded amount of memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ToolError

if TYPE_CHECKING:
    from mcp.client._transport import TransportStreams

KEEPER = Path(__file__).with_name("keeper.py")
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR")
"""Environment variables that a server gets besides those that its entry in the file names."""
LINE_BYTES = 4 << 20
"""Longest message of a server."""
FLOOD_BYTES, FLOOD_LINES = 32 << 20, 10_000
"""Most that a server may write for one call."""
ERROR_BYTES = 2000
GOODBYE_SECONDS = 0.5
"""Time for a server to end by itself once its input is closed."""


class StdioServer:
    """A program that speaks MCP on its standard streams. `connect` runs it."""

    def __init__(self, command: str, args: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        self._command = (command, *args)
        self._env = {name: os.environ[name] for name in INHERITED if name in os.environ} | dict(env or {})
        self._n_bytes = self._n_lines = 0
        self._errors = b""
        self._reason = ""
        self._process: asyncio.subprocess.Process | None = None
        self.is_over = False

    @property
    def problem(self) -> str:
        """Why the connection ended: what we noticed, or the last line of the program's errors."""
        lines = self._errors.decode("utf-8", "replace").strip().splitlines()
        return self._reason or (lines[-1] if lines else "")

    def expect(self) -> None:
        """Note that a call begins, for which the program may write `FLOOD_BYTES` and `FLOOD_LINES`."""
        self._n_bytes = self._n_lines = 0

    def kill(self) -> None:
        """End the program and everything that it started, without waiting for it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()  # the keeper kills the rest

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[TransportStreams]:
        """Start the program, yield streams of messages from and to it, and end it with its descendants."""
        import anyio

        self._reason, self._errors, self.is_over = "", b"", False
        self.expect()
        words = (sys.executable, "-I", "-S", str(KEEPER), str(os.getpid()), *self._command)
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
        self._process = process = await asyncio.create_subprocess_exec(
            *words, **pipes, env=self._env, limit=LINE_BYTES, start_new_session=True
        )
        received, incoming = anyio.create_memory_object_stream[Any](0)
        outgoing, sent = anyio.create_memory_object_stream[Any](0)
        tasks = [
            asyncio.ensure_future(work)
            for work in (self._read(process, received), self._write(process, sent), self._note(process))
        ]
        try:
            yield incoming, outgoing
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            await asyncio.shield(self._end(process))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for stream in (received, incoming, outgoing, sent):
                stream.close()

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        try:
            await asyncio.wait_for(process.wait(), GOODBYE_SECONDS)
        except TimeoutError:
            self.kill()
            await process.wait()
        # otherwise asyncio does it after its loop is closed
        process._transport.close()  # type: ignore[attr-defined]

    async def _read(self, process: asyncio.subprocess.Process, received: Any) -> None:
        """Pass on the program's messages. Closing ``received`` tells the session that the program ended."""
        from mcp.shared.message import SessionMessage
        from mcp_types import jsonrpc_message_adapter

        assert process.stdout is not None
        try:
            async with received:
                while line := await process.stdout.readline():
                    self._n_bytes += len(line)
                    self._n_lines += 1
                    if self._n_bytes > FLOOD_BYTES or self._n_lines > FLOOD_LINES:
                        raise ToolError(
                            f"it wrote more than {FLOOD_BYTES >> 20} MB or {FLOOD_LINES:,} messages"
                        )
                    if not line.strip():
                        continue
                    try:
                        message = SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
                    except ValueError as error:
                        await received.send(error)
                    else:
                        await received.send(message)
        except ValueError:
            self._reason = f"it wrote a line of more than {LINE_BYTES >> 20} MB"
        except ToolError as error:
            self._reason = str(error)
        except Exception:  # the session has closed its end
            return
        finally:
            self.is_over = True
        if self._reason:
            self.kill()

    async def _write(self, process: asyncio.subprocess.Process, sent: Any) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            async for session_message in sent:
                text = session_message.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(text.encode() + b"\n")
                await process.stdin.drain()

    async def _note(self, process: asyncio.subprocess.Process) -> None:
        """Keep the end of what the program writes to its error stream."""
        assert process.stderr is not None
        while data := await process.stderr.read(65536):
            self._errors = (self._errors + data)[-ERROR_BYTES:]
