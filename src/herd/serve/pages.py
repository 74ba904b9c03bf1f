"""Serve the chat page: static files from the folder ``page``, under an address with a hash of them."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from .auth import public
from .errors import NotFound

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""What the page may do: run and fetch from this server only. It can never turn text into HTML or script."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-dns-prefetch-control": "off",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "vary": "accept-encoding",
}
FOREVER = "public, max-age=31536000, immutable"

ON_DEMAND = ("exchange.js", "usage.js", "vendor/languages/diff.js")
"""Scripts that the page loads when they are needed: export and import, usage and keys, colours of changes."""

router = APIRouter()


@dataclass(frozen=True)
class PageFile:
    """A file of the page as it is sent, and the same compressed."""

    content: bytes
    compressed: bytes
    media_type: str


@router.get("/", dependencies=[Depends(public)], include_in_schema=False)
async def index(request: Request) -> Response:
    """Return the page. Browsers ask for it every time, and keep the rest."""
    if not request.app.state.settings.has_page:
        raise NotFound("this server has no chat page")
    _, files = page_files()
    return _response(request, files["index.html"], "no-cache")


@router.get("/page/{digest}/{name:path}", dependencies=[Depends(public)], include_in_schema=False)
async def page_file(request: Request, digest: str, name: str) -> Response:
    """Return a file of the page."""
    present, files = page_files()
    if digest != present or name not in files or name == "index.html":
        raise NotFound("there is nothing at this address")
    return _response(request, files[name], FOREVER)


@cache
def page_files() -> tuple[str, dict[str, PageFile]]:
    """Return the digest of all files of the page, and the files by path. They are read once."""
    paths = sorted(path for path in FOLDER.rglob("*") if path.suffix in MEDIA_TYPES)
    contents = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in paths}
    whole = b"".join(name.encode() + each for name, each in contents.items())
    digest = hashlib.sha256(whole).hexdigest()[:16]
    later = ("main.js", "theme.js", *ON_DEMAND)
    scripts = [name for name in contents if name.endswith(".js") and name not in later]
    preload = "\n".join(f'<link rel="modulepreload" href="{{page}}/{name}">' for name in scripts)
    for name in contents:
        if name.endswith(".js") and not name.startswith("vendor/"):
            contents[name] = lean_script(contents[name].decode()).encode()
    html = contents["index.html"].decode().replace("{preload}", preload).replace("{page}", f"/page/{digest}")
    contents["index.html"] = html.encode()
    files = {
        name: PageFile(each, gzip.compress(each, 9, mtime=0), MEDIA_TYPES[Path(name).suffix])
        for name, each in contents.items()
    }
    return digest, files


def lean_script(text: str) -> str:
    """Return a script without its indentation and comment lines. Every line keeps its number."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join("" if line.startswith("//") else line for line in lines)


def _response(request: Request, file: PageFile, caching: str) -> Response:
    headers, content = HEADERS | {"cache-control": caching}, file.content
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers, content = headers | {"content-encoding": "gzip"}, file.compressed
    return Response(content, headers=headers, media_type=file.media_type)
