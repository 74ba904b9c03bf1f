"""The log has one line for each request, which says who used what and never what was asked or answered."""

from __future__ import annotations

import logging
import re

import httpx
import pytest

from conftest import running, wait_until
from herd.serve.keys import KeyPolicy, create_key

SECRET = "a question\nthat nobody else reads"


@pytest.fixture
def ask(served, store, caplog):
    """Return a function that sends a request with a key and returns its line in the log."""
    _, token = create_key(store, "alice b", KeyPolicy(models={"tiny"}), actor="test")
    with caplog.at_level(logging.INFO, "herd.serve"), running(served, store=store) as url:

        def ask(method, path, **body):
            caplog.clear()
            key = body.pop("key", token)
            response = httpx.request(
                method, url + path, json=body or None, headers={"x-api-key": key}, timeout=60
            )
            # Other servers of this process may write too, so the line is found by its request.
            own = response.headers["x-request-id"] + " "
            wait_until(lambda: any(line.startswith(own) for line in caplog.messages))
            (line,) = [line for line in caplog.messages if line.startswith(own)]
            assert "question" not in line
            assert token not in line
            return re.sub(r"\d+\.\d{3}s", "Ts", line.partition(" ")[2])

        yield ask


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_the_key_the_model_and_the_tokens(ask, stream):
    messages = [{"role": "user", "content": SECRET}]
    line = ask("POST", "/v1/chat/completions", messages=messages, max_tokens=3, stream=stream)
    found = re.sub(r"(prompt|cached)=\d+", r"\1=N", line)
    assert found == (
        'POST /v1/chat/completions 200 key="alice b" model="tiny" completed prompt=N cached=N completion=3 '
        "first=Ts total=Ts"
    )


def test_what_is_refused_or_no_answer_has_a_line_too(ask):
    assert ask("GET", "/v1/models") == 'GET /v1/models 200 key="alice b" total=Ts'
    assert ask("GET", "/herd/v1/keys/question%0a") == 'GET /herd/v1/keys/{key_id} 403 key="alice b" total=Ts'
    assert ask("GET", "/v1/models", key="nonsense") == "GET /v1/models 401 total=Ts"
    assert ask("GET", "/question%0aINFO") == "GET - 404 total=Ts"
    assert ask("POST", "/v1/completions", prompt=SECRET, model="question") == (
        'POST /v1/completions 404 key="alice b" total=Ts'
    )
