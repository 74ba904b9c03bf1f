"""Read the body of a request: bounded in size and time, decompressed, valid UTF-8 and valid JSON.

Nothing here trusts the client: the length is counted as bytes arrive and again as they are decompressed, so
that neither a long body nor a short one that expands (a "zip bomb") takes more memory than the limit.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard
from fastapi import Request
from starlette.requests import ClientDisconnect

from ..text.messages import json_problem
from .problems import BadRequest
from .settings import ServeSettings

TIMEOUT, TOO_LARGE, UNSUPPORTED, CLIENT_GONE = 408, 413, 415, 499
PIECE = 1 << 16


async def read_json(request: Request, settings: ServeSettings) -> dict[str, Any]:
    """Return the JSON object in the body of a request. Raises `BadRequest` for anything else."""
    expand = _decompressor(request.headers.get("content-encoding", ""))
    limit = settings.body_bytes
    if int(request.headers.get("content-length") or 0) > limit:
        raise _too_large(limit)
    body = bytearray()
    n_received = 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                n_received += len(chunk)
                for piece in expand(chunk):
                    body += piece
                    if max(len(body), n_received) > limit:
                        raise _too_large(limit)
    except TimeoutError:
        raise BadRequest(
            status=TIMEOUT, message=f"the body did not arrive within {settings.body_seconds:g} s"
        ) from None
    except ClientDisconnect:
        raise BadRequest(status=CLIENT_GONE, message="the client closed the connection") from None
    except (zlib.error, zstandard.ZstdError) as error:
        raise BadRequest(f"the body is not valid compressed data: {error}") from None
    return parse_object(bytes(body))


def parse_object(body: bytes) -> dict[str, Any]:
    """Return a JSON object. Raises `BadRequest` unless it is valid, in UTF-8, and all its text is Unicode."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte {error.start:,}") from None
    except UnicodeEncodeError:
        raise BadRequest("the body has half of a surrogate pair, which is not Unicode text") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {json_problem(error)[:200]}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _too_large(limit: int) -> BadRequest:
    return BadRequest(
        status=TOO_LARGE, message=f"the body has more than {limit:,} bytes, the limit of this server"
    )


def _decompressor(encoding: str) -> Callable[[bytes], Iterator[bytes]]:
    """Return a function that expands the next bytes of a body piece by piece, so that it can be stopped."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return lambda data: iter((data,))
    if name in ("gzip", "x-gzip", "deflate"):
        inflate = zlib.decompressobj(zlib.MAX_WBITS | (32 if "gzip" in name else 0))

        def expand(data: bytes) -> Iterator[bytes]:
            while data:
                yield inflate.decompress(data, PIECE)
                data = inflate.unconsumed_tail

        return expand
    if name == "zstd":
        decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(write_size=PIECE)
        return lambda data: _small_steps(decoder.decompress, data)
    raise BadRequest(
        status=UNSUPPORTED,
        message=f"content-encoding {encoding!r} is not supported: send gzip, deflate, zstd or plain JSON",
    )


def _small_steps(decompress: Callable[[bytes], bytes], data: bytes) -> Iterator[bytes]:
    """Feed a few bytes at a time: zstd expands each of them at most to one block of 128 KiB per few bytes."""
    for start in range(0, len(data), 256):
        yield decompress(data[start : start + 256])
