"""Bodies and headers that are malformed, hostile or too large: the right status, and nothing is generated."""

import gzip
import json
import socket
import zlib

import pytest
import zstandard

from conftest import running
from herd.errors import ConfigError
from herd.serve.app import host_is_allowed
from herd.serve.settings import ServeSettings, checked_origin

INFINITE = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1e400}'}}
CHAT = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "six"}], "max_tokens": 1}


def post(http, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(CHAT, content=data, headers={"content-type": "application/json"} | headers)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b'"text"', "must be a JSON object, not str"),
        (b'{"messages": "\xff"}', "not UTF-8: byte 14"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deeply"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "an integer of more than 4,300 digits"),
    ],
)
def test_a_body_that_is_not_a_json_object(http, body, words):
    response = post(http, body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [INFINITE]}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e400}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 10**6}, None),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 1000}, "stop"),
        ({"stop": "a" * 10_000}, "stop"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"foo": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, None),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_named_before_anything_is_sent(http, changes, param, stream):
    body = json.dumps(GOOD | {"stream": stream} | changes).replace("Infinity", "1e400")
    response = post(http, body.encode())
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd", "identity", ""])
def test_compressed_bodies(http, encoding):
    compress = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstandard.compress}
    body = compress.get(encoding, bytes)(json.dumps(GOOD).encode())
    assert post(http, body, **{"content-encoding": encoding}).status_code == 200


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip, zstd"])
def test_an_unknown_encoding_is_415(http, encoding):
    assert post(http, GOOD, **{"content-encoding": encoding}).status_code == 415


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_body_that_is_not_compressed_as_it_says(http, encoding):
    assert post(http, GOOD, **{"content-encoding": encoding}).status_code == 400


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, zstandard.compress])
def test_a_body_that_expands_without_end_is_413(served, compress):
    names = {gzip.compress: "gzip", zlib.compress: "deflate", zstandard.compress: "zstd"}
    bomb = compress(b" " * (200 << 20))
    assert len(bomb) < 1 << 20
    import httpx

    with running(served, ServeSettings(body_bytes=1 << 20)) as url:
        headers = {"content-encoding": names[compress]}
        assert httpx.post(url + CHAT, content=bomb, headers=headers).status_code == 413


def test_a_body_that_is_too_large_is_413_even_if_its_length_is_not_declared(served):
    import httpx

    def pieces():
        yield from [b" " * (1 << 16)] * 40

    with running(served, ServeSettings(body_bytes=1 << 20)) as url:
        assert httpx.post(url + CHAT, content=b" " * (2 << 20)).status_code == 413
        assert httpx.post(url + CHAT, content=pieces()).status_code == 413


def raw(url, request, seconds=10.0):
    """Send bytes and return all that the server answers."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), seconds) as connection:
        connection.sendall(request)
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    return received


def test_a_body_that_does_not_arrive_is_408(served):
    with running(served, ServeSettings(body_seconds=0.2)) as url:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        answer = raw(url, head + b"Connection: close\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "request_line", [b"GET /nothing", b"GET /v1/nothing", b"GET //health", b"GET /health/"]
)
def test_unknown_addresses_are_404(url, request_line):
    answer = raw(url, request_line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404")


def test_the_wrong_method_is_405(http):
    response = http.get(CHAT)
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example"])
def test_a_host_name_that_is_not_the_servers_is_421(url, host):
    answer = raw(url, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 421")


def test_which_hosts_are_allowed():
    settings = ServeSettings(allowed_hosts=("api.example",))
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "api.example:443"):
        assert host_is_allowed(host, settings), host
    for host in ("example", "api.example.evil", "1.2.3", "[evil]:1", "", "api.example@evil"):
        assert not host_is_allowed(host, settings), host
    assert host_is_allowed("any.example", ServeSettings(allowed_hosts=("*",)))


def test_requests_of_other_sites_are_refused_unless_the_operator_allows_them(http, url):
    response = post(http, GOOD, origin="https://evil.example")
    assert response.status_code == 403
    assert "--allow-origin https://evil.example" in response.json()["error"]["message"]
    assert not [name for name in response.headers if name.startswith("access-control")]
    own = post(http, GOOD, origin=url)
    assert own.status_code == 200
    assert not [name for name in own.headers if name.startswith("access-control")]
    assert http.options(CHAT, headers={"origin": "https://evil.example"}).status_code == 403


def test_pages_of_an_allowed_site_may_use_the_server_and_others_may_not(served, store):
    import httpx

    site = "https://app.example"
    settings = ServeSettings(drain_seconds=1, allowed_origins=(site,))
    with running(served, settings, store) as url, httpx.Client(base_url=url) as http:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        before = http.options(CHAT, headers={"origin": site} | asks)
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, site)
        assert before.headers["access-control-allow-headers"].lower().endswith("authorization")
        answer = post(http, GOOD, origin=site)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (
            401,
            site,
        )  # it needs a key
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        for name in ("https://app.example.evil", "http://app.example", "null", "https://app.example:444"):
            for response in (
                post(http, GOOD, origin=name),
                http.options(CHAT, headers={"origin": name} | asks),
            ):
                assert response.status_code == 403
                assert "access-control-allow-origin" not in response.headers
        rebound = post(http, GOOD, origin=site, host="evil.example")
        assert rebound.status_code == 421
        for response in (before, answer):
            assert "access-control-allow-credentials" not in response.headers


def test_which_origins_can_be_allowed():
    for text in ("https://app.example", "https://APP.example/", "https://app.example:443"):
        assert checked_origin(text) == "https://app.example"
    assert checked_origin("app://obsidian.md") == "app://obsidian.md"
    assert checked_origin("http://localhost:5173") == "http://localhost:5173"
    for text in (
        "*",
        "https://*",
        "null",
        "app.example",
        "https://app.example/path",
        "https://a@app.example",
        "",
    ):
        with pytest.raises(ConfigError, match="--allow-origin"):
            checked_origin(text)


def test_a_client_cannot_write_into_headers(http):
    response = post(http, GOOD | {"a\r\nset-cookie: x=1\u2028é": 1})
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    assert "\\u2028" in json.dumps(response.json()["herd"]["warnings"])
