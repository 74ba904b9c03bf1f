"""A store with keys, a server on a tiny random model, and a substitute for its engine with scripted answers."""

import threading
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import torch
from billing import clock, ledger  # noqa: F401
from page_browser import browser, chat, open_page, served_script  # noqa: F401

from herd.engine import Delta
from herd.engine.engine import Engine
from herd.engine.loop import EngineLoop
from herd.engine.request import Usage
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.serve.app import create_app
from herd.serve.chat import ServedModel
from herd.serve.models import ModelPool
from herd.serve.run import HerdServer
from herd.serve.settings import ServeSettings
from herd.serve.store import Store
from herd.serve.upstream_model import UpstreamModels
from herd.serve.upstreams import Fleet
from herd.text.tokenizer import Tokenizer

CONTEXT = 2048
SAMPLE = [
    'six times seven is forty-two, calculator expression parameters, {"type": "function", "name": "get"}\n',
    "Wie schön! Größe, Straße, Übung. ça va où ? नमस्ते สวัสดี 敏捷的棕色狐狸 🙂\n",
]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "keys" / "serve.db")
    yield store
    store.close()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(SAMPLE * 3, 640)


@pytest.fixture(scope="session")
def loop(tokenizer):
    torch.set_num_threads(1)
    config = ModelConfig(tokenizer.vocab_size, 48, 2, 6, 2, 80, rope_theta=10_000.0, max_context=CONTEXT)
    model = LlamaLM(config).init_weights(0, std=0.2)
    with torch.no_grad():  # greedy answers do not stop by chance
        model.lm_head.weight[sorted(tokenizer.stop_ids)] = 0
    engine = Engine(model, tokenizer)
    with EngineLoop(engine) as loop:
        yield loop


@pytest.fixture(scope="session")
def served(loop, tokenizer) -> ServedModel:
    return ServedModel("tiny", loop, tokenizer, CONTEXT, frozenset({"gpt-4"}), created=1)


@contextmanager
def running(served, settings=None, store=None, tools=None, upstreams=None):
    """Run a server in a thread and yield its address."""
    settings = settings or ServeSettings(drain_seconds=1)
    ready = threading.Event()
    ports: list[int] = []
    app = create_app(served, store, settings, tools, upstreams)
    server = HerdServer(app, settings, 0, lambda port: (ports.append(port), ready.set()))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def url(served):
    with running(served) as url:
        yield url


def upstream_models(*urls, **options) -> UpstreamModels:
    return UpstreamModels(Fleet(urls, "upstream-key", b"secret", refresh_seconds=0.1, **options))


@pytest.fixture(scope="session")
def gateway(served):
    """Yield the addresses of a Herd and of a gateway before it and a second one."""
    with (
        running(served) as first,
        running(served) as second,
        running(ModelPool([]), upstreams=upstream_models(first, second)) as url,
    ):
        yield first, url


@pytest.fixture(scope="session", params=[False, True], ids=["direct", "gateway"])
def with_gateway(request):
    """Run a test of a client twice: against a server, and through a gateway before it."""
    return request.param


@pytest.fixture(scope="session")
def either_url(gateway, with_gateway):
    return gateway[with_gateway]


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


class ScriptedLoop:
    """A substitute for an `EngineLoop`: every answer is the script, in the given pieces of text.

    Each piece is one token. An exception in the script is raised at its place, and a number is a pause in
    seconds. ``reason`` ends the answer.
    """

    def __init__(self, *pieces, reason="stop"):
        self.pieces, self.reason = pieces, reason
        self.requests, self.generations = [], []

    def submit(self, request, n=1):
        self.requests.append(request)
        new = [ScriptedGeneration(request, self.pieces, self.reason) for _ in range(n)]
        self.generations += new
        return new


class ScriptedGeneration:
    prompt_logprobs = None
    embedding = (0.6, 0.8)
    shared_tokens = 0

    def __init__(self, request, pieces, reason):
        self.request, self._items = request, iter([*pieces, None])
        self._reason, self.n_read, self.done, self.cancelled = reason, 0, False, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        import asyncio

        if self.done:
            raise StopAsyncIteration
        item = next(self._items)
        while isinstance(item, float):
            await asyncio.sleep(item)
            item = next(self._items)
        if isinstance(item, Exception):
            self.done = True
            raise item
        self.n_read += 1
        if item is None:
            self.done = True
            stopped = self._reason == "stop"
            return Delta("", (), self._reason, 0 if stopped else None)
        return Delta(item, (1,))

    async def ready(self):
        pass

    def cancel(self):
        self.done = self.cancelled = True

    @property
    def usage(self):
        return Usage(len(self.request.prompt_ids), 0, self.n_read, 0.0, 0.1, 0.2)


@pytest.fixture
def scripted_server(tokenizer, with_gateway):
    """Return a function that runs a server with a scripted answer and returns its address and its loop."""
    with ExitStack() as stack:

        def start(*pieces):
            loop = ScriptedLoop(*pieces)
            url = stack.enter_context(running(ServedModel("m", loop, tokenizer, CONTEXT)))
            if with_gateway:
                url = stack.enter_context(running(ModelPool([]), upstreams=upstream_models(url)))
            return url, loop

        yield start


@pytest.fixture
def scripted(scripted_server, request):
    """Return a function that runs such a server and returns a client, which the test's module connects, and the loop."""

    def start(*pieces):
        url, loop = scripted_server(*pieces)
        return request.module.connect(url), loop

    return start


def wait_until(condition, seconds=20.0):
    """Wait for a condition, and fail if it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not happen"
        time.sleep(0.01)
