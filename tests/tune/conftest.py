import json
from random import Random

import pytest

from herd import checkpoint
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM
from herd.text import Tokenizer

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "tree", "house", "river", "stone"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny chat model whose vocabulary is Llama 3's kind."""
    folder = tmp_path_factory.mktemp("base") / "model"
    rng = Random(0)
    text = " ".join(rng.choice(WORDS) for _ in range(4000))
    tokenizer = Tokenizer.train([f"What is {text}? It is {text}."], 540)
    config = ModelConfig(tokenizer.vocab_size, 64, 2, 4, 2, 96, max_context=512)
    checkpoint.save_model(folder, LlamaLM(config).init_weights(0, std=0.05), tokenizer)
    return folder


@pytest.fixture
def dialogs(tmp_path):
    """A file of 40 dialogs, three of whose lines cannot be used (12, 20 and 31)."""
    rng = Random(1)
    rows: list[str] = []
    for _ in range(40):
        a, b = rng.choice(WORDS), rng.choice(WORDS)
        messages = [
            {"role": "user", "content": f"What is {a}?"},
            {"role": "assistant", "content": f"It is {b}."},
        ]
        rows.append(json.dumps({"messages": messages}))
    rows[11] = "{broken"
    rows[19] = json.dumps({"messages": [{"role": "user", "content": "no answer"}]})
    rows[30] = json.dumps({"prompt": "alone"})
    file = tmp_path / "dialogs.jsonl"
    file.write_text("".join(row + "\n" for row in rows))
    return file
