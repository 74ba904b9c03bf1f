"""Straight-through rounding: what is trained is what the blocks decode to."""

import pytest
import torch
from torch import nn

from herd.errors import QuantError
from herd.quant import FORMATS, TYPES, blocks
from herd.quant.straight_through import StraightThrough

PACKED = list(FORMATS.values())


def parameter(seed: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05)


def moved(params, amount=0.003):
    """Change weights as a short training does, beyond some rounding thresholds."""
    with torch.no_grad():
        for number, param in enumerate(params.values()):
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 + number))
            param += amount * noise


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_the_blocks_decode_to_exactly_the_weights_that_were_used(format):
    params = {"w": parameter(0, 300, 1024)}  # several pieces
    rounding = StraightThrough(params, {"w": format})
    moved(params)
    with rounding.applied():
        used = params["w"].data.clone()
    written = torch.cat(rounding.rows("w"))
    assert torch.equal(blocks.decode(written, format), used)


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_weights_on_the_grid_are_not_changed(format):
    params = {"w": parameter(1, 8, 512)}
    with torch.no_grad():
        params["w"][0, :256] = 0
    rounding = StraightThrough(params, {"w": format})
    before = torch.cat(rounding.rows("w"))
    params["w"].data = blocks.decode(before, format)
    assert torch.equal(torch.cat(rounding.rows("w")), before)
    with rounding.applied():
        assert torch.equal(params["w"].data, blocks.decode(before, format))


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_each_weight_takes_the_nearest_value_of_its_group(format):
    params = {"w": parameter(2, 2, 512)}
    grid = blocks.fit_grid(params["w"].data, format)
    n_codes = len(grid.codec.levels.values)
    every = [grid.values(torch.full((2, 512), code, dtype=torch.uint8)) for code in range(n_codes)]
    distances = (torch.stack(every) - params["w"].data).abs()
    with StraightThrough(params, {"w": format}).applied():
        used = params["w"].data.clone()
    error = (used - params["w"].data).abs()
    assert torch.all(error <= distances.amin(0) + 1e-6)


def test_the_gradient_is_that_of_the_rounded_weights_and_moves_the_plain_ones():
    params = {"w": parameter(3, 4, 64), "norm": parameter(4, 64)}
    kept = {name: param.detach().clone() for name, param in params.items()}
    rounding = StraightThrough(params, {"w": TYPES["Q4_0"], "norm": TYPES["F32"]})
    x = torch.randn(3, 64)
    with rounding.applied():
        rounded = params["w"].detach().clone()
        assert torch.equal(params["norm"], kept["norm"])
        (x @ params["w"].T * params["norm"][:4]).square().sum().backward()
    assert torch.equal(params["w"], kept["w"])
    assert not torch.equal(rounded, kept["w"])
    twin = rounded.clone().requires_grad_()
    (x @ twin.T * kept["norm"][:4]).square().sum().backward()
    torch.testing.assert_close(params["w"].grad, twin.grad)


def test_plain_formats_are_rounded_too():
    params = {"w": parameter(5, 4, 48)}
    rounding = StraightThrough(params, {"w": TYPES["F16"]})
    with rounding.applied():
        assert torch.equal(params["w"].data, params["w"].data.half().float())
        used = params["w"].data.clone()
    assert not torch.equal(used, params["w"].data)
    assert torch.equal(blocks.decode(rounding.rows("w")[0], TYPES["F16"]), used)


def test_weights_are_restored_after_an_error():
    params = {"w": parameter(6, 2, 64)}
    kept = params["w"].data.clone()
    rounding = StraightThrough(params, {"w": TYPES["Q4_0"]})
    with pytest.raises(RuntimeError), rounding.applied():
        raise RuntimeError
    assert torch.equal(params["w"].data, kept)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(QuantError, match="w: rows of 48"):
        StraightThrough({"w": parameter(7, 2, 48)}, {"w": TYPES["Q4_0"]})
