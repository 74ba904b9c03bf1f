"""A GGUF adapter in llama.cpp computes the same as the adapter here."""

from random import Random

import numpy as np
import pytest
import torch
from llamacpp import ask_llama_cpp

from herd import checkpoint
from herd.checkpoint.adapters import export_gguf_adapter
from herd.engine import Engine, Request, Sampling
from herd.llama.config import ModelConfig
from herd.llama.lora import add_lora, lora_layers
from herd.llama.model import LlamaLM
from herd.text import Tokenizer


@pytest.mark.soak
def test_llama_cpp_gives_the_same_logits_and_greedy_tokens(tmp_path):
    text = "the cat and the dog see the river and the house by the old stone bridge"
    rng = Random(0)
    words = " ".join(rng.choice(text.split()) for _ in range(3000))
    tokenizer = Tokenizer.train([words], 530)
    config = ModelConfig(tokenizer.vocab_size, 64, 3, 4, 2, 128, max_context=256)
    model = LlamaLM(config).init_weights(0, std=0.1)
    checkpoint.save_model(tmp_path / "base", model, tokenizer)
    checkpoint.export_gguf(tmp_path / "base", tmp_path / "base.gguf", "F32")
    add_lora(model, 8, 2.0)
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1)
    export_gguf_adapter(tmp_path / "adapter.gguf", model, "test")
    prompt = tokenizer.encode(text)[:24]
    job = {"do": "run", "file": str(tmp_path / "base.gguf"), "prompt": prompt, "n": 64}
    tuned, plain = ask_llama_cpp([
        job | {"out": str(tmp_path / "tuned.npy"), "lora": str(tmp_path / "adapter.gguf")},
        job | {"out": str(tmp_path / "plain.npy")},
    ])  # fmt: skip
    with torch.no_grad():
        ours = model.logits(torch.tensor([prompt]))[0]
        before = checkpoint.load_model(tmp_path / "base").logits(torch.tensor([prompt]))[0]
    theirs, theirs_before = (torch.tensor(np.load(tmp_path / f"{name}.npy")) for name in ("tuned", "plain"))
    torch.testing.assert_close(theirs[:, : ours.shape[1]], ours, atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs_before[:, : ours.shape[1]], before, atol=1e-4, rtol=0)
    assert not torch.allclose(ours, before, atol=0.1)
    done = Engine(model, None).run([Request(prompt, Sampling(max_tokens=64))])[0]
    assert done.ids == tuned["ids"]
    assert done.ids != plain["ids"]
