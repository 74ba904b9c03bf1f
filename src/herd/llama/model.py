"""The Llama 3.1 model in PyTorch.

Pre-norm transformer with RMSNorm, grouped-query attention, rotary positions and SwiGLU. Parameter names are
Hugging Face's, unfused, so a checkpoint needs no translation. The caller supplies the attention function (see
`attention.py`), so the same code trains on packed documents, decodes from a paged cache and is traced by
torch.compile. Quantized decoding runs the same layers as one native operator (`kernels/fused_layer.py`), with
the same bits.

Shapes: B batch, T time, D model dim, H query heads, G KV heads, K head dim, F ffn dim, V vocab, N = B·T.
Source: "The Llama 3 Herd of Models", section 3.2; Meta's reference `models/llama3/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..kernels.pointwise import rms_norm, swiglu
from ..kernels.recompute import cheaply
from . import rope
from .attention import Attend, causal
from .config import ModelConfig
from .fill import fill_normal


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): computed in fp32, cast back, then scaled."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Apply several linear layers to the same input, together if the first one can (see `quant.linear`)."""
    together = getattr(layers[0], "together", None)
    return [layer(x) for layer in layers] if together is None else together(x, layers)


class Attention(nn.Module):
    """Grouped-query attention. It rotates q and k, then calls ``attend``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, K = config.dim, config.head_dim
        self.layer, self.head_dim = layer, K
        self.q_proj = nn.Linear(D, config.n_heads * K, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, config.n_kv_heads * K, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, config.n_kv_heads * K, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.n_heads * K, D, bias=config.attention_bias)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x_BTD.shape
        heads = project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BTHK, k_BTGK, v_BTGK = (x.view(B, T, -1, self.head_dim) for x in heads)
        q_BTHK, k_BTGK = rope.rotate(q_BTHK, cos, sin), rope.rotate(k_BTGK, cos, sin)
        return self.o_proj(attend(self.layer, q_BTHK, k_BTGK, v_BTGK).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate x) * up x) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(swiglu(*project(x_BTD, self.gate_proj, self.up_proj)))


class DecoderLayer(nn.Module):
    """A decoder layer: h = x + attn(norm(x)); out = h + mlp(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos, sin, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Llama(nn.Module):
    """The model without its head: from token ids to final hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # on the meta device nothing is drawn, since torch would import its compiler, which takes 0.8 s
        shape = (config.vocab_size, config.dim)
        drawn = torch.empty(shape) if torch.empty(0).is_meta else None
        self.embed_tokens = nn.Embedding(*shape, _weight=drawn)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", rope.inverse_frequencies(config), persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # only the device may change: .to(bfloat16) would round the rotation speeds, .to_empty() would lose
        # them
        super()._apply(fn, recurse)
        self.inv_freq = rope.inverse_frequencies(self.config).to(self.inv_freq.device)
        return self

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend = causal
    ) -> Tensor:
        """Return the hidden states (B, T, D) after the last norm.

        ``positions_BT`` are int64 positions for RoPE (default: 0..T-1 in every row).
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        x_BTD = self.embed_tokens(tokens_BT)
        cos, sin = rope.rotation(self.inv_freq, positions_BT, x_BTD.dtype, self.config.rope_scaling)
        with cheaply():
            for layer in self.layers:
                x_BTD = layer(x_BTD, cos, sin, attend)
        return self.norm(x_BTD)


class LlamaLM(nn.Module):
    """A Llama with its language-model head. ``config.tie_embeddings`` shares the head with the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.sampling_defaults: Mapping[str, float] = {}
        """Settings of answers that the model's makers recommend, by the names of `engine.Sampling`."""
        self.model = Llama(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def on_meta(cls, config: ModelConfig) -> LlamaLM:
        """Return a model whose parameters have shapes and no values, to be given some."""
        with torch.device("meta"):
            return cls(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of the norms, which are never quantized."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.norm.weight.device

    def init_weights(self, seed: int, std: float = 0.02) -> LlamaLM:
        """Draw normal weights of deviation ``std`` and return self.

        Projections that write to the residual stream are scaled by 1 / sqrt(2 · layers). Biases are zero. The
        result depends only on ``seed`` and the parameter's index in the model, not on the device or the
        number of ranks: under FSDP2 each rank draws only its own rows.
        """
        residual_std = std / (2 * self.config.n_layers) ** 0.5
        with torch.no_grad():
            for i, (name, param) in enumerate(self.named_parameters()):
                if param.ndim == 1:
                    param.fill_(0.0 if name.endswith(".bias") else 1.0)
                    continue
                scale = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else std
                fill_normal(param, seed * 1_000_003 + i, scale)
        return self

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend = causal
    ) -> Tensor:
        """Return the final hidden states (B, T, D)."""
        return self.model(tokens_BT, positions_BT, attend)

    def logits(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend = causal
    ) -> Tensor:
        """Return the logits of the next token, (B, T, V) fp32. Training never allocates this tensor."""
        return self.lm_head(self.model(tokens_BT, positions_BT, attend)).float()
