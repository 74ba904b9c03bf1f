"""Small models to chat with, and `herd chat` with scripted answers."""

import io
import json
import sys

import pytest

import herd.cli as cli
from herd.checkpoint import Lineage, save_model
from herd.data.dialogs import make_dialogs
from herd.engine import Completion, Delta, Engine
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([d.messages[-1]["content"] for d in make_dialogs(200, 0, languages=("en",))], 640)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer):
    """Return a folder of small random models of every kind of lineage."""
    root = tmp_path_factory.mktemp("run")
    config = ModelConfig(640, 32, 2, 4, 2, 48, rope_theta=10_000.0, max_context=512)
    model = LlamaLM(config).init_weights(0, std=0.2)
    for stage in ("teacher", "instruct", "imported"):
        save_model(root / stage, model, tokenizer, lineage=Lineage(name=f"demo-{stage}", stage=stage))
    save_model(root / "plain", model, tokenizer)
    save_model(root / "mute", model)
    scores = [{"model": "instruct", "name": "tool_use", "value": 0.875, "n": 400}]
    (root / "scores.json").write_text(json.dumps(scores))
    return root


@pytest.fixture
def chat(monkeypatch, capsys, tmp_path):
    """Run `herd chat` and return its exit code, stdout and stderr. ``lines`` are typed in a terminal."""

    monkeypatch.setattr("herd.cli.chat_store.cache_folder", lambda: tmp_path / "cache")

    def go(*args, stdin=None, lines=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        if lines is not None:
            left = iter(lines)

            def read(prompt=""):
                line = next(left, EOFError)
                if isinstance(line, type):
                    raise line
                return line

            monkeypatch.setattr("builtins.input", read)
            monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
            monkeypatch.setenv("COLUMNS", "300")
        code = cli.run(["chat", *map(str, args)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return go


@pytest.fixture
def scripted(monkeypatch):
    """Replace decoding by the given answers, in turn. Returns the list of the prompts."""

    def install(*answers):
        left, prompts = iter(answers), []

        class Scripted:
            def __init__(self, answer):
                text, self.reason = answer if isinstance(answer, tuple) else (answer, "stop")
                self.pieces = [text[i : i + 7] for i in range(0, len(text), 7)]

            def __iter__(self):
                for piece in self.pieces:
                    yield Delta(piece, (1,))
                if isinstance(self.reason, type):
                    raise self.reason
                yield Delta("", (), self.reason)

            def cancel(self):
                pass

        def submit(self, request):
            prompts.append(self.tokenizer.decode(request.prompt_ids))
            return Scripted(next(left))

        monkeypatch.setattr(Engine, "submit", submit)
        monkeypatch.setattr(Engine, "run", lambda self, rs: [Completion([], "no", "stop") for _ in rs])
        return prompts

    return install
