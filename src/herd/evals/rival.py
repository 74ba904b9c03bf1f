"""llama.cpp beside Herd: a process of its own that loads a GGUF file and takes its turns when asked.

The rival lives in an environment of its own (`make rivals`): nobody needs it to use Herd, and the libraries of the two
never meet. `rival_worker.py` is what runs there.
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
    """The rival's interpreter: in ``HERD_RIVALS``, the current folder or this checkout. `EngineError` if none is."""
    named = os.environ.get("HERD_RIVALS")
    places = (
        [Path(named)]
        if named
        else [Path.cwd() / ENVIRONMENT, *(p / ENVIRONMENT for p in Path(__file__).parents)]
    )
    for place in places:
        if (place / "bin" / "python").exists():
            return place / "bin" / "python"
    raise EngineError(
        f"{places[0]}: no rival there; build it with `make rivals`, or name its environment: HERD_RIVALS"
    )


class LlamaCpp:
    """One model file in llama.cpp. A context manager: the process ends with it. Times are seconds."""

    def __init__(self, file: Path, *, threads: int, context: int, batch: int = 1, cache: str = "f16") -> None:
        """``context`` is the longest of a sequence, ``batch`` the number of sequences; ``cache`` is f16 or q8_0."""
        self.file = file
        self._process = subprocess.Popen(
            [str(find_python()), str(Path(__file__).with_name("rival_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        request = {
            "file": str(file.absolute()),
            "threads": threads,
            "context": context,
            "batch": batch,
            "cache": cache,
        }
        answer = self._ask("load", **request)
        self.version, self.system = answer["version"], answer["system"]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def prefill(self, tokens: int) -> float:
        """One prompt of so many tokens."""
        return self._ask("prefill", tokens=tokens)["seconds"]

    def start(self, context: int, batch: int = 1) -> None:
        """Reads ``batch`` prompts of ``context`` tokens; `steps` go on from there. A single one of more than 8,192 is
        read in pieces that see themselves only: what counts is how much the steps read."""
        self._ask("start", context=context, batch=batch)

    def steps(self, n: int) -> list[float]:
        """``n`` steps of one token for each sequence."""
        return self._ask("steps", steps=n)["seconds"]

    def resident_nbytes(self) -> int:
        """Memory of the rival's process."""
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
            complaints = self._process.communicate()[1].strip().splitlines()
            raise EngineError(
                f"{self.file}: llama.cpp's process ended: {complaints[-1] if complaints else 'no reason'}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.file}: llama.cpp: {answer['error']}")
        return answer
