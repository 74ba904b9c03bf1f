"""Check `herd serve` with a real model: the same answers through every API, cancelling, silence, and random requests.

    HERD_TEST_DATA=../shared/data python bench/serve_answers.py ROW [--limit N] [--commit]

Each row is one receipt (serve-ROW). Minutes are for two cores:

    answers    3   SmolLM2-135M: 10 questions, greedily and with a seed, asked by `herd chat`, and through chat
                   completions, completions, responses, messages, Ollama's two and llama.cpp's API, streamed and whole
    cancel     1   SmolLM2-135M: 50 clients that leave at random moments, beside one that stays: steps of the engine
                   until their pages are free
    silence    5   random weights of the 8B shape in Q4_0: the bytes of a stream while 8,000 tokens are computed
    fuzz       5   2,000 requests and more that schemathesis makes from the server's own OpenAPI description

``--limit`` makes a row small: questions, clients, thousands of tokens, or requests of each operation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

from common import DATA, ROOT, WORK, at_least, at_most, exactly, run_row, save_receipt
from herd.checkpoint import ModelSource
from herd.engine import Sampling
from herd.engine.chat_session import ChatSession
from herd.engine.engine import Engine
from herd.engine.loop import EngineLoop
from herd.report import Value
from herd.serve.chat import ServedModel
from herd.text.toolcall import Content
from servers import http_request, serving
from smollm2_chat import NEWCOMER
from smollm2_parts import FILE

CONTEXT, MAX_TOKENS, SEED = 2048, 48, 7
LONG_PROMPT, FIRST_BYTE_MS, GAP_S = 8000, 100, 15
MIN_REQUESTS = 2000


def smollm2() -> tuple[ServedModel, EngineLoop, Any]:
    """Return SmolLM2 as `herd serve` serves it, its engine's loop, and the model."""
    source = ModelSource(FILE)
    model = source.load(torch.float32, "cpu").eval().requires_grad_(False)
    loop = EngineLoop(Engine(model, source.tokenizer, max_batch=16, max_context=CONTEXT))
    sampling = source.sampling_defaults
    return ServedModel("smollm2", loop, source.tokenizer, CONTEXT, sampling=sampling), loop, model


# Answers ----------------------------------------------------------------------------------------------------


def answers_row(args: argparse.Namespace) -> None:
    questions = NEWCOMER[: args.limit or 10]
    settings: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"seed": SEED})
    wrong: list[str] = []
    n_compared = 0
    served, _, model = smollm2()
    with serving(served) as url:
        for given in settings:
            expected = [herd_chat(served, model, question, given) for question in questions]
            apis = [api for api in APIS if "seed" not in given or api in WITH_SEED]
            cases = [
                (api, stream, number)
                for api in apis
                for stream in (False, True)
                for number in range(len(questions))
            ]
            with httpx.Client(base_url=url, timeout=600) as http, ThreadPoolExecutor(8) as pool:

                def ask(case: tuple[str, bool, int], given: dict[str, Any] = given) -> str:
                    api, stream, number = case
                    return answer(http, api, questions[number], given, stream=stream)

                for case, text in zip(cases, pool.map(ask, cases), strict=True):
                    n_compared += 1
                    if text != expected[case[2]]:
                        wrong.append(f"{case}: {text!r} is not {expected[case[2]]!r}")
    print("\n".join(wrong))
    save(args, "answers of a served model compared with those of `herd chat`", {
        "answers": Value(n_compared, "answers compared"),
        "other than herd chat's": exactly(0, len(wrong), "answers"),
    }, seed=SEED, notes=f"SmolLM2-135M-Instruct in 4 bits; {len(questions)} questions, at most {MAX_TOKENS} tokens, 8 at "
        f"once; {', '.join(APIS)}, streamed and whole, with temperature 0, and with a seed and the model's own settings "
        f"where the API has a seed ({', '.join(WITH_SEED)})",
    )  # fmt: skip


def herd_chat(served: ServedModel, model: Any, question: str, given: dict[str, Any]) -> str:
    """Return the answer of `herd chat`: a session with an engine of its own, one answer at a time."""
    engine = Engine(model, served.tokenizer, max_batch=1, max_context=CONTEXT)
    sampling = Sampling(**{**served.sampling, **given, "max_tokens": MAX_TOKENS})
    session = ChatSession(engine, sampling=sampling, max_repeats=0)
    return "".join(event.text for event in session.ask(question) if isinstance(event, Content))


def answer(http: httpx.Client, api: str, question: str, given: dict[str, Any], *, stream: bool) -> str:
    """Return the text of an answer through one of `APIS`."""
    path, make_body, text_of, delta_of = APIS[api]
    body = {"model": "smollm2", "stream": stream, **make_body(http, question)}
    if api.startswith("ollama"):
        body["options"] = {"num_predict": MAX_TOKENS, **given}
    else:
        body |= given
    if not stream:
        response = http.post(path, json=body)
        response.raise_for_status()
        return str(text_of(response.json()))
    with http.stream("POST", path, json=body) as response:
        response.raise_for_status()
        lines = [line.removeprefix("data: ") for line in response.iter_lines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return "".join(delta_of(event) or "" for event in events)


def dialog(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def prompt_ids(http: httpx.Client, question: str) -> list[int]:
    return list(http.post("/tokenize", json={"messages": dialog(question)}).json()["tokens"])


def prompt_text(http: httpx.Client, question: str) -> str:
    return str(http.post("/apply-template", json={"messages": dialog(question)}).json()["prompt"])


def first_choice(event: dict[str, Any], name: str) -> Any:
    """Return a field of the first choice of an event. None: the event has no choice."""
    return event["choices"][0].get(name) if event.get("choices") else None


LIMIT = {"max_tokens": MAX_TOKENS}
APIS: dict[str, tuple[str, Any, Any, Any]] = {
    "chat completions": (
        "/v1/chat/completions", lambda http, question: {"messages": dialog(question), **LIMIT},
        lambda body: body["choices"][0]["message"]["content"],
        lambda event: (first_choice(event, "delta") or {}).get("content"),
    ),
    "completions": (
        "/v1/completions", lambda http, question: {"prompt": prompt_ids(http, question), **LIMIT},
        lambda body: body["choices"][0]["text"], lambda event: first_choice(event, "text"),
    ),
    "responses": (
        "/v1/responses", lambda http, question: {"input": question, "max_output_tokens": MAX_TOKENS},
        lambda body: body["output"][0]["content"][0]["text"],
        lambda event: event["delta"] if event["type"] == "response.output_text.delta" else "",
    ),
    "messages": (
        "/v1/messages", lambda http, question: {"messages": dialog(question), **LIMIT},
        lambda body: body["content"][0]["text"],
        lambda event: event.get("delta", {}).get("text"),
    ),
    "ollama chat": (
        "/api/chat", lambda http, question: {"messages": dialog(question)},
        lambda body: body["message"]["content"], lambda event: event["message"]["content"],
    ),
    "ollama generate": (
        "/api/generate", lambda http, question: {"prompt": question},
        lambda body: body["response"], lambda event: event["response"],
    ),
    "llama.cpp": (
        "/completion", lambda http, question: {"prompt": prompt_text(http, question), "n_predict": MAX_TOKENS},
        lambda body: body["content"], lambda event: event["content"],
    ),
}  # fmt: skip
"""Of each API: its path, the body of a question, the text of a whole answer, and of an event of a stream."""
WITH_SEED = ("chat completions", "completions", "ollama chat", "ollama generate", "llama.cpp")


# Cancelling -------------------------------------------------------------------------------------------------


def cancel_row(args: argparse.Namespace) -> None:
    n_clients, rng = args.limit or 50, random.Random(SEED)
    steps: list[int] = []
    freed: list[int] = []
    with smollm2() as (served, loop, _):
        pages, cancel, end = loop.engine.cache.pages, loop._cancel, loop._end
        at: dict[int, int] = {}

        def noting_cancel(stream: Any) -> None:
            at[id(stream)] = loop.engine.n_steps
            cancel(stream)

        def measured_end(stream: Any) -> None:  # in the thread of the engine
            before = pages.n_used
            end(stream)
            if id(stream) in at:
                steps.append(loop.engine.n_steps - at.pop(id(stream)))
                freed.append(before - pages.n_used)

        loop._cancel, loop._end = noting_cancel, measured_end  # type: ignore[method-assign]
        with serving(served) as url, httpx.Client(base_url=url, timeout=600) as http:
            staying = {"prompt": "Once", "max_tokens": CONTEXT - 64, "ignore_eos": True, "stream": True}
            with http.stream("POST", "/v1/completions", json=staying) as long_answer:
                for number in range(n_clients):
                    words = " ".join(str(rng.randrange(1000)) for _ in range(400))
                    leave_early(url, f"{number} {words}", rng.uniform(0.0, 2.0))
                deadline = time.monotonic() + 20
                while len(steps) < n_clients and time.monotonic() < deadline:
                    time.sleep(0.01)
                n_ended = len(steps)
                long_answer.close()
            while loop.stats().active and time.monotonic() < deadline + 20:
                time.sleep(0.01)
        left = pages.n_used
    save(args, "clients that leave: steps of the engine until the pages of their answers are free", {
        "clients": Value(n_clients, "clients that left"),
        "cancelled": exactly(n_clients, n_ended, "answers"),
        "steps until the pages are free": at_most(1, max(steps), "steps, at most"),
        "had pages": Value(sum(pages > 0 for pages in freed), "answers that had pages when they were cancelled"),
        "pages in use at the end": exactly(0, left, "pages"),
    }, seed=SEED, notes="SmolLM2-135M-Instruct; the clients close their connections 0 to 2 s after sending prompts of about "
        "1,200 tokens, one after another, while another answer is generated",
    )  # fmt: skip


def leave_early(url: str, prompt: str, seconds: float) -> None:
    """Ask for a stream, and close the connection after so many seconds."""
    host, port = url.removeprefix("http://").split(":")
    body = {"prompt": prompt, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(http_request("/v1/completions", body))
        time.sleep(seconds)


# Silence ----------------------------------------------------------------------------------------------------


def silence_row(args: argparse.Namespace) -> None:
    from herd.llama.config import SIZES
    from herd.quant import scheme
    from herd.quant.random import random_quantized
    from herd.text.tokenizer import Tokenizer

    n_tokens = 1000 * args.limit if args.limit else LONG_PROMPT
    config = SIZES["8B"]
    tokenizer = Tokenizer.from_file(DATA / "llama3_tokenizer" / "tokenizer.model")
    model = random_quantized(config, scheme("q4"), SEED)
    rng = random.Random(SEED)
    ids = [rng.randrange(100_000) for _ in range(n_tokens)]
    loop = EngineLoop(Engine(model, tokenizer, max_batch=2, max_context=n_tokens + 64))
    with serving(ServedModel("8b", loop, tokenizer, n_tokens + 64)) as url:
        times, first_text = bytes_of_stream(url, {"prompt": ids, "max_tokens": 2, "stream": True})
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    save(args, f"the bytes of a stream while a prompt of {n_tokens:,} tokens is computed, 8B shape in Q4_0", {
        "first byte": at_most(FIRST_BYTE_MS, 1000 * times[0], "ms"),
        "longest silence": at_most(GAP_S, max(gaps), "s"),
        "first text": Value(first_text, "s"),
        "prefill": Value(n_tokens / first_text, "tokens/s"),
    }, seed=SEED, notes=f"random weights, {args.threads} threads; times from the moment the request is sent")  # fmt: skip


def bytes_of_stream(url: str, body: dict[str, Any]) -> tuple[list[float], float]:
    """Send a request. Return the times at which bytes arrive, and the one of the first event with data."""
    host, port = url.removeprefix("http://").split(":")
    times: list[float] = []
    first_text = 0.0
    with socket.create_connection((host, int(port))) as connection:
        start = time.perf_counter()
        connection.sendall(http_request("/v1/completions", body))
        while chunk := connection.recv(1 << 16):
            times.append(time.perf_counter() - start)
            if not first_text and b"data: " in chunk:
                first_text = times[-1]
            if b"[DONE]" in chunk:
                break
    return times, first_text


# Random requests --------------------------------------------------------------------------------------------


def fuzz_row(args: argparse.Namespace) -> None:
    sys.path.append(str(ROOT / "tests" / "serve"))
    from test_fuzz import N_SOAK, fuzzed_server, send  # type: ignore[import-not-found]

    from conftest import SAMPLE  # type: ignore[import-not-found]
    from herd.text.tokenizer import Tokenizer

    with fuzzed_server(Tokenizer.train(SAMPLE * 3, 640)) as schema:
        statuses = send(schema, args.limit or N_SOAK)
    total = sum(statuses.values())
    failures = sum(count for status, count in statuses.items() if status >= 500)
    save(args, "requests that schemathesis makes from the server's OpenAPI description, half of them invalid", {
        "requests": at_least(MIN_REQUESTS, total, "requests"),
        "answered by a 5xx": exactly(0, failures, "requests"),
        **{f"status {status}": Value(count, "requests") for status, count in sorted(statuses.items())},
    }, notes="a server without keys on a scripted engine; every error must have a body that says what is wrong")  # fmt: skip


def save(args: argparse.Namespace, what: str, values: dict[str, Value], **more: Any) -> None:
    if args.limit is not None and args.commit:
        sys.exit("--commit needs the full row: leave out --limit")
    save_receipt(f"serve-{args.row}", what=what, values=values, **more)


def main() -> None:
    rows = {"answers": answers_row, "cancel": cancel_row, "silence": silence_row, "fuzz": fuzz_row}
    text = "a small version: questions, clients, thousands of tokens, or requests of each operation"
    run_row(__doc__, rows, limit=text, work=Path(WORK))


if __name__ == "__main__":
    main()
