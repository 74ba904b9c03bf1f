"""A hub served on loopback, which the real client of `huggingface_hub` talks to."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories of one revision each: ``files`` by "ORG/NAME" and path. What happened is in ``requests``.

    ``refuse`` is (status, error code) for every request. ``cut`` closes a download after that number of bytes, once.
    ``damaged`` are files whose bytes are not those that were announced.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.refuse: tuple[int, str] | None = None
        self.cut: int | None = None
        self.damaged: set[str] = set()

    def add(self, repository: str, folder) -> None:
        self.files[repository] = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    @property
    def downloads(self) -> list[tuple[str, str]]:
        """(file, range) of every request for a file's bytes."""
        return [
            (path.split("/", 5)[5], span)
            for method, path, span in self.requests
            if method == "GET" and "/resolve/" in path
        ]


@contextmanager
def serve(hub: Hub):
    """Serve ``hub`` and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            span = self.headers.get("Range", "")
            hub.requests.append((self.command, path, span))
            if hub.refuse:
                self.answer(hub.refuse[0], b"{}", {"X-Error-Code": hub.refuse[1], "Retry-After": "0"})
                return
            parts = [part for part in path.strip("/").split("/") if part not in ("models", "datasets")]
            files = hub.files.get("/".join(parts[1:3] if parts[0] == "api" else parts[:2]))
            if files is None:
                self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif parts[0] == "api" and "tree" in parts:
                rows = [self.row(name, data) for name, data in files.items()]
                self.answer(200, json.dumps(rows).encode())
            elif parts[0] == "api":
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, json.dumps({"id": "x", "sha": COMMIT, "siblings": siblings}).encode())
            elif parts[3] not in ("main", COMMIT, "refs%2Fconvert%2Fparquet"):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif (name := "/".join(parts[4:])) not in files:
                self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                self.send_file(name, files[name], span)

        def row(self, name: str, data: bytes) -> dict:
            row = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if name.endswith((".gguf", ".safetensors")):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
            return row

        def send_file(self, name: str, data: bytes, span: str) -> None:
            large = name.endswith((".gguf", ".safetensors"))
            etag = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if large:
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            if name in hub.damaged:
                data = data[:-1] + bytes([data[-1] ^ 1])
            first = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
            if span:
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            body = data[first:]
            cut = hub.cut
            if large and cut is not None and self.command == "GET":
                hub.cut = None
                self.start(206 if span else 200, len(body), headers)
                self.wfile.write(body[:cut])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.answer(206 if span else 200, body, headers)

        def start(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(length), **headers}.items():
                self.send_header(key, value)
            self.end_headers()

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.start(status, len(body), headers or {})
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
