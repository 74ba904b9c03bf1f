"""Run llama.cpp for comparison, in its own process that loads a GGUF file and answers requests.

It has its own Python environment (`make rivals`). So Herd does not depend on it, and the libraries of the two
do not mix. `rival_worker.py` is the program of the process.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from ..errors import EngineError

ENVIRONMENT = ".venv-rivals"


def find_python() -> Path:
    """Return llama.cpp's Python interpreter: in ``HERD_RIVALS``, the current folder or this checkout.

    Raises `EngineError` if there is none.
    """
    if named := os.environ.get("HERD_RIVALS"):
        places = [Path(named)]
    else:
        places = [folder / ENVIRONMENT for folder in (Path.cwd(), *Path(__file__).parents)]
    for place in places:
        if (place / "bin" / "python").exists():
            return place / "bin" / "python"
    raise EngineError(f"{places[0]}: no llama.cpp there; build it with `make rivals`, or set HERD_RIVALS")


class LlamaCpp:
    """A model in llama.cpp. Use it as a context manager, which ends the process. Times are in seconds."""

    def __init__(self, file: Path, *, threads: int, context: int, batch: int = 1, cache: str = "f16") -> None:
        """Load the file for ``batch`` sequences of at most ``context`` tokens. ``cache`` is f16 or q8_0."""
        self.file = file
        # How threads wait was chosen for Herd. It would slow llama.cpp down, up to three times on small
        # models, because it synchronizes its threads after every operator.
        environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        self._process = subprocess.Popen(
            [str(find_python()), str(Path(__file__).with_name("rival_worker.py"))], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        answer = self._ask(
            "load", file=str(file.absolute()), threads=threads, context=context, batch=batch, cache=cache
        )
        self.version, self.system = answer["version"], answer["system"]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def prefill(self, tokens: int) -> float:
        """Return the seconds of the prefill of one prompt."""
        return self._ask("prefill", tokens=tokens)["seconds"]

    def start(self, context: int, batch: int = 1) -> None:
        """Prefill ``batch`` prompts of ``context`` tokens. `steps` then continues them.

        A single prompt of more than 8,192 tokens is prefilled in chunks that attend only to themselves,
        because its values do not matter, only the number of bytes that the steps read.
        """
        self._ask("start", context=context, batch=batch)

    def steps(self, n: int) -> list[float]:
        """Return the seconds of ``n`` steps of one token per sequence."""
        return self._ask("steps", steps=n)["seconds"]

    def resident_nbytes(self) -> int:
        """Return the memory of llama.cpp's process in bytes."""
        return self._ask("rss")["nbytes"]

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            self._process.kill()
            reason = (self._process.communicate()[1].strip().splitlines() or ["no reason given"])[-1]
            raise EngineError(f"{self.file}: llama.cpp's process ended: {reason}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.file}: llama.cpp: {answer['error']}")
        return answer
