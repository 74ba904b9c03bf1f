"""A size in bits: the sensitivity against autograd, the choice against exhaustive search."""

import itertools
import math

import pytest
import torch

from herd.errors import QuantError
from herd.llama.config import ModelConfig
from herd.quant import FORMATS, blocks
from herd.quant.allocate import Sensitivity, allocate, measure_sensitivity, predicted_loss, predicted_losses
from herd.quant.calibration import load_plain, measure_importance
from herd.quant.formats import F32, tensor_nbytes


def batches(n=4, length=32, vocab=300):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (1, length), generator=generator) for _ in range(n)]


@pytest.mark.parametrize("tied", [False, True])
def test_importance_is_the_mean_square_of_inputs(make_model, tied):
    """Measured one layer at a time, it equals the one of hooks in the whole model."""
    model = make_model(tie_embeddings=tied)
    found = measure_importance(model.config, lambda name: model.get_parameter(name).detach(), batches())
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0].detach())
            )
    for ids in batches():
        model.logits(ids)
    head = "model.embed_tokens" if tied else "lm_head"
    seen[head] = seen.pop("lm_head")
    assert found.keys() == {f"{name}.weight" for name in seen}
    for name, inputs in seen.items():
        torch.testing.assert_close(
            found[f"{name}.weight"], torch.cat(inputs).square().mean(0), rtol=1e-4, atol=1e-6
        )


def test_the_predicted_loss_is_close_to_the_measured_one(make_model):
    """Small random errors in one matrix change the predictions by the KL divergence that is predicted."""
    model = make_model()
    text = batches(24)
    name = "model.layers.1.mlp.up_proj.weight"
    found = measure_sensitivity(make_model(), text)[name]
    weight = model.get_parameter(name).detach()
    wanted = [model.logits(ids).log_softmax(-1).detach() for ids in text]
    error = (
        blocks.decode(blocks.encode(weight, FORMATS["Q4_0"], importance_D=found.columns_D), FORMATS["Q4_0"])
        - weight
    )
    weight += error
    with torch.no_grad():
        kls = [
            (w.exp() * (w - model.logits(ids).log_softmax(-1))).sum(-1).mean()
            for w, ids in zip(wanted, text, strict=True)
        ]
    weight -= error
    assert predicted_loss(weight, FORMATS["Q4_0"], found) == pytest.approx(
        float(sum(kls) / len(kls)), rel=0.5
    )


def test_sensitivity_needs_neither_plain_layers_nor_untied_embeddings(make_model):
    model = make_model(tie_embeddings=True)
    plain = load_plain(model.config, lambda name: model.get_parameter(name).detach())
    found = measure_sensitivity(plain, batches())
    shapes = {name: shape for name, shape in model.config.param_shapes() if len(shape) > 1}
    assert {name: (len(s.rows_R), len(s.columns_D)) for name, s in found.items()} == shapes
    assert all(float(part.min()) >= 0 for one in found.values() for part in one)
    with pytest.raises(QuantError, match="there is none"):
        measure_sensitivity(plain, [])


CONFIG = ModelConfig(512, 256, 1, 4, 2, 256, max_context=64)


def made_up_losses(seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in CONFIG.param_shapes():
        if len(shape) > 1:
            scale = float(torch.rand(1, generator=generator)) * math.prod(shape)
            out[name] = {f: scale * 4.0**-f.bits for f in FORMATS.values()}
    return out


@pytest.mark.parametrize("bits", [3.0, 4.2, 5.5, 7.9])
def test_the_size_is_kept_and_nearly_used(bits):
    scheme, loss = allocate(CONFIG, made_up_losses(), bits)
    used = 8 * scheme.nbytes(CONFIG) / CONFIG.n_params
    assert bits - 0.6 < used <= bits
    losses = made_up_losses()
    assert loss == pytest.approx(sum(losses[name][scheme.formats[name]] for name in losses))
    assert scheme.formats["model.norm.weight"] == F32


def test_no_other_choice_of_formats_is_much_better():
    """Compared with all choices among three formats for four matrices."""
    names = [name for name, shape in CONFIG.param_shapes() if "mlp" in name or "o_proj" in name][:4]
    shapes = dict(CONFIG.param_shapes())
    some = [FORMATS[name] for name in ("Q2_K", "Q4_K", "Q8_0")]
    losses = {name: {f: by[f] for f in some} for name, by in made_up_losses(3).items() if name in names}
    scheme, loss = allocate(CONFIG, {n: losses.get(n, {FORMATS["Q8_0"]: 0.0}) for n in made_up_losses()}, 7.6)
    used = sum(tensor_nbytes(shapes[name], scheme.formats[name]) for name in names)
    best = min(
        sum(losses[name][f] for name, f in zip(names, choice, strict=True))
        for choice in itertools.product(some, repeat=4)
        if sum(tensor_nbytes(shapes[n], f) for n, f in zip(names, choice, strict=True)) <= used
    )
    assert loss == pytest.approx(best)


def test_more_bits_lose_less():
    losses = [allocate(CONFIG, made_up_losses(), bits)[1] for bits in (3.0, 3.5, 4.0, 5.0, 6.0, 8.0)]
    assert losses == sorted(losses, reverse=True)


def test_too_few_bits_are_refused():
    with pytest.raises(
        QuantError, match=r"1 bits per weight are too few for this model; it needs at least 2\.\d\d"
    ):
        allocate(CONFIG, made_up_losses(), 1)


def test_every_format_that_fits_is_tried(make_model):
    model = make_model(dim=96, ffn_dim=256, n_layers=1)
    config = model.config
    ones = {
        name: Sensitivity(torch.ones(shape[0]), torch.ones(shape[1]))
        for name, shape in config.param_shapes()
        if len(shape) > 1
    }
    losses = predicted_losses(config, lambda name: model.get_parameter(name).detach(), ones)
    assert len(losses["model.layers.0.mlp.down_proj.weight"]) == len(FORMATS)
    up = losses["model.layers.0.mlp.up_proj.weight"]
    assert {f.block for f in up} == {32}
    assert up[FORMATS["Q8_0"]] < up[FORMATS["Q4_0"]]
