"""A toy teacher with its texts, and a whole run that shrank it."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_shrink import settings, words

from herd.checkpoint import Lineage, save_model
from herd.data.shards import Shards
from herd.data.stream import TokenStream
from herd.distill.shrink import Shrinker
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.text import Tokenizer
from herd.train import TrainConfig, lm, train


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A teacher that knows which words follow a space, its text, and held-out text."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "train.txt").write_text(words(0, 1500))
    (folder / "heldout.txt").write_text(words(1, 400))
    tokenizer = Tokenizer.train([words(0, 1500)], 512 + 60)
    config = ModelConfig(
        tokenizer.vocab_size, 32, 4, 4, 2, 64, head_dim=8, max_context=1024, tie_embeddings=True
    )
    model = LlamaLM(config).init_weights(0, std=0.1)
    shards = Shards.write(folder / "shards", [words(0, 1500)], tokenizer)
    learn = TrainConfig(steps=80, batch_size=16, context=32, optimizer={"lr": 1e-2})  # type: ignore[arg-type]
    train(model, TokenStream(shards, 32, 0), lm, learn, folder / "teacher-run")
    lineage = Lineage(name="Llama-toy", stage="base", licence="Llama 3.1 Community License")
    save_model(folder / "teacher", model, tokenizer, lineage=lineage)
    return folder


@pytest.fixture(scope="session")
def done(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    lines: list[str] = []
    shrinker = Shrinker(out, settings(toy, vocab=(572, 540)), lines.append)
    return out, shrinker.run(), lines, shrinker
