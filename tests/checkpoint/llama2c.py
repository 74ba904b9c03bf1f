"""llama2.c's legacy files: float32 weights behind seven integers, and a scored vocabulary of byte strings.

Order of the weights: embedding, then per kind and over all layers attention norm, wq, wk, wv, wo, FFN norm,
w1, w2, w3, the last norm, two RoPE tables, and the head if the vocabulary size is negative (else it is the
embedding). wq and wk turn neighbouring channels, as in Meta's files. Source: karpathy/llama2.c, export.py and
run.c.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from herd.checkpoint.names import from_pairs
from herd.llama.config import ModelConfig


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id. Ids 3..258 are bytes spelled ``<0x41>``."""

    pieces: list[bytes]

    def decode(self, ids: list[int]) -> str:
        """Text after the beginning-of-text token, whose following space is not text. Control tokens are left
        out."""
        out = b"".join(
            bytes([int(self.pieces[i][3:5], 16)]) if 3 <= i < 259 else self.pieces[i] for i in ids if i > 2
        )
        return out.decode("utf-8", "replace").removeprefix(" ")


def read_vocabulary(path: Path) -> Vocabulary:
    data = path.read_bytes()
    at, pieces = 4, []  # the first integer is the longest piece's length
    while at < len(data):
        _, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return Vocabulary(pieces)


def read_llama2c(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors by Hugging Face's names."""
    data = bytearray(path.read_bytes())
    dim, ffn_dim, L, n_heads, n_kv_heads, vocab_size, context = struct.unpack_from("<7i", data)
    shape, tied = (abs(vocab_size), dim, L, n_heads, n_kv_heads, ffn_dim), vocab_size > 0
    config = ModelConfig(*shape, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=tied, max_context=context)
    numbers, at = torch.frombuffer(data, dtype=torch.float32, offset=28), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        start, at = at, at + torch.Size(shape).numel()
        return numbers[start:at].view(shape)

    q_rows, kv_rows = n_heads * config.head_dim, n_kv_heads * config.head_dim
    tensors = {"model.embed_tokens.weight": take(config.vocab_size, dim)}
    for part, shape in (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (q_rows, dim)),
        ("self_attn.k_proj", (kv_rows, dim)),
        ("self_attn.v_proj", (kv_rows, dim)),
        ("self_attn.o_proj", (dim, q_rows)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (ffn_dim, dim)),
        ("mlp.down_proj", (dim, ffn_dim)),
        ("mlp.up_proj", (ffn_dim, dim)),
    ):
        for layer, tensor in enumerate(take(L, *shape)):
            name = f"model.layers.{layer}.{part}.weight"
            tensors[name] = from_pairs(name, tensor, config.head_dim)
    tensors["model.norm.weight"] = take(dim)
    take(2, context, config.head_dim // 2)  # cos and sin, computed here instead
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = take(config.vocab_size, dim)
    assert at == len(numbers), "the file is longer than its header says"
    return config, tensors
