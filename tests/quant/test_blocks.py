"""Blocks against the `gguf` package: every type's sizes, decoding of arbitrary bytes, encoding where it has
it."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.errors import QuantError
from herd.quant import FORMATS, TYPES, blocks, find_format, tensor_nbytes
from herd.quant.formats import BF16, F16, F32, Q4_0, Q4_K, Q8_0

PACKED = list(FORMATS.values())
Q4_1, Q5_0, Q5_1, Q6_K = (FORMATS[name] for name in ("Q4_1", "Q5_0", "Q5_1", "Q6_K"))


def weights(rows=6, width=512, seed=0, kind="normal") -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    if kind == "heavy":
        x = x**5
    elif kind == "ties":
        x = rng.integers(-4, 5, (rows, width)).astype(np.float32)
    elif kind == "zeros":
        x *= rng.random((rows, width // 32, 1)).repeat(32, 2).reshape(rows, width) > 0.5
    elif kind == "tiny":
        x *= 1e-7
    elif kind == "large":
        x *= 1e4
    elif kind == "positive":
        x = np.abs(x) + 1
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def oracle_encode(x, format):
    return gguf.quants.quantize(x.numpy(), Type[format.name]).view(np.uint8)


def oracle_decode(blocks_RB, format):
    return gguf.quants.dequantize(blocks_RB.numpy(), Type[format.name])


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_the_fields_of_a_block_are_as_long_as_the_block(format):
    assert sum(blocks.CODECS[format.name].struct.values()) == format.block_bytes


def test_sizes_of_every_type():
    theirs = {t.name: (int(t), *gguf.GGML_QUANT_SIZES[t]) for t in Type}
    assert {f.name: (f.code, f.block, f.block_bytes) for f in TYPES.values()} == theirs


@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "zeros", "tiny", "large", "positive"])
@pytest.mark.parametrize("format", [Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, F16, BF16, F32], ids=str)
def test_encoding_is_bit_identical_with_ggml(format, kind):
    x = weights(kind=kind).clamp(-6e4, 6e4) + 0.0  # no -0.0, whose sign as a lowest weight is arbitrary
    assert same(blocks.encode(x, format), oracle_encode(x, format))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), format=st.sampled_from(PACKED))
def test_any_bytes_are_decoded_like_ggml(seed, format):
    """Any bytes with finite scales are decoded to the same weights as in ggml."""
    raw = np.random.default_rng(seed).integers(0, 256, (3, 2 * format.block_bytes), dtype=np.uint8)
    packed = torch.from_numpy(raw)
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = oracle_decode(packed, format)
    ours = blocks.decode(packed, format).numpy()
    finite = np.isfinite(theirs)
    assert same(ours[finite], theirs[finite])
    assert not np.isfinite(ours[~finite]).any()


OTHERS = [
    f for f in TYPES.values() if f.name not in {*FORMATS, "F32", "F16", "I8", "I16", "I32", "I64", "F64"}
]


@pytest.mark.parametrize("format", [f for f in OTHERS if f.name not in ("Q8_1", "Q8_K", "Q1_0")], ids=str)
def test_other_types_are_unpacked_by_the_gguf_package(format):
    raw = np.random.default_rng(0).integers(0, 60, (3, 2 * format.block_bytes), dtype=np.uint8)
    packed = torch.from_numpy(raw)
    assert same(blocks.decode(packed, format).numpy(), oracle_decode(packed, format))


def test_a_type_that_cannot_be_unpacked_is_refused():
    with pytest.raises(QuantError, match="Q8_K blocks cannot be unpacked"):
        blocks.decode(torch.zeros(1, 292, dtype=torch.uint8), TYPES["Q8_K"])


@pytest.mark.parametrize("format", [*PACKED, F16, BF16, F32], ids=str)
def test_infinite_and_nan_scales_are_found(format):
    """The check agrees with the decoded weights, for random bytes with every kind of scale."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        n = 1 if format.block > 1 else 64
        packed = torch.from_numpy(rng.integers(0, 256, (1, n * format.block_bytes), dtype=np.uint8))
        if format.block > 1 or format is F16:
            packed &= 0x7F
            if rng.random() < 0.5:
                packed &= 0x3F
        with np.errstate(all="ignore"):
            finite = bool(torch.isfinite(blocks.decode(packed, format)).all())
        assert blocks.all_finite(packed, format) == finite
        seen.add(finite)
    assert seen == {True, False}


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    format=st.sampled_from([Q8_0, Q4_0, Q4_1, Q5_0, Q5_1]),
    scale=st.sampled_from([1e-9, 1e-6, 1e-3, 1.0, 1e3, 5e4]),
    whole=st.booleans(),
)
def test_encoding_is_bit_identical_at_any_scale(seed, format, scale, whole):
    rng = np.random.default_rng(seed)
    x = rng.integers(-9, 10, (2, 96)) if whole else rng.standard_normal((2, 96))
    x = torch.from_numpy((x * scale).astype(np.float32)).clamp(-6e4, 6e4)
    assert same(blocks.encode(x, format), oracle_encode(x, format))


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_encoding_what_was_decoded_changes_nothing(format):
    """Weights that are points of a grid are not changed by encoding."""
    once = blocks.decode(blocks.encode(weights(), format), format)
    again = blocks.decode(blocks.encode(once, format), format)
    searched = format.block == 256 or format.name == "IQ4_NL"
    atol = 0 if format is Q8_0 else 1e-3 * float(once.abs().max()) * (30 if searched else 1)
    torch.testing.assert_close(again, once, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["normal", "heavy", "zeros", "positive", "tiny"])
@pytest.mark.parametrize("format", PACKED, ids=str)
def test_codes_pack_and_unpack(format, kind):
    """The values of a grid are exactly those that the packed blocks decode to."""
    x = weights(kind=kind)
    grid = blocks.fit_grid(x, format)
    codes = grid.codes(x)
    assert int(codes.max()) < len(grid.codec.levels.values)
    packed = grid.pack(codes)
    assert packed.shape == (x.shape[0], tensor_nbytes(x.shape, format) // x.shape[0])
    torch.testing.assert_close(blocks.decode(packed, format), grid.values(codes), rtol=1e-6, atol=1e-12)


def error(x, format, importance=None):
    grid = blocks.fit_grid(x, format, importance)
    back = blocks.decode(grid.pack(grid.codes(x)), format)
    return (back - x).square()


def test_rounding_errors_are_those_expected_of_each_format():
    """Relative squared errors of normal weights. More bits lose less, and the search beats the reference's
    grid."""
    x = weights(64, 1024)
    size = x.square().mean()
    lost = {f.name: float((blocks.decode(blocks.encode(x, f), f) - x).square().mean() / size) for f in PACKED}
    assert lost["Q8_0"] < 4e-5
    assert lost["Q6_K"] < 5e-4
    assert lost["Q4_K"] < 6.5e-3
    assert lost["Q4_0"] < 9e-3
    assert lost["Q8_0"] < lost["Q6_K"] < lost["Q4_K"] < lost["Q4_0"]
    assert error(x, Q4_0).mean() / size < lost["Q4_0"]


@pytest.mark.parametrize("format", [Q4_0, Q4_K], ids=str)
def test_important_columns_get_smaller_errors(format):
    x = weights(64, 512)
    importance = torch.ones(512)
    importance[::8] = 100
    plain, weighted = error(x, format), error(x, format, importance)
    assert weighted[:, ::8].mean() < 0.9 * plain[:, ::8].mean()
    assert (weighted * importance).mean() < (plain * importance).mean()


def test_rows_processed_in_pieces_give_the_same_bytes(monkeypatch):
    x = weights(33, 256)
    whole = {f.name: blocks.encode(x, f) for f in PACKED}
    monkeypatch.setattr(blocks, "PIECE", 1000)
    for f in PACKED:
        assert same(blocks.encode(x, f), whole[f.name])
        rows = [blocks.decode(row[None], f) for row in whole[f.name]]
        assert torch.equal(blocks.decode(whole[f.name], f), torch.cat(rows))


def test_bf16_weights_and_bf16_out():
    x = weights().bfloat16()
    packed = blocks.encode(x, Q8_0)
    assert same(packed, oracle_encode(x.float(), Q8_0))
    assert torch.equal(blocks.decode(packed, Q8_0, torch.bfloat16), blocks.decode(packed, Q8_0).bfloat16())


@pytest.mark.parametrize("format", PACKED, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(format, bad):
    x = weights()
    x[3, 77] = bad
    with pytest.raises(QuantError, match=r"blk\.0: has values that are not finite"):
        blocks.encode(x, format, "blk.0")


@pytest.mark.parametrize("format", [*PACKED, F16], ids=str)
def test_weights_beyond_half_precision_are_refused(format):
    with pytest.raises(QuantError, match=f"3e\\+38, beyond the range of {format.name}"):
        blocks.encode(torch.full((1, 256), 3e38), format)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(
        QuantError,
        match=r"w: rows of 320 weights .* Q4_K blocks of 256; these fit: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, F16",
    ):
        blocks.encode(torch.zeros(2, 320), Q4_K, "w")
    with pytest.raises(QuantError, match="these fit: F16"):
        tensor_nbytes((2, 80), "q4")
    assert tensor_nbytes((4096, 4096), "q4") == 4096 * 4096 // 32 * 18


def test_formats_are_found_by_any_of_their_names():
    assert find_format("q4") is find_format("Q4_0") is Q4_0
    assert find_format("q4k") is find_format("q4_k") is Q4_K
    with pytest.raises(QuantError, match="'q3' is not known: choose q8, q4, q41"):
        find_format("q3")


def test_empty_matrices_are_encoded():
    assert blocks.encode(torch.zeros(0, 64), Q4_0).shape == (0, 36)
    assert blocks.decode(torch.zeros(0, 420, dtype=torch.uint8), Q6_K).shape == (0, 512)
