"""The tools that this server runs: calculator, sandboxed code interpreter, and tools of MCP servers.

They are fixed when the server starts. A key may use those of the groups that it was granted. Whatever a tool
does, a call ends within its time, and returns text of a bounded length for the model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from fastapi.concurrency import run_in_threadpool

from ..errors import ConfigError
from ..text.messages import TOOL_NAME
from ..text.toolcall import ToolCall
from ..tools.loop import execute_call
from ..tools.registry import TOOLS
from ..tools.sandbox import KERNEL, Sandbox
from .tools import BUILTIN, MAX_SCHEMA_DEPTH, PYTHON, OfferedTool, called_name, schema_depth

if TYPE_CHECKING:
    from ..tools.mcp_servers import McpServers
    from .auth import Principal

MAX_NAME = 64
"""Characters of a tool's name. Clients and models expect no longer ones."""
RESULT_CHARACTERS = 16_000
MAX_PROGRAMS = 4
"""Most programs of the code interpreter that run at the same time."""


class ServerTools:
    """The tools of a server, by group. Safe for one event loop."""

    def __init__(self, builtin: Collection[str] = (), servers: McpServers | None = None) -> None:
        """Raises ConfigError for a name that is there twice or too long, or a missing sandbox."""
        self._servers = servers
        self._programs = asyncio.Semaphore(MAX_PROGRAMS)
        self.groups: dict[str, list[OfferedTool]] = {}
        for group in builtin:
            schema = TOOLS[BUILTIN[group]].schema["function"]
            description = schema["description"].replace("`", "")
            self._add(OfferedTool(schema["name"], description, schema["parameters"], group=group))
        if PYTHON in self.groups:
            _check_sandbox()
        for tool in servers.tools if servers else ():
            if tool.server in BUILTIN:
                raise ConfigError(
                    f"MCP server {tool.server}: this is the name of a builtin tool, choose another"
                )
            name, group = called_name(tool.server, tool.name), tool.server
            self._add(
                OfferedTool(name, tool.description, tool.parameters, name_inside=tool.name, group=group)
            )

    def _add(self, tool: OfferedTool) -> None:
        if not TOOL_NAME.fullmatch(tool.name) or len(tool.name) > MAX_NAME:
            raise ConfigError(
                f"tool {tool.name[:100]!r}: a name has letters, digits, '_', '-' and '.' only, at most "
                f"{MAX_NAME}: rename the server in the file"
            )
        if any(tool.name == other.name for tools in self.groups.values() for other in tools):
            raise ConfigError(
                f"tool {tool.name}: two servers have a tool of this name, rename one in the file"
            )
        if schema_depth(tool.parameters) > MAX_SCHEMA_DEPTH:
            raise ConfigError(
                f"tool {tool.name}: its schema is nested too deeply, remove the server from the file"
            )
        self.groups.setdefault(tool.group, []).append(tool)

    def granted_to(self, principal: Principal) -> dict[str, list[OfferedTool]]:
        """Return the tools that a key may use, by group, without servers whose tools have changed."""
        granted = [group for group in self.groups if principal.may_use_tools(group)]
        if self._servers is not None:
            granted = [each for each in granted if each in BUILTIN or not self._servers.is_disabled(each)]
        return {group: self.groups[group] for group in granted}

    async def call(self, tool: OfferedTool, arguments: str) -> tuple[str, bool]:
        """Run a tool. Return the text that the model reads, also after an error, and whether the tool worked.

        ``arguments`` are JSON.
        """
        if tool.group not in self.groups:
            return f"error: unknown tool {tool.name!r}", False
        parsed: dict[str, Any] = json.loads(arguments)
        if tool.group in BUILTIN:
            async with self._programs:
                text, ok = await run_in_threadpool(execute_call, ToolCall(tool.name, parsed, "json"))
        else:
            assert self._servers is not None
            text, ok = await asyncio.wrap_future(self._servers.call(tool.group, tool.name_inside, parsed))
        if (excess := len(text) - RESULT_CHARACTERS) > 0:
            text = f"{text[:RESULT_CHARACTERS]}\n[{excess:,} more characters were cut off]"
        return text, ok

    def close(self) -> None:
        """End the MCP servers and everything that they started."""
        if self._servers is not None:
            self._servers.close()


def _check_sandbox() -> None:
    """Raise ConfigError if this system cannot confine the programs of strangers."""
    with Sandbox() as sandbox:
        missing = KERNEL.difference(sandbox.protections)
    if missing:
        raise ConfigError(
            f"--tools {PYTHON}: this system has no {' and no '.join(sorted(missing))}, so a program could "
            "reach other files or the network; leave it out"
        )


def describe_tools(groups: Mapping[str, Collection[OfferedTool]]) -> list[dict[str, Any]]:
    """Return tools as the chat page shows them."""
    return [
        {"group": group, "name": tool.name, "description": tool.description, "parameters": tool.parameters}
        for group, tools in groups.items()
        for tool in tools
    ]
