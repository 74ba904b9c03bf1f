"""The files of the chat page: what is sent, with which headers, how much of it, and whose code it is."""

import gzip
import hashlib
import re

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from herd.serve import pages
from herd.serve.auth import scope_of
from herd.serve.settings import ServeSettings

VENDOR = pages.FOLDER / "vendor"
ALLOWED_LICENCES = {"MIT", "BSD-3-Clause", "Apache-2.0 AND MIT"}
MAX_SCRIPT = 60_000
"""Bytes of compressed script with which the page starts."""
MAX_LATER = 5_000
"""Bytes of compressed script that it loads when they are needed."""


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(pages.router)
    app.state.settings = ServeSettings()
    return TestClient(app, raise_server_exceptions=False)


def test_the_page_starts_with_at_most_60_kb_of_compressed_script():
    _, files = pages.page_files()
    sizes = {name: len(file.compressed) for name, file in files.items() if name.endswith(".js")}
    assert len(sizes) > 15
    later = sum(sizes.pop(name) for name in pages.ON_DEMAND)
    assert sum(sizes.values()) <= MAX_SCRIPT, sizes
    assert later <= MAX_LATER


def test_every_vendored_file_is_the_one_that_is_listed_with_its_licence():
    rows = re.findall(
        r"^\| `(\S+)` \| (\S+) \| ([\d.]+) \| `\S+` \| ([^|]+) \| ([^|]+) \| `([0-9a-f]{64})` \|$",
        (VENDOR / "VENDORED.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {row[0] for row in rows} == {path.relative_to(VENDOR).as_posix() for path in VENDOR.rglob("*.js")}
    for file, _, _, licence, texts, digest in rows:
        assert hashlib.sha256((VENDOR / file).read_bytes()).hexdigest() == digest, file
        assert licence in ALLOWED_LICENCES
        for text in texts.split(", "):
            assert len((VENDOR / "licences" / f"{text}.txt").read_text(encoding="utf-8")) > 1000


def test_the_page_names_only_files_that_exist_and_nothing_outside(client):
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["cache-control"] == "no-cache"
    addresses = re.findall(r'(?:href|src)="([^"#]+)"', page.text)
    assert len(addresses) > 15
    for address in addresses:
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert "immutable" in answer.headers["cache-control"]
    assert "{" not in "".join(addresses)
    assert re.findall(r"https?://", page.text) == []
    assert re.findall(r"<script(?! src| type=\"module\" src)|<style|\son\w+=|\sstyle=", page.text) == []


def test_everything_is_sent_with_a_policy_that_lets_no_foreign_script_run(client):
    for address in ["/", *re.findall(r'(?:href|src)="([^"#]+)"', client.get("/").text)]:
        headers = client.get(address).headers
        policy = dict(
            part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["trusted-types"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert not [value for value in policy.values() if "unsafe" in value or "*" in value or ":" in value]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "name",
    ["index.html", "nothing.js", "vendor/VENDORED.md", "../pages.py", "%2e%2e/pages.py", "..%2fpages.py", ""],
)
def test_only_the_files_of_the_page_are_served(client, name):
    digest, _ = pages.page_files()
    assert client.get(f"/page/{digest}/{name}").status_code >= 400


def test_another_version_of_the_page_is_not_mixed_with_this_one(client):
    digest, _ = pages.page_files()
    assert client.get(f"/page/{digest}/main.js").status_code == 200
    assert client.get(f"/page/{'0' * len(digest)}/main.js").status_code >= 400


def test_a_client_without_gzip_gets_the_same_content(client):
    plain = client.get("/", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == client.get("/").content
    _, files = pages.page_files()
    assert all(gzip.decompress(file.compressed) == file.content for file in files.values())


def test_the_page_needs_no_key():
    assert {scope_of(route) for route in pages.router.routes} == {"public"}


def test_a_lean_script_keeps_its_lines_and_its_code():
    text = 'const a = 1; // why\n  // only a comment\n    const b = "// no comment";\n\n'
    assert pages.lean_script(text) == 'const a = 1; // why\n\nconst b = "// no comment";\n'
