"""Run a contestant in its own process, which answers every line of JSON with a line.

Separate processes keep the contestants' memory apart, and all of them can stay loaded while they alternate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import psutil

from herd.machine import peak_memory


class Contestant:
    """A running contestant. ``quiet`` drops its stderr. ``environment`` is added to this process's."""

    def __init__(
        self, command: Sequence[str], *, quiet: bool = False, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = " ".join(command)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env=os.environ | dict(environment or {}),
        )

    @classmethod
    def of_this_script(cls, words: str, threads: int, **more: Any) -> Contestant:
        """Return the running script again, as ``--contestant WORDS --threads N``."""
        script = os.path.abspath(sys.argv[0])
        return cls([sys.executable, script, "--contestant", words, "--threads", str(threads)], **more)

    def ask(self, question: Any = None) -> Any:
        """Return the answer to one line. RuntimeError if the contestant died."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant died: {self.name}")
        return json.loads(line)

    def close(self) -> None:
        """End the contestant: it sees the end of its input."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()


def answer_steps(make_step: Callable[[], Callable[[], float]], threads: int, seed: int) -> None:
    """Run a training step for every line on stdin, as the contestant that this process is.

    ``make_step`` is called once and returns a function that trains one step and returns its loss. Each line is
    answered with the step's seconds and loss, and this process's bytes: the peak, and those before ``make_step``.
    """
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers and libraries print to stdout
    base = psutil.Process().memory_info().rss
    step = make_step()
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        took = time.perf_counter() - began
        answer = {"seconds": took, "loss": loss, "peak": peak_memory(), "base": base}
        print(json.dumps(answer), file=out, flush=True)
