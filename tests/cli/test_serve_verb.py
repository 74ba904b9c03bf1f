"""`herd serve` as a process: two models on demand, the names that clients may use, and the end by Ctrl-C."""

import re
import signal
import subprocess
import sys

import httpx
import pytest

from herd.checkpoint import save_model
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.text import Tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small random models."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train(["six times seven is forty-two, over and over"] * 3, 530)
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 48, rope_theta=10_000.0, max_context=512)
    for seed, name in enumerate(("small", "other")):
        save_model(root / name, LlamaLM(config).init_weights(seed, std=0.2), tokenizer)
    return root


def test_two_models_are_loaded_when_they_are_named(folders):
    options = "--port 0 --no-keys --cache-gb 0.01".split()
    command = [sys.executable, "-m", "herd", "serve", folders / "small", folders / "other", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while not (port := re.search(r"127\.0\.0\.1:(\d+)/v1", said)):
            line = server.stderr.readline()
            assert line, said
            said += line
        assert "small: loaded when a request names it" in said
        with httpx.Client(base_url=f"http://127.0.0.1:{port[1]}", timeout=60) as client:

            def answer(model):
                body = {"prompt": "six", "max_tokens": 8, "model": model, "temperature": 0}
                response = client.post("/v1/completions", json=body)
                return response.status_code, response.json().get("model"), response.json().get("choices")

            small, other = answer("small"), answer("other")
            assert (small[:2], other[:2]) == ((200, "small"), (200, "other"))
            assert small[2] != other[2]
            assert answer(str(folders / "small")) == small, "clients may use the name that was typed"
            assert answer("third")[0] == 404
            assert [model["loaded"] for model in client.get("/v1/models").json()["data"]] == [True, True]
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 130)
        log = server.stderr.read()
        assert "Traceback" not in log
        assert re.search(
            r' INFO req_\w+ POST /v1/completions 200 key="local" model="small" completed prompt=', log
        )
        assert "is loaded in" in log
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
