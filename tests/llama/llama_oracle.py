"""Random models with large weights, the same models in transformers, and a minimal KV cache."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from herd.checkpoint.hf import config_to_hf
from herd.llama.attention import sdpa
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM


def random_model(config: ModelConfig, seed: int = 0) -> LlamaLM:
    """Return a model with weights so large that logits differ by a few nats and attention is not uniform."""
    model = LlamaLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(".bias"):
                param.copy_(torch.randn(param.shape, generator=generator))
            elif param.ndim == 1:
                param.copy_(torch.rand(param.shape, generator=generator) + 0.5)
            else:
                scale = {"embed": 1.0, "head": 3.0, "q_pro": 2.0, "k_pro": 2.0}
                gain = next((gain for part, gain in scale.items() if part in name), 1.0)
                fan_in = 1 if "embed" in name and not config.tie_embeddings else param.shape[1]
                param.copy_(torch.randn(param.shape, generator=generator) * gain / fan_in**0.5)
    return model.eval()


def in_transformers(model: LlamaLM, attention: str = "sdpa") -> LlamaForCausalLM:
    """Return the same weights in transformers' Llama, made through its own config class."""
    config = LlamaConfig(**config_to_hf(model.config, dtype="float32"))
    config._attn_implementation = attention
    reference = LlamaForCausalLM(config)
    state = model.state_dict() | (
        {"lm_head.weight": model.lm_head.weight} if model.config.tie_embeddings else {}
    )
    reference.load_state_dict(state, strict=True)
    return reference.eval()


class TinyCache:
    """A minimal KV cache: keys and values of all tokens so far, with one length for all rows."""

    def __init__(self, n_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * n_layers
        self.values: list[Tensor | None] = [None] * n_layers

    def attend(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        old_k, old_v = self.keys[layer], self.values[layer]
        k_BSGK = k_BTGK if old_k is None else torch.cat((old_k, k_BTGK), dim=1)
        v_BSGK = v_BTGK if old_v is None else torch.cat((old_v, v_BTGK), dim=1)
        self.keys[layer], self.values[layer] = k_BSGK, v_BSGK
        T, S = q_BTHK.shape[1], k_BSGK.shape[1]
        mask_TS = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        return sdpa(q_BTHK, k_BSGK, v_BSGK, mask=mask_TS)


@torch.no_grad()
def greedy(model: LlamaLM, prompt: list[int], n: int) -> list[int]:
    """Return the ``n`` greedy tokens after ``prompt``, decoded with the cache."""
    cache = TinyCache(model.config.n_layers)
    out: list[int] = []
    step, position = prompt, 0
    for _ in range(n):
        positions_1T = torch.arange(position, position + len(step))[None]
        logits_V = model.logits(torch.tensor([step]), positions_1T, cache.attend)[0, -1]
        position += len(step)
        out.append(int(logits_V.argmax()))
        step = out[-1:]
    return out
