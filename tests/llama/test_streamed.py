"""A model that is run one layer at a time computes what the whole model does, and never has all its weights."""

import pytest
import torch

from herd.llama.config import ModelConfig
from herd.llama.lora import add_lora, lora_layers, merged_parameter
from herd.llama.model import LlamaLM
from herd.llama.streamed import StreamedModel

CONFIG = ModelConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_context=64)


@pytest.mark.parametrize("tied", [False, True])
def test_the_states_are_those_of_the_whole_model_and_few_weights_are_loaded(tied):
    config = CONFIG.replace(tie_embeddings=tied, n_layers=4)
    whole = LlamaLM(config).init_weights(0).requires_grad_(False)
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        loaded = [each for each in streamed.model.parameters() if not each.is_meta]
        most = max(most, sum(each.numel() for each in loaded))
        return whole.get_parameter(name)

    streamed = StreamedModel(LlamaLM.on_meta(config), read)
    batches = [torch.arange(12).view(2, 6), torch.arange(9)[None]]
    for ids_BT, states_BTD in zip(batches, streamed.hidden(batches), strict=True):
        torch.testing.assert_close(states_BTD, whole(ids_BT), atol=1e-6, rtol=0)
    with streamed.loaded(["lm_head.weight"]) as model:
        torch.testing.assert_close(model.lm_head.weight, whole.lm_head.weight)
    assert most < config.n_params / 3
    assert all(each.is_meta for each in streamed.model.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_applied_and_merged(dora):
    whole = LlamaLM(CONFIG).init_weights(0)
    weights = {name: whole.get_parameter(name).detach() for name, _ in CONFIG.param_shapes()}
    add_lora(whole, 4, 2.0, dora=dora)
    adapted = add_lora(LlamaLM.on_meta(CONFIG), 4, 2.0)
    torch.manual_seed(0)
    for name, layer in lora_layers(whole).items():
        with torch.no_grad():
            layer.lora_B.normal_(std=0.3)
        target = adapted.get_submodule(name)
        target.lora_A, target.lora_B, target.lora_magnitude = layer.lora_A, layer.lora_B, layer.lora_magnitude
    streamed = StreamedModel(adapted, weights.__getitem__)
    ids_BT = torch.arange(10)[None]
    torch.testing.assert_close(streamed.hidden([ids_BT])[0], whole(ids_BT), atol=1e-5, rtol=0)
    for name in weights:
        torch.testing.assert_close(streamed.merged(name), merged_parameter(whole, name), atol=1e-6, rtol=0)
