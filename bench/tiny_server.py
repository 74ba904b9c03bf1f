"""Run `herd serve`'s application on a tiny random model in processes that can be killed and started quickly.

`TinyServers` starts one process that loads everything and then waits. Each `start` forks it, so a server listens
again some tens of milliseconds after its predecessor was killed. Only this file's helper process imports torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONTEXT = 1024
CACHE_BYTES = 24_000_000
"""Enough for 64 answers, and so little that cached prompts are evicted all the time."""
SAMPLE = ["the quick brown fox jumps over the lazy dog and then sleeps for a long while 0123456789.\n"] * 3


class TinyServers:
    """Servers on one store, one at a time. ``pid`` and ``port`` are those of the present one."""

    def __init__(self, store: Path, max_batch: int = 64) -> None:
        words = [sys.executable, __file__, str(store), str(max_batch)]
        self._waiting = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid, self.port = 0, 0

    def start(self) -> None:
        """Start a server and wait until it listens."""
        self._say("start")
        self.pid, self.port = (int(word) for word in self._hear())

    def kill(self) -> None:
        """Send SIGKILL to the server and wait until it has ended."""
        os.kill(self.pid, signal.SIGKILL)
        self._wait()

    def stop(self) -> None:
        """Let the server end as at Ctrl-C."""
        os.kill(self.pid, signal.SIGTERM)
        self._wait()

    def close(self) -> None:
        """End the waiting process."""
        self._waiting.communicate()

    def _wait(self) -> None:
        self._say("wait")
        self._hear()

    def _say(self, word: str) -> None:
        assert self._waiting.stdin is not None
        print(word, file=self._waiting.stdin, flush=True)

    def _hear(self) -> list[str]:
        assert self._waiting.stdout is not None
        line = self._waiting.stdout.readline()
        if not line:
            raise SystemExit("the server ended at its start; its error is above")
        return line.split()


def tiny_model() -> tuple[Any, Any]:
    """Return a random model of two layers and its tokenizer, for one thread."""
    import torch

    from herd.llama import ModelConfig
    from herd.llama.model import LlamaLM
    from herd.text.tokenizer import Tokenizer

    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(SAMPLE, 540)
    config = ModelConfig(tokenizer.vocab_size, 48, 2, 6, 2, 96, rope_theta=10_000.0, max_context=CONTEXT)
    return LlamaLM(config).init_weights(0, std=0.2), tokenizer


def _serve_when_told(store: Path, max_batch: int) -> None:
    """Fork a server at each "start" on stdin. Answer with its process id and port."""
    import herd.engine.loop
    import herd.serve.app
    import herd.serve.run  # noqa: F401  (imported before the fork, so that a server starts quickly)

    model, tokenizer = tiny_model()
    for line in sys.stdin:
        if line.strip() == "wait":
            os.wait()
            print("ended", flush=True)
            continue
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reading)
            _serve(model, tokenizer, store, max_batch, writing)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            port = pipe.read()
        print(pid, port, flush=True)


def _listener() -> socket.socket:
    """Return a listening socket whose connections have a small buffer in the kernel, so that it fills up."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    return listener


def _serve(model, tokenizer, store: Path, max_batch: int, ready: int) -> None:
    from herd.engine.engine import Engine
    from herd.engine.loop import EngineLoop
    from herd.serve.app import create_app
    from herd.serve.chat import ServedModel
    from herd.serve.run import HerdServer
    from herd.serve.settings import ServeSettings
    from herd.serve.store import Store

    def tell(port: int) -> None:
        os.write(ready, str(port).encode())
        os.close(ready)

    settings = ServeSettings(drain_seconds=2)
    opened = Store(store)
    with EngineLoop(Engine(model, tokenizer, max_batch=max_batch, cache_bytes=CACHE_BYTES)) as loop:
        served = ServedModel("tiny", loop, tokenizer, CONTEXT, created=int(time.time()))
        HerdServer(create_app(served, opened, settings), settings, 0, tell).run([_listener()])
    opened.close()


if __name__ == "__main__":
    _serve_when_told(Path(sys.argv[1]), int(sys.argv[2]))
