"""A server that answers tasks: all kinds of requests, missing logprobs, a server that is busy or broken."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from herd.errors import EngineError
from herd.evals import endpoint
from herd.evals.harness import evaluate
from herd.evals.tasks import Answer, Data, Generate, Rank, make_task
from herd.text import ToolCall, parse


class Stub(BaseHTTPRequestHandler):
    """As much of an OpenAI server as is asked. Words are tokens. ``server.seen`` keeps the bodies."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        if self.server.failures:
            code = self.server.failures.pop()
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"busy")
            return
        if self.path.endswith("/chat/completions"):
            call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
            message = {"content": "The answer is B.", "tool_calls": [call] if "tools" in body else None}
            self.reply({"choices": [{"message": message, "finish_reason": "stop"}]})
        elif body.get("echo") and self.server.logprobs:
            text = body["prompt"]
            offsets = [0, *(i for i, c in enumerate(text) if c == " "), len(text)]
            nats = [None, *(-float(len(text) - at) for at in offsets[1:])]
            tops = [None, *({"x": value} for value in nats[1:])]
            logprobs = {"text_offset": offsets, "token_logprobs": nats, "top_logprobs": tops}
            self.reply({"choices": [{"text": text, "logprobs": logprobs}]})
        else:
            self.reply({"choices": [{"text": " 18\n#### 18 Question: more", "finish_reason": "length"}]})

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS_S", (0.0, 0.0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as httpd:
        httpd.models, httpd.seen, httpd.logprobs, httpd.failures = ["stub"], [], True, []
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        yield httpd
        httpd.shutdown()


def test_an_endpoint_answers_all_kinds_of_requests(server, monkeypatch):
    monkeypatch.setenv("HERD_API_KEY", "secret")
    model = endpoint.EndpointModel(server.url)
    assert model.name == "stub"
    tool = {"name": "f", "parameters": {}}
    asked = [
        Rank((("one two", " three four"), ("one two", " three"))),
        Generate("Question: 9 + 9?", stop=("Question:",)),
        Generate(({"role": "user", "content": "hi"},)),
        Generate(({"role": "user", "content": "hi"},), tools=(tool,)),
    ]
    answers = dict(model.answer(asked))
    assert [x.nats for x in answers[0].likelihoods] == [-11 - 5, -6]
    assert [x.n_tokens for x in answers[0].likelihoods] == [2, 1]
    assert all(x.greedy for x in answers[0].likelihoods)
    assert answers[1] == Answer(" 18\n#### 18 ", "length")
    assert answers[2].text == "The answer is B."
    assert parse(answers[3].text).calls == [ToolCall("f", {"a": 1}, "json")]
    assert {key for _, _, key in server.seen} == {"Bearer secret"}
    assert all(body["model"] == "stub" and body["temperature"] == 0 for _, body, _ in server.seen)


def test_an_endpoint_without_logprobs_fails_only_those_tasks(server, tmp_path):
    server.logprobs = False
    model = endpoint.EndpointModel(server.url, mode="base")
    rows = evaluate(model, [make_task("boolq"), make_task("gsm8k")], Data(), tmp_path).tasks
    assert [row.status for row in rows] == ["failed", "done"]
    assert "gives no logprobs of the prompt" in rows[0].reason
    assert "--mode instruct" in rows[0].reason
    assert sum(body.get("echo", False) for _, body, _ in server.seen) == 1  # it was not asked in vain again
    assert rows[1].score.n == 10


def test_a_busy_endpoint_is_asked_again_and_a_broken_one_given_up(server):
    model = endpoint.EndpointModel(server.url)
    asked = [Generate("hello")]
    server.failures = [503, 429]
    assert dict(model.answer(asked))
    server.failures = [503] * 9
    with pytest.raises(EngineError, match="503"):
        dict(model.answer(asked))
    server.failures = [400]
    with pytest.raises(EngineError, match=r"400 .*: busy"):
        dict(model.answer(asked))


def test_the_model_of_an_endpoint_is_found_or_must_be_named(server):
    server.models = ["a", "b"]
    with pytest.raises(EngineError, match="serves a, b; name one with --model"):
        endpoint.EndpointModel(server.url)
    assert endpoint.EndpointModel(server.url, "b").name == "b"
    with pytest.raises(EngineError, match="is the server running"):
        endpoint.EndpointModel("http://127.0.0.1:9")
