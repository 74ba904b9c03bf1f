"""The tools of `herd serve`: those named on the command line, and those of the MCP servers in a file."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..serve.server_tools import ServerTools


@dataclass(frozen=True)
class ChosenTools:
    """The tools that the operator has chosen: builtin ones, and entries of MCP servers by name."""

    builtin: tuple[str, ...] = ()
    servers: dict[str, Any] = field(default_factory=dict)

    def open(self) -> ServerTools:
        """Start the MCP servers. Raises ConfigError if the tools cannot be offered together."""
        from ..serve.server_tools import ServerTools
        from ..tools.mcp_servers import McpServers

        if not self.servers:
            return ServerTools(self.builtin)
        print(f"starting MCP servers: {', '.join(self.servers)}", file=sys.stderr)
        servers = McpServers(self.servers)
        try:
            return ServerTools(self.builtin, servers)
        except ConfigError:
            servers.close()
            raise


def choose_tools(names: str, server_file: Path | None) -> ChosenTools:
    """Return the tools of a list of names and of a file, before anything is started. Raises ConfigError."""
    from ..serve.tools import BUILTIN
    from ..tools.mcp_servers import read_server_file

    builtin = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in builtin:
        if name not in BUILTIN:
            raise ConfigError(f"--tools {name}: choose among {', '.join(BUILTIN)}")
    servers = read_server_file(server_file) if server_file else {}
    if servers and find_spec("mcp") is None:
        raise ConfigError("--mcp-servers needs the package mcp: pip install mcp")
    return ChosenTools(builtin, dict(servers))
