"""Ask llama.cpp, which runs in an environment of its own (`make rivals`)."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("HERD_RIVALS", ROOT / ".venv-rivals")) / "bin" / "python"


def ask_llama_cpp(jobs: list[dict]) -> list[dict]:
    """Return the answers to jobs of `bench/llamacpp_worker.py`. Skip the test if llama.cpp is not built."""
    if not PYTHON.exists():
        pytest.skip("needs llama.cpp: make rivals, or HERD_RIVALS=its environment")
    worker = ROOT / "bench" / "llamacpp_worker.py"
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run(
        [str(PYTHON), str(worker)], input=lines, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
