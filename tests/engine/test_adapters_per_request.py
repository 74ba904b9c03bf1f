"""Several adapters on one base: each request's answer is that of the model with its adapter merged."""

import pytest
import torch

from herd.engine import Engine, Request, Sampling
from herd.errors import ConfigError, EngineError
from herd.llama.config import ModelConfig
from herd.llama.lora import add_lora, lora_layers, merged_parameter
from herd.llama.model import LlamaLM
from herd.llama.switched import switch_adapters

CONFIG = ModelConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_context=128)
PROMPTS = [[5, 6, 7, 8, 9] * 8, [5, 6, 7, 8, 9] * 8 + [3], [40, 41]]


def base() -> LlamaLM:
    return LlamaLM(CONFIG).init_weights(0, std=0.15)


def adapter(seed: int, rank: int):
    """An adapter as it is read from disk, and the model with it merged."""
    model = add_lora(base(), rank, 2.0, seed=seed)
    torch.manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.3)
    updates = {
        name: (layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
        for name, layer in lora_layers(model).items()
    }
    merged = base()
    for name, _ in CONFIG.param_shapes():
        merged.get_parameter(name).data = merged_parameter(model, name)
    return updates, merged


def answers(model: LlamaLM, requests: list[Request]) -> list[list[int]]:
    return [done.ids for done in Engine(model, None).run(requests)]


def request(prompt: list[int], name: str = "") -> Request:
    return Request(prompt, Sampling(max_tokens=12), adapter=name)


def test_answers_in_one_batch_equal_those_of_the_merged_models():
    made = {name: adapter(seed, rank) for name, seed, rank in (("one", 1, 2), ("two", 2, 4), ("three", 3, 3))}
    model = base()
    switch_adapters(model, {name: updates for name, (updates, _) in made.items()})
    names = ["", "one", "two", "three"]
    mixed = [request(prompt, name) for prompt in PROMPTS for name in names]
    found = answers(model, mixed)
    models = {"": base()} | {name: merged for name, (_, merged) in made.items()}
    expected = [answers(models[name], [request(prompt)])[0] for prompt in PROMPTS for name in names]
    assert found == expected
    assert len({tuple(ids) for ids in found[:4]}) == 4


def test_equal_prompts_share_pages_with_their_own_adapter_only():
    updates, _ = adapter(1, 2)
    model = base()
    switch_adapters(model, {"one": updates})
    engine = Engine(model, None)
    first = engine.run([request(PROMPTS[0] * 2)])[0]
    with_adapter = engine.run([request(PROMPTS[0] * 2, "one")])[0]
    again = engine.run([request(PROMPTS[0] * 2, "one")])[0]
    assert first.shared_tokens == with_adapter.shared_tokens == 0
    assert again.shared_tokens > 0
    assert again.ids == with_adapter.ids != first.ids


def test_unknown_names_and_other_sizes_are_refused():
    updates, _ = adapter(1, 2)
    model = base()
    switch_adapters(model, {"one": updates})
    with pytest.raises(EngineError, match="adapter 'two' is not one of one"):
        Engine(model, None).run([request(PROMPTS[2], "two")])
    with pytest.raises(EngineError, match="this engine has no adapters"):
        Engine(base(), None).run([request(PROMPTS[2], "one")])
    with pytest.raises(ConfigError, match="another base model"):
        switch_adapters(LlamaLM(CONFIG.replace(ffn_dim=64)), {"one": updates})
