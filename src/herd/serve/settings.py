"""Limits and choices of a server."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import ConfigError


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server. Sizes are in bytes and times in seconds.

    ``host`` is the address it listens on. ``allowed_hosts`` are names, besides IP addresses and localhost,
    that a Host header may have (this defeats DNS rebinding). "*" allows every name. ``allowed_origins`` are
    the sites, besides its own, whose pages may use it (`checked_origin`). ``strict`` refuses fields that the
    API does not have, instead of warning. ``has_page``: it serves the chat page.
    """

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    strict: bool = False
    has_page: bool = True
    ping_seconds: float = 10.0
    body_bytes: int = 16 << 20
    body_seconds: float = 60.0
    """Time for a client to send its body."""
    stall_seconds: float = 120.0
    """Time for a client to read what was sent, before its answer is cancelled."""
    max_choices: int = 16
    max_stop: int = 16
    max_tools: int = 512
    drain_seconds: float = 30.0
    tool_steps: int = 8
    """Most times that the model is asked for one answer, if tools run on the server."""
    tool_tokens: int = 200_000
    """Most tokens of such an answer, the prompts of all steps included."""


def checked_origin(text: str) -> str:
    """Return the origin of web pages as browsers send it, e.g. ``https://app.example.org`` or ``app://notes``.

    Raises ConfigError for anything else, also for ``*``: any page that somebody reads could use the server.
    """
    parts = urlsplit(text.strip().rstrip("/"))
    if not parts.scheme or not parts.netloc or "*" in text or "@" in text or parts[2:] != ("", "", ""):
        raise ConfigError(f"--allow-origin {text}: give the origin of a site, e.g. https://app.example.org")
    default = {"http": ":80", "https": ":443"}.get(parts.scheme, ":")
    return f"{parts.scheme}://{parts.netloc.lower().removesuffix(default)}"
