"""Products with quantized weights: every path against float64, and the same bits in any batch."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.errors import QuantError
from herd.kernels import qmatmul as module
from herd.kernels.qmatmul import (
    PATHS,
    deinterleave,
    format_codes,
    interleave,
    qmatmul,
    qmatmul_each,
    qmatmul_twice,
    round_activations,
)
from herd.quant import FORMATS, blocks
from herd.quant.random import random_rows

pytestmark = pytest.mark.skipif(not module.here(), reason="no C++ compiler")
PACKED = list(FORMATS.values())
formats = pytest.mark.parametrize("format", PACKED, ids=str)
paths = pytest.mark.parametrize("path", module.here())


ROWS = 16  # rows side by side


def plain_interleave(blocks_RB: torch.Tensor, format) -> torch.Tensor:
    """Interleave blocks in plain torch. A block of odd halves has one half-precision number beside its words."""
    whole, size = blocks_RB.shape[0] // ROWS * ROWS, format.block_bytes
    b_TrNB = blocks_RB[:whole].reshape(-1, ROWS, blocks_RB.shape[1] // size, size)
    half_at = next(blocks.CODECS[format.name].half_positions()) if size % 4 else None
    start = 2 if half_at == 0 else 0
    words = b_TrNB[..., start : start + size // 4 * 4].unflatten(-1, (-1, 4))
    planes = [words.permute(0, 2, 3, 1, 4).flatten(2)]
    if half_at is not None:
        planes.append(b_TrNB[..., half_at : half_at + 2].permute(0, 2, 1, 3).flatten(2))
    return torch.cat((torch.cat(planes, dim=2).view(whole, blocks_RB.shape[1]), blocks_RB[whole:]))


def tokens(N, D, dtype=torch.float32, seed=0):
    """Activations with some channels a hundred times as large as the others, as those of language models have."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(N, D, generator=generator)
    x_ND[:, :: D // 4] *= 100
    return x_ND.to(dtype)


def exact(x_ND, rows_RB, format):
    """float64, on the same weights and the same rounded activations, and the sum of the products' sizes."""
    codes, scales = round_activations(x_ND)
    x = (codes.double().unflatten(-1, (-1, 32)) * scales.double()[..., None]).flatten(-2)
    weight = blocks.decode(rows_RB, format, torch.float64)
    return x @ weight.T, x.abs() @ weight.abs().T


def assert_exact(y_NR, x_ND, rows_RB, format):
    """Errors are some roundings of fp32 at most, even where large products cancel, and 1e-5 of the result on
    average.
    """
    truth, size = exact(x_ND, rows_RB, format)
    assert ((y_NR - truth).abs() <= 1e-6 * size).all()
    if y_NR.numel() > 1000:
        assert (y_NR - truth).norm() < 1e-5 * truth.norm()


@st.composite
def problems(draw):
    format = draw(st.sampled_from(PACKED))
    D = format.block * draw(st.integers(1, 40 if format.block == 32 else 6))
    return format, draw(st.integers(1, 70)), D, draw(st.integers(1, 60))


@paths
@given(problem=problems(), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_every_path_is_float64_on_the_same_codes(path, problem, seed):
    format, R, D, N = problem
    rows_RB, x_ND = random_rows((R, D), format, seed), tokens(N, D, seed=seed)
    y_NR = qmatmul(x_ND, interleave(rows_RB, format.code), format.code, path)
    assert (y_NR.shape, y_NR.dtype) == ((N, R), torch.float32)
    assert_exact(y_NR, x_ND, rows_RB, format)


def test_kernels_exist_for_the_formats_that_can_be_written():
    assert format_codes() == {format.code for format in FORMATS.values()}


@formats
@paths
def test_long_rows_are_taken_in_pieces(format, path):
    rows_RB, x_ND = random_rows((35, 5120), format, 1), tokens(40, 5120)
    y_NR = qmatmul(x_ND, interleave(rows_RB, format.code), format.code, path)
    assert_exact(y_NR, x_ND, rows_RB, format)


@formats
def test_extreme_codes_do_not_overflow(format):
    """All bits set in weights and activations at ±127: where 16-bit sums would overflow."""
    rows_RB = random_rows((16, 256), format, 0)
    for high in (0, 255, 127, 128):
        extreme_RB = rows_RB.clone()
        for field, bytes_RNB in blocks.CODECS[format.name].split(extreme_RB).items():
            if field.startswith(("q", "hmask")):
                bytes_RNB.fill_(high)
        for sign in (1, -1):
            x_ND = torch.full((3, 256), 127.0 * sign)
            for path in module.here():
                y_NR = qmatmul(x_ND, interleave(extreme_RB, format.code), format.code, path)
                assert_exact(y_NR, x_ND, extreme_RB, format)


@formats
@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_to_the_bit_in_any_batch(format, path, dtype):
    """Alone, among 2 to 33, at any place, among 120 (whose weights are unpacked first), with any number of threads."""
    D, R = 1024 + 256, 53
    tiles_RB = interleave(random_rows((R, D), format, 2), format.code)
    x_ND = tokens(120, D, dtype)
    alone_NR = torch.cat([qmatmul(x_1D, tiles_RB, format.code, path) for x_1D in x_ND.split(1)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for N in (*range(1, 34), 120):
                start = (7 * N) % (121 - N)
                batch = slice(start, start + N)
                assert torch.equal(qmatmul(x_ND[batch], tiles_RB, format.code, path), alone_NR[batch])
    finally:
        torch.set_num_threads(before)


@formats
def test_all_paths_agree(format):
    """Integers are exact and everything else is in the same order, so not even the processor matters."""
    tiles_RB, x_ND = interleave(random_rows((40, 1280), format, 3), format.code), tokens(19, 1280)
    results = [qmatmul(x_ND, tiles_RB, format.code, path) for path in module.here()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6 * results[0].abs().max().item())


@formats
@given(R=st.integers(0, 50), n=st.integers(1, 5))
@settings(max_examples=20)
def test_interleaving_is_undone(format, R, n):
    rows_RB = torch.randint(256, (R, n * format.block_bytes), dtype=torch.uint8)
    tiles_RB = interleave(rows_RB, format.code)
    assert torch.equal(tiles_RB, plain_interleave(rows_RB, format))
    assert torch.equal(deinterleave(tiles_RB, format.code), rows_RB)


def test_blocks_in_a_part_of_a_larger_tensor():
    rows_RB = random_rows((40, 64), FORMATS["Q4_0"], 4)
    part = rows_RB[3:37]
    assert torch.equal(interleave(part, 2), interleave(part.clone(), 2))


@formats
def test_bf16_activations_give_bf16_results(format):
    rows_RB, x_ND = random_rows((48, 512), format, 5), tokens(21, 512, torch.bfloat16)
    tiles_RB = interleave(rows_RB, format.code)
    y_NR = qmatmul(x_ND, tiles_RB, format.code, module.here()[0])
    assert torch.equal(y_NR, qmatmul(x_ND.float(), tiles_RB, format.code, module.here()[0]).bfloat16())
    double = qmatmul(x_ND.double(), tiles_RB, format.code, module.here()[0])
    assert double.dtype == torch.float64


@paths
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_rounded_in_two_steps_are_the_sum_of_both(format, path, dtype):
    rows_RB, x_ND = random_rows((53, 768), format, 3), tokens(30, 768, dtype)
    tiles_RB = interleave(rows_RB, format.code)
    y_NR = qmatmul_twice(x_ND, tiles_RB, format.code, path)
    codes, scales = round_activations(x_ND)
    rounded_ND = (codes.unflatten(-1, (-1, 32)) * scales[..., None]).flatten(-2)
    rest_ND = x_ND.float() - rounded_ND
    first, second = exact(x_ND, rows_RB, format), exact(rest_ND, rows_RB, format)
    # the rest is a difference of nearly equal numbers, and may be rounded once or twice
    assert ((y_NR - first[0] - second[0]).abs() <= 1e-6 * (first[1] + second[1])).all()
    assert torch.equal(y_NR[3:4], qmatmul_twice(x_ND[3:4], tiles_RB, format.code, path))


@paths
def test_activations_at_the_edges(path):
    """Zeros give zeros, what is too small to round counts as zero, and a value that is not finite spoils its token."""
    format = FORMATS["Q4_0"]
    tiles_RB = interleave(random_rows((32, 128), format, 6), format.code)
    x_ND = tokens(5, 128)
    x_ND[0], x_ND[1], x_ND[2, 3], x_ND[3, 70] = 0, 1e-40, torch.inf, torch.nan
    y_NR = qmatmul(x_ND, tiles_RB, format.code, path)
    assert y_NR[:2].eq(0).all()
    assert y_NR[2:4].isnan().all()
    assert torch.equal(y_NR[4:], qmatmul(x_ND[4:], tiles_RB, format.code, path))
    codes, scales = round_activations(x_ND)
    assert not scales[:2].any()
    assert scales[2:4].isnan().sum() == 2
    assert codes[4].abs().unflatten(-1, (-1, 32)).amax(-1).eq(127).all()


@given(seed=st.integers(0, 999))
@settings(max_examples=50)
def test_activations_are_rounded_as_the_reference_says(seed):
    """A weight of 1 in one place of each row reads a code out of the kernel, ties included."""
    rows_RB = blocks.encode(torch.eye(32), FORMATS["Q8_0"])
    x_ND = (torch.randn(9, 32, generator=torch.Generator().manual_seed(seed)) * 8).round() / 8
    codes, scales = round_activations(x_ND)
    values = (
        codes.double() * scales.double() * blocks.decode(rows_RB, FORMATS["Q8_0"], torch.float64).diagonal()
    )
    y_NR = qmatmul(x_ND, interleave(rows_RB, 8), 8, module.here()[0])
    torch.testing.assert_close(y_NR.double(), values, rtol=1e-6, atol=0)


def test_no_tokens_give_no_results():
    tiles_RB = interleave(random_rows((16, 32), FORMATS["Q8_0"], 0), 8)
    assert qmatmul(torch.empty(0, 32), tiles_RB, 8, "portable").shape == (0, 16)
    assert qmatmul(torch.ones(2, 32), tiles_RB[:0], 8, "portable").shape == (2, 0)


@pytest.mark.parametrize("D, code, match", [(64, 2, "not as long"), (32, 3, "format"), (32, 8, "divide")])
def test_shapes_that_do_not_fit_are_refused(D, code, match):
    with pytest.raises((RuntimeError, ValueError), match=match):
        qmatmul(torch.ones(2, D), torch.zeros(16, 18, dtype=torch.uint8), code, "portable")


def test_operators_are_well_formed():
    tiles_RB = random_rows((20, 64), FORMATS["Q4_0"], 0)
    ops = torch.ops.herd_native
    checks = ("test_schema", "test_faketensor")
    arguments = (tokens(3, 64), [tiles_RB, tiles_RB], [2, 2], PATHS.index("portable"))  # every processor's
    torch.library.opcheck(ops.qmatmul.default, arguments, test_utils=checks)
    for reorder in (ops.qmatmul_interleave.default, ops.qmatmul_deinterleave.default):
        torch.library.opcheck(reorder, (tiles_RB, 2, torch.empty_like(tiles_RB)), test_utils=checks)


@paths
@given(
    N=st.integers(0, 40), sizes=st.lists(st.tuples(st.integers(1, 90), st.sampled_from(PACKED)), max_size=4)
)
@settings(max_examples=30)
def test_several_matrices_at_once_are_each_alone(path, N, sizes):
    x_ND = tokens(N, 256)
    tiles = [
        interleave(random_rows((R, 256), format, seed), format.code) for seed, (R, format) in enumerate(sizes)
    ]
    codes = [format.code for _, format in sizes]
    for y_NR, tiles_RB, code in zip(qmatmul_each(x_ND, tiles, codes, path), tiles, codes, strict=True):
        assert torch.equal(y_NR, qmatmul(x_ND, tiles_RB, code, path))


def test_operators_can_be_traced_by_compile():
    tiles_RB, x_ND = interleave(random_rows((20, 64), FORMATS["Q4_0"], 0), 2), tokens(3, 64)
    compiled = torch.compile(
        lambda x: qmatmul(2 * x, tiles_RB, 2, "portable"), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x_ND), qmatmul(2 * x_ND, tiles_RB, 2, "portable"))


def test_the_path_is_the_fastest_there_is_and_a_slower_one_is_named_once(monkeypatch):
    monkeypatch.delenv("HERD_ISA", raising=False)
    monkeypatch.setattr(module, "here", lambda: ("avx2", "portable"))
    module._say_slower.cache_clear()
    with pytest.warns(UserWarning, match="no AVX-512 VNNI: quantized matmuls take the slower avx2 path"):
        assert module.path() == "avx2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.path() == "avx2"
        monkeypatch.setenv("HERD_ISA", "portable")
        assert module.path() == "portable"
        monkeypatch.setattr(module, "here", lambda: PATHS)
        monkeypatch.delenv("HERD_ISA")
        assert module.path() == "vnni"
        monkeypatch.setattr(module, "here", tuple)
        assert module.path() is None


def test_a_path_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(module, "here", lambda: ("portable",))
    monkeypatch.setenv("HERD_ISA", "vnni")
    with pytest.raises(QuantError, match="HERD_ISA=vnni: this processor lacks it; choose portable"):
        module.path()
