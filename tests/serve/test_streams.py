"""Streams in every situation but the ordinary one: silence, errors, clients that leave or do not read."""

import json
import socket
import threading

import httpx
import pytest

from conftest import CONTEXT, ScriptedLoop, running, wait_until
from herd.errors import EngineBusyError, EngineError
from herd.serve.chat import ServedModel
from herd.serve.settings import ServeSettings

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "six"}]}
QUICK = ServeSettings(ping_seconds=0.1, stall_seconds=0.5, drain_seconds=0)


def scripted(tokenizer, *pieces, **options):
    loop = ScriptedLoop(*pieces, **options)
    loop.close = lambda seconds: None
    return loop, ServedModel("m", loop, tokenizer, CONTEXT)


def test_headers_and_pings_come_while_the_prompt_is_computed(tokenizer):
    loop, served = scripted(tokenizer, 1.0, "late")
    with (
        running(served, QUICK) as url,
        httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert not loop.generations[0].done
        lines = list(response.iter_lines())
    pings = [number for number, line in enumerate(lines) if line == ": ping"]
    text = next(number for number, line in enumerate(lines) if "late" in line)
    assert len(pings) >= 3
    assert max(pings) < text
    assert lines[-2:] == ["data: [DONE]", ""]


def test_no_character_of_an_answer_ends_a_line_of_the_stream(tokenizer):
    text = "".join(chr(code) for code in range(1, 0x300)) + "\u2028\u2029\ufeff🙂\r\n"
    _, served = scripted(tokenizer, text)
    with running(served, QUICK) as url:
        with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
        assert "".join(delta.get("content") or "" for delta in deltas) == text


def test_an_error_after_the_headers_is_an_event(tokenizer):
    _, served = scripted(tokenizer, "a", EngineError("the cache is broken"))
    with running(served, QUICK) as url:
        with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}) as response:
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert json.loads(events[-1])["error"]["message"] == "the cache is broken"
        assert "[DONE]" not in events
        whole = httpx.post(url + CHAT, json=BODY)
        assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")


def test_a_bug_is_a_500_that_tells_nothing_about_the_inside(tokenizer, caplog):
    _, served = scripted(tokenizer, RuntimeError("secret path /etc"))
    with running(served, QUICK) as url:
        response = httpx.post(url + CHAT, json=BODY)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret path" in caplog.text


def test_a_full_queue_is_503_with_advice(tokenizer):
    loop, served = scripted(tokenizer)

    def submit(request, n=1):
        raise EngineBusyError("512 requests wait")

    loop.submit = submit
    with running(served, QUICK) as url:
        for stream in (False, True):
            response = httpx.post(url + CHAT, json=BODY | {"stream": stream})
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers["x-should-retry"] == "true"
            assert response.json()["error"]["type"] == "overloaded_error"


def test_a_client_that_leaves_a_stream_ends_the_generation(tokenizer):
    loop, served = scripted(tokenizer, *["a", 0.05] * 1000)
    with running(served, QUICK) as url:
        with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True, "n": 2}) as response:
            next(response.iter_lines())
        wait_until(lambda: all(each.cancelled for each in loop.generations))
    assert len(loop.generations) == 2


def test_a_client_that_does_not_wait_for_a_whole_answer_ends_the_generation(tokenizer):
    loop, served = scripted(tokenizer, *["a", 0.05] * 1000)
    with running(served, QUICK) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + CHAT, json=BODY | {"n": 2}, timeout=0.3)
        wait_until(lambda: all(each.cancelled for each in loop.generations))
    assert len(loop.generations) == 2


def test_a_client_that_does_not_read_ends_the_generation(tokenizer):
    loop, served = scripted(tokenizer, *["a" * 100_000] * 1000)
    with running(served, QUICK) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            data = json.dumps(BODY | {"stream": True}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            wait_until(lambda: loop.generations and loop.generations[0].cancelled)
        assert loop.generations[0].n_read < 1000


def test_a_server_that_stops_tells_open_streams(served):
    with running(served, ServeSettings(drain_seconds=0)) as url:
        seen = []

        def read():
            with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}, timeout=30) as response:
                seen.extend(line for line in response.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: served.loop.stats().active == 1)
        for generation in list(served.loop._open):
            generation.cancel()
        reader.join()
    assert json.loads(seen[-1].removeprefix("data: "))["error"]["code"] == "overloaded"


def test_pages_are_free_after_clients_left_at_any_moment(served):
    free = served.loop.stats().used_pages
    with running(served) as url:
        for n_lines in (1, 3, 5, 9):
            with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True, "n": 2}) as response:
                lines = response.iter_lines()
                for _ in range(n_lines):
                    next(lines)
        wait_until(lambda: (served.loop.stats().active, served.loop.stats().waiting) == (0, 0))
    assert served.loop.stats().used_pages == free
