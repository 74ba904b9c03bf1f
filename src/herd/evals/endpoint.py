"""Models at an endpoint: any server with OpenAI's completions and chat completions.

Likelihoods come from ``/v1/completions`` with ``echo`` and ``logprobs``: the server scores the prompt itself,
and the log-probabilities of the tokens after the context are summed. vLLM, llama.cpp's server and Herd's
gateway can do this. Most hosted chat services cannot. A task that needs likelihoods then fails with this
reason. Dialogs go to ``/v1/chat/completions``. The key is read from ``HERD_API_KEY``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from ..errors import EngineError
from ..text.llama3_chat import call_text
from .tasks.task import Answer, Generate, GenerateJson, Likelihood, Mode, Rank, Request

AT_ONCE = 8
REACH_S = 10.0
TIMEOUT_S = 600.0
WAITS_S = (1.0, 4.0, 15.0)
"""Seconds to wait before each retry if a server is busy (429, 5xx) or cannot be reached for a moment."""


class RefusedError(EngineError):
    """A request that a server refuses for what it says, such as a prompt that is too long."""


class EndpointModel:
    """A model at ``url``, http(s)://host[:port][/v1]. Without ``model``, it is the server's only one."""

    precision = "endpoint"

    def __init__(self, url: str, model: str | None = None, mode: Mode = "instruct") -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.mode = mode
        self._reach()
        self.name = model or self._only_model()
        self.hash = hashlib.sha256(f"{self.url} {self.name}".encode()).hexdigest()

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Yield answers as `harness.Model` says.

        The first likelihood is requested alone, in case the endpoint has none.
        """
        first = next((n for n, r in enumerate(requests) if not isinstance(r, Generate)), None)
        if first is not None:
            yield first, self._one(requests[first])
        rest = [n for n in range(len(requests)) if n != first]
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            numbers = {pool.submit(self._one, requests[n]): n for n in rest}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def chat_many(self, bodies: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int] | RefusedError]:
        """Yield the text of each chat completion and its number of tokens, in order.

        An unfinished answer is empty. The error stands for a request that the server refuses. Tokens are 0 if
        the server does not count them.
        """

        def ask(body: dict[str, Any]) -> tuple[str, int] | RefusedError:
            try:
                answer = self._ask("/chat/completions", {"model": self.name} | body)
            except RefusedError as error:
                return error
            try:
                choice, used = answer["choices"][0], answer.get("usage")
                text = choice["message"].get("content") or ""
                text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes "?"
                ended = choice.get("finish_reason") not in ("length", "content_filter")
            except (KeyError, IndexError, TypeError, AttributeError):
                raise EngineError(f"{self.url}: an answer without text: {str(answer)[:200]}") from None
            tokens = used.get("total_tokens") if isinstance(used, dict) else 0
            return (text if ended else ""), tokens if isinstance(tokens, int) and tokens > 0 else 0

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            yield from pool.map(ask, bodies)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, request: Request) -> Answer:
        if isinstance(request, Generate):
            return self._write(request)
        pairs = request.pairs if isinstance(request, Rank) else (("", request.text),)
        return Answer(likelihoods=tuple(self._likelihood(*pair) for pair in pairs))

    def _likelihood(self, context: str, continuation: str) -> Likelihood:
        context, text = context.rstrip(), context + continuation
        body = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        choice = self._choice("/completions", body)
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, dict) or not logprobs.get("text_offset"):
            raise EngineError(
                f"{self.url}: the server gives no logprobs of the prompt (completions with echo and "
                "logprobs), but this task needs them: use another server, e.g. vLLM, or --mode instruct"
            )
        columns = (logprobs["text_offset"], logprobs["token_logprobs"], logprobs["top_logprobs"])
        after = range(len(context), len(text))
        rows = [row for row in zip(*columns, strict=True) if row[0] in after and row[1] is not None]
        greedy = all(nats >= max(top.values()) for _, nats, top in rows if top)
        return Likelihood(float(sum(nats for _, nats, _ in rows)), greedy, len(rows))

    def _write(self, request: Generate) -> Answer:
        body: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": 0}
        if isinstance(request.prompt, str):
            if request.stop:
                body["stop"] = list(request.stop[:4])  # OpenAI accepts at most four
            choice = self._choice("/completions", body | {"prompt": request.prompt})
            return Answer(_cut(choice.get("text") or "", request.stop), choice.get("finish_reason") or "")
        if request.tools:
            wrapped = [tool if "function" in tool else {"function": tool} for tool in request.tools]
            body["tools"] = [{"type": "function", **tool} for tool in wrapped]
        if isinstance(request, GenerateJson):
            schema = {"name": "answer", "schema": json.loads(request.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        choice = self._choice("/chat/completions", body | {"messages": list(request.prompt)})
        message = choice.get("message") or {}
        calls = [_call(call) for call in message.get("tool_calls") or ()]
        text = "".join([message.get("content") or "", *calls])
        return Answer(_cut(text, request.stop), choice.get("finish_reason") or "")

    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._ask(path, {"model": self.name} | body)
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"{self.url}{path}: the answer has no choices: {str(answer)[:200]}") from None

    def _reach(self) -> None:
        """Raise `EngineError` at once, without retries, if nothing listens at the address."""
        try:
            urllib.request.urlopen(self.url + "/models", timeout=REACH_S).close()
        except urllib.error.HTTPError:
            pass  # a server is there
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            why = getattr(reason, "strerror", None) or reason
            raise EngineError(f"{self.url}: no answer ({why}); is the server running?") from None

    def _only_model(self) -> str:
        answer = self._ask("/models")
        try:
            names = [entry["id"] for entry in answer["data"]]
        except (KeyError, TypeError):
            raise EngineError(f"{self.url}/models: does not list models; name one with --model") from None
        if len(names) != 1:
            raise EngineError(f"{self.url}: serves {', '.join(names) or 'no model'}; name one with --model")
        return names[0]

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("HERD_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for wait in (*WAITS_S, None):
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                said = error.read(500).decode("utf-8", "replace").strip()
                problem = f"{self.url}{path}: {error.code} {error.reason}: {said}"
                if error.code in (400, 413, 422):
                    raise RefusedError(problem) from None
                if error.code != 429 and error.code < 500:
                    raise EngineError(problem) from None
            except OSError as error:
                problem = f"{self.url}{path}: no answer ({error}); is the server running?"
            except ValueError as error:
                problem = f"{self.url}{path}: an answer that is not JSON ({error}); is this OpenAI's API?"
            if wait is not None:
                warnings.warn(f"{problem}; trying again", stacklevel=2)
                time.sleep(wait)
        raise EngineError(problem)


def _cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string. The server was not given all of them."""
    ends = [at for at in (text.find(mark) for mark in stop) if at >= 0]
    return text[: min(ends, default=len(text))]


def _call(call: Any) -> str:
    """Return a call in Llama's format, so that one judge can read answers of checkpoints and endpoints."""
    function = call["function"]
    arguments: Any = function["arguments"] or {}  # usually text, which the parser of calls can read too
    return call_text(function["name"], arguments)
