"""`import herd` is cheap, and its few names are the ones promised."""

import math
import subprocess
import sys

import pytest

import herd


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_herd_does_not_import_torch():
    code = """
import sys, herd
from herd.engine import Request, Sampling
from herd.engine.memory import nbytes
herd.SIZES["405B"].n_params
nbytes(herd.SIZES["8B"], 1, 131072)
print([m for m in ("torch", "numpy", "transformers", "tiktoken") if m in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_the_front_door_lists_the_model_sizes():
    assert herd.SIZES["405B"].n_params == 405_853_388_800


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = herd.nonsense


def test_dir_shows_lazy_names():
    assert {"load", "generate", "Tokenizer", "render", "SIZES"} <= set(dir(herd))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from herd.checkpoint import save_model
    from herd.llama.model import LlamaLM

    config = herd.ModelConfig(600, 32, 2, 4, 2, 48, max_context=300)
    tokenizer = herd.Tokenizer.train(["a quick brown fox " + chr(i) * 3 for i in range(0x4E00, 0x4F00)], 600)
    path = tmp_path_factory.mktemp("front") / "model"
    save_model(path, LlamaLM(config).init_weights(0, std=0.2), tokenizer)
    return path


def test_a_loaded_checkpoint_generates(folder):
    import torch

    model, tokenizer = herd.load(folder)
    text = herd.generate(model, tokenizer, "a quick", max_tokens=12, temperature=0)
    assert text == herd.generate(*herd.load(folder), "a quick", max_tokens=12, temperature=0)
    ids = tokenizer.encode("a quick", bos=True)
    assert model.logits(torch.tensor([ids])).shape == (1, len(ids), 600)
    messages = [{"role": "user", "content": "fox?"}]
    answer = herd.generate(model, tokenizer, messages, max_tokens=12, temperature=0.7, seed=1)
    assert answer == herd.generate(model, tokenizer, messages, max_tokens=12, temperature=0.7, seed=1)
    ids, mask = (lambda r: (r.ids, r.mask))(herd.render(messages, tools=None, tokenizer=tokenizer))
    assert len(ids) == len(mask)


def test_answers_follow_the_settings_of_the_model_as_herd_chat_does(folder, tmp_path):
    """Its own temperature unless another one is given, and no end but the model's and the context's."""
    import json
    import shutil

    own = shutil.copytree(folder, tmp_path / "own")
    settings = {"do_sample": True, "temperature": 5.0, "top_p": 1.0}
    (own / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = herd.load(own)
    assert model.sampling_defaults["temperature"] == 5.0
    drawn = {herd.generate(model, tokenizer, "a quick", max_tokens=12, seed=seed) for seed in range(4)}
    assert len(drawn) == 4
    greedy = herd.generate(model, tokenizer, "a quick", max_tokens=12, temperature=0)
    assert greedy == herd.generate(*herd.load(folder), "a quick", max_tokens=12, temperature=0)
    endless = {"logit_bias": dict.fromkeys(tokenizer.stop_ids, -math.inf)}
    prompts = ["a", [{"role": "user", "content": "fox?"}]]
    continued, answered = herd.generate_many(model, tokenizer, prompts, **endless)
    assert (continued.finish_reason, len(continued.ids)) == ("length", 256)
    assert (answered.finish_reason, len(answered.ids) > 256) == ("context", True)


def test_a_checkpoint_without_a_tokenizer_loads_without_one(folder, tmp_path):
    import shutil

    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.warns(UserWarning, match="no tokenizer"):
        _, tokenizer = herd.load(bare)
    assert tokenizer is None
