"""GPTQ compared with its definition in float64, and with rounding to the nearest points."""

import pytest
import torch

from herd.errors import QuantError
from herd.quant import FORMATS, blocks, gptq, scheme
from herd.quant.linear import place_blocks, swap_linears, tie_head

PACKED = list(FORMATS.values())


def inputs(n=600, width=256, seed=0) -> torch.Tensor:
    """Return correlated inputs of very different sizes, like hidden states."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * 0.2 + torch.eye(width)
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    return torch.randn(n, width, generator=generator) @ mix * sizes


def loss(weight, packed, format, x) -> float:
    return float(((blocks.decode(packed, format) - weight) @ x.T).square().mean())


def textbook(weight, moments, format):
    """Algorithm 1, one column at a time, with the whole inverse in float64: OBS updates, no blocking, no
    Cholesky."""
    grid = blocks.fit_grid(weight, format, moments.diagonal().clone())
    size = weight.shape[1] // grid.step_RG.shape[1]
    order = moments.diagonal().argsort(descending=True, stable=True)
    h = (moments / moments.diagonal().mean()).double()
    h.diagonal().add_(gptq.DAMPING)
    left, levels = weight.double().clone(), torch.zeros(weight.shape)
    remaining = order.tolist()
    while remaining:
        j = remaining[0]
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        step, low = grid.step_RG[:, j // size].double(), grid.low_RG[:, j // size].double()
        level = grid.codec.levels.nearest(torch.where(step == 0, 0, (left[:, j] - low) / step))
        levels[:, j] = level.float()
        error = (left[:, j] - (level * step + low)) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining = remaining[1:]
    return grid.pack(grid.codec.levels.codes(levels))


@pytest.mark.parametrize("name", ["q4", "q8"])
def test_codes_are_those_of_the_papers_algorithm(name, monkeypatch):
    """The blocked fp32 algorithm gives the same codes, except for a few roundings near a half."""
    monkeypatch.setattr(gptq, "COLUMNS", 24)
    monkeypatch.setattr(gptq, "ROWS", 7)
    format = scheme(name).linears
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    x = inputs(300, 64)
    moments = x.T @ x / len(x)
    ours = blocks.decode(gptq.quantize_matrix(weight, moments, format), format)
    theirs = blocks.decode(textbook(weight, moments, format), format)
    assert (ours != theirs).float().mean() < 0.02


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_gptq_loses_less_than_rounding_to_nearest(format):
    """The error is smaller on the calibration inputs and on others like them."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    x = inputs(1500)
    fresh, x = x[1000:], x[:1000]
    packed = gptq.quantize_matrix(weight, x.T @ x / len(x), format)
    nearest = blocks.encode(weight, format)
    assert packed.shape == nearest.shape
    assert loss(weight, packed, format, x) < 0.8 * loss(weight, nearest, format, x)
    assert loss(weight, packed, format, fresh) < 0.9 * loss(weight, nearest, format, fresh)


def test_inputs_without_correlation_change_nothing():
    """With H = 1 there is nothing to compensate: the codes are the nearest of the grid."""
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    for format in PACKED:
        grid = blocks.fit_grid(weight, format, torch.ones(256))
        packed = gptq.quantize_matrix(weight, torch.eye(256), format)
        nearest = grid.pack(grid.codes(weight))
        near = blocks.decode(nearest, format)
        assert (blocks.decode(packed, format) != near).float().mean() < 1e-3


def test_zero_and_dependent_inputs_are_handled():
    """Inputs that are always zero, and fewer tokens than columns, need only damping."""
    weight = torch.randn(8, 256)
    x = inputs(40)
    x[:, 7] = 0
    for moments in (x.T @ x / 40, torch.zeros(256, 256)):
        packed = gptq.quantize_matrix(weight, moments, FORMATS["Q4_0"])
        assert blocks.decode(packed, FORMATS["Q4_0"]).isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["q4", "q4k"])
def test_a_whole_model_is_quantized_in_file_order(make_model, name, tied):
    """Every parameter has its format, and the model is closer to the original than with rounding."""
    model = make_model(tie_embeddings=tied)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(300, (4, 64), generator=generator) for _ in range(6)]
    plan = scheme(name)
    quantizer = gptq.Gptq(model.config, lambda n: model.get_parameter(n).detach().bfloat16(), plan, batches)
    formats, out = plan.plan(model.config), make_model(tie_embeddings=tied)
    for param, shape in model.config.param_shapes():
        rows = torch.cat(list(quantizer.rows(param)))
        assert (
            rows.numel() * formats[param].block
            == model.get_parameter(param).numel() * formats[param].block_bytes
        )
        if len(shape) == 1:
            continue
        place_blocks(out, param, rows, formats[param], torch.float32)
    if tied:
        tie_head(out)
    nearest = swap_linears(make_model(tie_embeddings=tied), plan)
    test_BT = torch.randint(300, (4, 64), generator=generator)
    with torch.no_grad():
        wanted = model.logits(test_BT).log_softmax(-1)
        kl = [
            float((wanted.exp() * (wanted - m.logits(test_BT).log_softmax(-1))).sum(-1).mean())
            for m in (out, nearest)
        ]
    assert kl[0] < kl[1]


def test_damaged_weights_and_missing_text_are_refused(make_model):
    with pytest.raises(QuantError, match="needs calibration text"):
        gptq.Gptq(make_model().config, lambda n: torch.zeros(1), scheme("q4"), [])
    with pytest.raises(QuantError, match="w: it or its inputs have values that are not finite"):
        gptq.quantize_matrix(torch.full((2, 32), torch.nan), torch.eye(32), FORMATS["Q4_0"], "w")
    with pytest.raises(QuantError, match="Q4_K blocks of 256"):
        gptq.quantize_matrix(torch.zeros(2, 32), torch.eye(32), FORMATS["Q4_K"], "w")
    model = make_model()
    quantizer = gptq.Gptq(
        model.config, model.get_parameter, scheme("q4"), [torch.zeros(1, 4, dtype=torch.int64)]
    )
    with pytest.raises(QuantError, match="in file order"):
        quantizer.rows("model.layers.0.input_layernorm.weight")
