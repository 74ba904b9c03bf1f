"""Packed layers compute the same as their unpacked weights."""

import copy

import pytest
import torch

from herd.engine.engine import Engine
from herd.engine.request import Request, Sampling
from herd.errors import QuantError
from herd.kernels import loss as losses
from herd.kernels import qmatmul
from herd.quant import FORMATS, blocks, matmul, scheme
from herd.quant import linear as layers
from herd.quant.linear import (
    QuantEmbedding,
    QuantHead,
    QuantLinear,
    is_quantized,
    packed_weights,
    swap_linears,
)

PACKED = list(FORMATS.values())
PATHS = [name for name in qmatmul.PATHS if name in qmatmul.here()]


@pytest.fixture
def reference(monkeypatch):
    """Make layers use the reference kernel, which does not round activations."""
    monkeypatch.setattr(layers, "choose_kernel", lambda *_: matmul.REFERENCE)


def rounded(x):
    codes, scales = qmatmul.round_activations(x)
    return (codes.double().unflatten(-1, (-1, 32)) * scales.double()[..., None]).flatten(-2)


def unpacked(model):
    """Return the plain model with the unpacked weights of the blocks."""
    out = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            plain = (
                torch.nn.Embedding(1, 1)
                if isinstance(module, QuantEmbedding)
                else torch.nn.Linear(1, 1, bias=False)
            )
            plain.weight = torch.nn.Parameter(module.weight)
            parent, _, leaf = name.rpartition(".")
            setattr(out.get_submodule(parent), leaf, plain)
    return out


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("format", PACKED, ids=str)
def test_a_packed_linear_layer_computes_like_its_unpacked_weight(format):
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(70, 256, generator=torch.Generator().manual_seed(2))
    layer = QuantLinear(blocks.encode(weight, format), format)
    exact = x.double() @ layer.weight.double().T
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    assert (layer.in_features, layer.out_features) == (256, 70)


@pytest.mark.parametrize("format", PACKED, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_native_kernels_compute_like_the_reference(format, path, monkeypatch):
    """Any leading shape works, blocks are restored, and gradients are those of the unpacked weights."""
    monkeypatch.setenv("HERD_ISA", path)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rows_RB = blocks.encode(torch.randn(70, 256, generator=torch.Generator().manual_seed(2)), format)
    layer = QuantLinear(rows_RB, format)
    assert layer.kernel.name == path
    assert torch.equal(layer.blocks, rows_RB)
    exact = rounded(x.detach()) @ layer.weight.double().T
    out = layer(x)
    assert (out.double() - exact).norm() < 1e-6 * exact.norm()
    dy = torch.randn(2, 5, 70)
    out.backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.weight)
    with torch.no_grad():
        assert torch.equal(layer(x), out)


def test_an_unknown_kernel_name_is_refused(monkeypatch):
    monkeypatch.setenv("HERD_ISA", "avx1024")
    with pytest.raises(
        QuantError, match="HERD_ISA=avx1024: choose vnni, avx512, avxvnni, avx2, portable, reference"
    ):
        matmul.choose_kernel(FORMATS["Q4_0"], torch.device("cpu"))
    monkeypatch.setenv("HERD_ISA", "reference")
    assert matmul.choose_kernel(FORMATS["Q4_0"], torch.device("cpu")) is matmul.REFERENCE


def test_devices_without_a_kernel_use_the_reference(monkeypatch):
    assert matmul.choose_kernel(FORMATS["Q4_0"], torch.device("meta")) is matmul.REFERENCE
    monkeypatch.setattr(qmatmul, "here", tuple)
    assert matmul.choose_kernel(FORMATS["Q4_0"], torch.device("cpu")) is matmul.REFERENCE


@pytest.mark.usefixtures("reference")
def test_tiles_of_rows_give_the_same_result(monkeypatch):
    layer = QuantLinear(blocks.encode(torch.randn(70, 64), FORMATS["Q4_0"]), FORMATS["Q4_0"])
    x = torch.randn(3, 64)
    whole = layer(x)
    monkeypatch.setattr(matmul, "TILE", 640)
    torch.testing.assert_close(layer(x), whole)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", PACKED, ids=str)
def test_a_quantized_model_computes_like_its_unpacked_weights(make_model, format, tied):
    model = swap_linears(make_model(tie_embeddings=tied), scheme(format))
    assert is_quantized(model)
    assert all(param.ndim == 1 for param in model.parameters())
    tokens_BT = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model.logits(tokens_BT), unpacked(model).logits(tokens_BT), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_rounded_activations_change_a_model_little(make_model, format):
    """Eight bits for activations cost about what eight bits for weights cost, some percent of these wild
    logits."""
    model = swap_linears(make_model(), scheme(format))
    tokens_BT = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    exact = unpacked(model).logits(tokens_BT)
    assert (model.logits(tokens_BT) - exact).norm() < 0.05 * exact.norm()


def test_the_default_scheme_gives_the_head_eight_bits(make_model):
    formats = {
        name: format.name for name, format, _ in packed_weights(swap_linears(make_model(), scheme("q4k")))
    }
    assert formats["lm_head.weight"] == "Q8_0"
    assert {format for name, format in formats.items() if name != "lm_head.weight"} == {"Q4_K"}
    tied = swap_linears(make_model(tie_embeddings=True), scheme("q4"))
    assert {name: f.name for name, f, _ in packed_weights(tied)}["model.embed_tokens.weight"] == "Q8_0"


def test_parts_can_stay_plain(make_model):
    model = make_model()
    embedding = model.model.embed_tokens.weight.clone()
    swap_linears(model, scheme("q4", embeddings="f32", head="f16"))
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_a_model_takes_the_bytes_its_scheme_predicts(make_model):
    for name in ("q8", "q4", "q4k", "q6k"):
        for tied in (False, True):
            model = swap_linears(make_model(tie_embeddings=tied), scheme(name))
            held = sum(b.numel() for _, _, b in packed_weights(model)) + 4 * sum(
                p.numel() for p in model.parameters()
            )
            assert held == scheme(name).nbytes(model.config)


@pytest.mark.usefixtures("reference")
def test_a_quantized_model_runs_in_the_engine(make_model):
    """Alone or in a batch, the tokens are those of the unpacked model, also in bf16."""
    model = swap_linears(make_model(), scheme("q4"))
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11], [5]]
    requests = [Request(prompt, Sampling(max_tokens=12, temperature=0)) for prompt in prompts]
    ids = [c.ids for c in Engine(model, None).run(requests)]
    assert ids == [c.ids for c in Engine(unpacked(model), None).run(requests)]
    assert ids == [Engine(model, None).run([request])[0].ids for request in requests]
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.logits(torch.tensor([[1, 2]])).isfinite().all()
    assert len(Engine(half, None).run(requests)[0].ids) == 12


def test_losses_unpack_a_quantized_head_a_few_rows_at_a_time(make_model, monkeypatch):
    student, teacher = make_model(seed=1), swap_linears(make_model(), scheme("q8"))
    monkeypatch.setattr(losses, "TILE", 64 * student.config.dim)
    head = teacher.lm_head
    whole = torch.cat(
        [head.weight_rows(v, min(v + 64, head.out_features)) for v in range(0, head.out_features, 64)]
    )
    assert torch.equal(whole, head.weight)
    tokens_N = torch.randint(300, (18,))
    hidden_ND = torch.randn(18, student.config.dim, requires_grad=True)
    arguments = (student.lm_head.weight, tokens_N, hidden_ND.detach())
    packed = losses.linear_distil(hidden_ND, *arguments, losses.weight_of(head))
    plain = losses.linear_distil(hidden_ND, *arguments, head.weight)
    torch.testing.assert_close(packed, plain)


def test_gradients_reach_the_input(make_model):
    layer = QuantLinear(blocks.encode(torch.randn(8, 64), FORMATS["Q8_0"]), FORMATS["Q8_0"])
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))


def test_a_refused_model_is_unchanged(make_model):
    model = make_model(ffn_dim=320)
    with pytest.raises(QuantError, match=r"down_proj\.weight: rows of 320 .* these fit: Q8_0, Q4_0, .*F16"):
        swap_linears(model, scheme("q4k"))
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(QuantError, match=r"lm_head\.weight: has values that are not finite"):
        swap_linears(model, scheme("q4"))
    assert not is_quantized(model)


def test_malformed_blocks_are_refused():
    with pytest.raises(QuantError, match="Q4_0 blocks of shape"):
        QuantLinear(torch.zeros(4, 35, dtype=torch.uint8), FORMATS["Q4_0"])


def test_a_packed_head_is_nearer_to_float_than_a_packed_layer():
    rows_RB = blocks.encode(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), FORMATS["Q8_0"])
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(2))
    truth = x @ blocks.decode(rows_RB, FORMATS["Q8_0"]).T
    layer, head = QuantLinear(rows_RB, FORMATS["Q8_0"]), QuantHead(rows_RB, FORMATS["Q8_0"])
    assert head(x).shape == truth.shape
    if layer.kernel is matmul.REFERENCE:
        pytest.skip("activations are not rounded without native kernels")
    assert (head(x) - truth).norm() < 0.02 * (layer(x) - truth).norm()
    assert torch.equal(head(x[:1, 2:3]), head(x)[:1, 2:3])  # the same bits in any batch
