"""stories260K, a real pre-trained Llama in llama2.c's format: converted here, it writes the same stories as
in transformers."""

import pytest
import torch
from llama2c import read_llama2c, read_vocabulary
from transformers import LlamaForCausalLM

import herd.checkpoint as checkpoint
from herd.data.batch import Batch
from herd.engine import Engine, Request, Sampling
from herd.train.heldout import heldout_loss

BOS = 1


@pytest.fixture(scope="module")
def stories(real_data, tmp_path_factory):
    folder = real_data("stories260K")
    config, tensors = read_llama2c(folder / "stories260K.bin")
    out = tmp_path_factory.mktemp("stories") / "stories260K"
    checkpoint.write_checkpoint(out, config, tensors.__getitem__, dtype=torch.float32)
    return out, read_vocabulary(folder / "tok512.bin")


def test_256_greedy_tokens_equal_transformers(stories):
    folder, vocabulary = stories
    model = checkpoint.load_model(folder)
    assert model.config.n_params == 260_032
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = Engine(model, None).run([Request([BOS], Sampling(max_tokens=256))])[0].ids
    prompt = torch.tensor([[BOS]])
    out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=256, do_sample=False)
    assert ids == out[0, 1:].tolist()
    assert len(ids) == 256
    text = vocabulary.decode(ids)
    assert text.startswith("Once upon a time")
    print(text)


@torch.no_grad()
def test_it_has_learnt_english(stories):
    """Half-rotation and all, the weights mean something: a story costs under 1.3 nats a token, its shuffle
    over 5."""
    folder, _ = stories
    model = checkpoint.load_model(folder)
    story = (
        Engine(model, None).run([Request([BOS], Sampling(max_tokens=200, temperature=0.8, seed=3))])[0].ids
    )
    tokens = torch.tensor([[BOS, *story]])
    shuffled = torch.cat((tokens[:, :1], tokens[:, 1:][:, torch.randperm(200)]), 1)
    nats = [heldout_loss(model, [Batch(x[:, :-1], x[:, 1:])]) for x in (tokens, shuffled)]
    assert nats[0] < 1.5
    assert nats[1] > 4
