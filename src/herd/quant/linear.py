"""Layers that store blocks instead of weights, and models made of them.

`QuantLinear` and `QuantEmbedding` replace `nn.Linear` and `nn.Embedding`. The forward does not change, so a
quantized model can be used like a plain one: in the engine, in evaluation, as a frozen teacher. Its only
parameters are norms and biases. It computes in their dtype (fp32, bf16), which ``model.to`` changes.

Shapes: R rows (outputs, or tokens of the vocabulary), D weights per row, B bytes of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..kernels.fused_layer import FusedLayers
from ..kernels.qmatmul import qmatmul_twice
from ..llama import rope
from ..llama.config import ModelConfig
from ..llama.model import DecoderLayer, LlamaLM, RMSNorm
from ..llama.switched import SwitchedLinear
from . import blocks
from .formats import Format, Scheme
from .matmul import NATIVE, REFERENCE, Kernel, choose_kernel


class QuantLinear(nn.Module):
    """A linear layer whose weight (R, D) is stored in blocks. Its bias (R,), if it has one, is plain."""

    prepared: Tensor
    like: Tensor

    def __init__(
        self,
        blocks_RB: Tensor,
        format: Format,
        dtype: torch.dtype = torch.float32,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.bias = bias
        self.format, self.out_features = format, blocks_RB.shape[0]
        self.in_features = _row_weights(blocks_RB, format)
        self.kernel: Kernel = choose_kernel(format, blocks_RB.device)
        self.register_buffer("prepared", self.kernel.prepare(blocks_RB, format))
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=blocks_RB.device), persistent=False)

    @property
    def blocks(self) -> Tensor:
        """The blocks in the order of a file, (R, B) uint8."""
        return self.kernel.restore(self.prepared, self.format)

    @property
    def weight(self) -> Tensor:
        """The whole weight, (R, D) in the model's dtype. It is unpacked at each access."""
        return blocks.decode(self.blocks, self.format, self.like.dtype)

    def weight_rows(self, start: int, stop: int) -> Tensor:
        """Return some rows of the weight, unpacked.

        ``start`` must be a multiple of 16, and ``stop`` a multiple of 16 or the number of rows, since kernels
        interleave 16 rows.
        """
        rows_RB = self.kernel.restore(self.prepared[start:stop], self.format)
        return blocks.decode(rows_RB, self.format, self.like.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # another device has another kernel, which needs the blocks in another order
        before, blocks_RB = self.prepared.device, self.prepared
        super()._apply(fn, recurse)
        if self.prepared.device != before:
            restored_RB = self.kernel.restore(blocks_RB, self.format).to(self.prepared.device)
            self.kernel = choose_kernel(self.format, self.prepared.device)
            self.prepared = self.kernel.prepare(restored_RB, self.format)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x, (self,))[0]

    def together(self, x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
        """Apply ``layers`` (this is the first) to ``x``, in one call if they share a kernel."""
        alike = [layer for layer in layers if isinstance(layer, QuantLinear) and layer.kernel is self.kernel]
        if len(alike) < len(layers):
            return [layer(x) for layer in layers]
        matrices, formats = [layer.prepared for layer in alike], [layer.format for layer in alike]
        outs = self.kernel.matmul(x.flatten(0, -2), matrices, formats)
        outs = [out_NR.view(*x.shape[:-1], -1) for out_NR in outs]
        return [
            out if layer.bias is None else out + layer.bias for out, layer in zip(outs, alike, strict=True)
        ]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}, {self.kernel.name}"


class QuantHead(QuantLinear):
    """A packed head that rounds its activations to int8, and then the rounding errors to int8 too.

    The head's errors change the logits directly: on SmolLM2 in Q4_1 they cause a quarter of the divergence
    from float activations. The second step is computed as a second token, for which the weights need not be
    read again.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == REFERENCE or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        y_NR = qmatmul_twice(x.flatten(0, -2), self.prepared, self.format.code, self.kernel.name)
        return y_NR.view(*x.shape[:-1], -1)


class QuantEmbedding(nn.Module):
    """An embedding whose table (R, D) is stored in blocks. Only the rows that are looked up are unpacked."""

    blocks: Tensor
    like: Tensor

    def __init__(self, blocks_RB: Tensor, format: Format, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.format, self.num_embeddings = format, blocks_RB.shape[0]
        self.embedding_dim = _row_weights(blocks_RB, format)
        self.register_buffer("blocks", blocks_RB)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=blocks_RB.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole table, (R, D) in the model's dtype. It is unpacked at each access."""
        return blocks.decode(self.blocks, self.format, self.like.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        rows = blocks.decode(self.blocks[ids.flatten()], self.format, self.like.dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.name}"


def swap_linears(model: LlamaLM, scheme: Scheme) -> LlamaLM:
    """Quantize a model in place, one matrix at a time, and return it. Norms are unchanged.

    Raises `QuantError`, with the model unchanged, if rows have an incomplete block or weights are not finite.
    """
    tied, dtype = model.config.tie_embeddings, model.dtype
    plan = scheme.plan(model.config)
    for name, _ in model.config.param_shapes():
        weight = model.get_parameter(name)
        if weight.ndim > 1 and not bool(torch.isfinite(weight).all()):
            raise QuantError(f"{name}: has values that are not finite; the checkpoint is damaged")
    for name, format in plan.items():
        if format.packed:
            place_blocks(
                model, name, blocks.encode(model.get_parameter(name).detach(), format, name), format, dtype
            )
    if tied:
        tie_head(model)
    return model


def assemble_model(
    config: ModelConfig,
    formats: Mapping[str, Format],
    rows_of: Callable[[str], Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> LlamaLM:
    """Build a model from bytes: ``rows_of(name)`` returns a parameter's (R, B) uint8, once for each.

    Packed weights stay packed, and the others become parameters in ``dtype``. Embedding and head come first:
    while a parameter is made, it is in memory twice, so the largest ones are made while memory is empty.
    """
    model = LlamaLM.on_meta(config)
    for name, shape in sorted(config.param_shapes(), key=lambda named: named[1][0] != config.vocab_size):
        rows_RB = rows_of(name).to(device)
        if formats[name].packed:
            place_blocks(model, name, rows_RB, formats[name], dtype)
        else:
            parent, _, leaf = name.rpartition(".")
            weight = blocks.decode(rows_RB, formats[name], dtype).view(shape)
            setattr(model.get_submodule(parent), leaf, nn.Parameter(weight))
    if config.tie_embeddings:
        tie_head(model)
    model.model.inv_freq = rope.inverse_frequencies(config).to(device)
    return model


def place_blocks(model: LlamaLM, name: str, blocks_RB: Tensor, format: Format, dtype: torch.dtype) -> None:
    """Replace the layer of the parameter ``name`` by a layer with ``blocks_RB``."""
    module = name.removesuffix(".weight")
    parent, _, leaf = module.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf == "embed_tokens":
        setattr(owner, leaf, QuantEmbedding(blocks_RB, format, dtype))
    else:
        layer = QuantHead if leaf == "lm_head" else QuantLinear
        setattr(owner, leaf, layer(blocks_RB, format, dtype, getattr(owner, leaf).bias))


def tie_head(model: LlamaLM) -> None:
    """Make the head from the embedding's blocks, or from its weight if that is plain."""
    embedding = model.model.embed_tokens
    if isinstance(embedding, QuantEmbedding):
        head = QuantHead(embedding.blocks, embedding.format, embedding.like.dtype)
        model.lm_head = head  # type: ignore[assignment]
    else:
        model.lm_head.weight = embedding.weight


def is_quantized(model: nn.Module) -> bool:
    """Return whether any of a model's weights are stored in blocks."""
    return any(isinstance(module, QuantLinear | QuantEmbedding) for module in model.modules())


def use_exact_products(model: nn.Module) -> None:
    """Let packed layers multiply by unpacked weights, without rounding activations, as training needs.

    Their blocks remain packed. Each product unpacks a tile of the weights, in forward and again in backward.
    """
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and layer.kernel is not REFERENCE:
            layer.prepared, layer.kernel = layer.blocks, REFERENCE


def packed_weights(model: LlamaLM) -> Iterator[tuple[str, Format, Tensor]]:
    """Yield the name, format and blocks (R, B) of every weight stored in blocks, without a tied head."""
    for name, module in model.named_modules():
        again = name == "lm_head" and model.config.tie_embeddings
        if isinstance(module, QuantLinear | QuantEmbedding) and not again:
            yield f"{name}.weight", module.format, module.blocks


def fused_layers(model: LlamaLM) -> FusedLayers | None:
    """Return the model's layers as one native operator.

    Returns None unless all linear layers are stored in blocks, have the same CPU kernel and no bias.
    Adapters of `llama.switched` are left out.
    """
    norms: list[RMSNorm] = []
    linears: list[nn.Module] = []
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        attention, mlp = layer.self_attn, layer.mlp
        norms += layer.input_layernorm, layer.post_attention_layernorm
        linears += attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        linears += mlp.gate_proj, mlp.up_proj, mlp.down_proj
    linears = [linear.base if isinstance(linear, SwitchedLinear) else linear for linear in linears]
    packed = [linear for linear in linears if isinstance(linear, QuantLinear) and linear.bias is None]
    kernels = {linear.kernel for linear in packed}
    if len(packed) < len(linears) or len(kernels) > 1 or not kernels.issubset(NATIVE.values()):
        return None
    fused = FusedLayers(
        norms=[norm.weight for norm in norms],
        tiles=[linear.prepared for linear in packed],
        format_codes=[linear.format.code for linear in packed],
        path=packed[0].kernel.name,
        eps=norms[0].eps,
        head_dim=model.config.head_dim,
    )
    return fused if fused.native else None


def _row_weights(blocks_RB: Tensor, format: Format) -> int:
    if blocks_RB.ndim != 2 or blocks_RB.dtype != torch.uint8 or blocks_RB.shape[1] % format.block_bytes:
        raise QuantError(
            f"{format.name} blocks of shape {list(blocks_RB.shape)} and {blocks_RB.dtype} are malformed"
        )
    return blocks_RB.shape[1] // format.block_bytes * format.block
