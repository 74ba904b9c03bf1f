"""Another server with OpenAI's API that does what a test tells it, and keeps what it was sent.

``python bench/scripted_upstream.py PORT PIECES`` runs one whose answers are PIECES words, without pauses.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from contextlib import contextmanager

import uvicorn

CARD = {"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 1000}
PROMPT_TOKENS = 7


class ScriptedUpstream:
    """An ASGI application. ``answers`` are used one after another, and the last one again and again.

    An answer is a response (status, body, headers), or a list of pieces of text with floats as pauses, sent as a
    stream. ``BREAK`` as a piece closes the connection, and a dict is sent as an event as it is.
    """

    def __init__(self, *answers, card=CARD, tells=True, tokenizes=True, keeps=True) -> None:
        self.answers, self.card, self.tells, self.tokenizes = list(answers), card, tells, tokenizes
        self._keeps = keeps
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.open = 0

    @property
    def bodies(self) -> list[dict]:
        """The bodies of the requests to answer a prompt."""
        return [body for path, _, body in self.requests if path.startswith("/v1/c")]

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"] == "/v1/models":
            await respond(send, 200, {"object": "list", "data": [self.card]})
            return
        if self._keeps:
            self.requests.append((scope["path"], headers, json.loads(body)))
        if scope["path"] == "/tokenize":
            if self.tokenizes:
                await respond(send, 200, {"count": PROMPT_TOKENS, "tokens": [1] * PROMPT_TOKENS})
            else:
                await respond(send, 404, {"detail": "Not Found"})
            return
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, tuple):
            await respond(send, *answer)
            return
        self.open += 1
        streaming = asyncio.ensure_future(self.stream(send, answer))
        leaving = asyncio.ensure_future(receive())  # returns when the client goes away
        try:
            await asyncio.wait((streaming, leaving), return_when=asyncio.FIRST_COMPLETED)
            if streaming.done():
                streaming.result()
        finally:
            streaming.cancel()
            leaving.cancel()
            self.open -= 1

    async def stream(self, send, pieces) -> None:
        head = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream")],
        }
        await send({**head, "headers": [*head["headers"], (b"x-upstream-secret", b"1")]})
        count = 0

        async def event(data) -> None:
            text = data if isinstance(data, str) else json.dumps(data)
            await send(
                {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}
            )

        def usage() -> dict:
            return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": count, "total_tokens": 0}

        for piece in pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            elif piece is BREAK:
                await asyncio.sleep(0.05)  # for what was sent to arrive
                raise ConnectionError("told to break")
            elif isinstance(piece, dict):
                await event(piece)
            else:
                count += 2  # two tokens in each chunk
                choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
                await event({"choices": [choice]} | ({"usage": usage()} if self.tells else {}))
        count += 1  # the stop token
        await event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await event({"choices": [], "usage": usage()})
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


BREAK = object()


async def respond(send, status, body, headers=()) -> None:
    start = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", b"application/json")],
    }
    await send({**start, "headers": [*start["headers"], *headers]})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@contextmanager
def serving(app, port=0):
    """Run an ASGI application in a thread, and yield its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


if __name__ == "__main__":
    card = CARD | {"max_model_len": 131_072}  # Llama 3.1's, so that no request has to be counted to fit
    words = ScriptedUpstream(["word "] * int(sys.argv[2]), card=card, keeps=False)
    uvicorn.run(words, port=int(sys.argv[1]), log_level="critical", lifespan="off")
