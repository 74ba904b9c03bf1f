"""Paged attention against float64: every kind of cache, ragged company, and the same bits in any company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.kernels import build
from herd.kernels.page_layout import BLOCK, BYTES, PAGE, head_bytes
from herd.kernels.paged_attention import (
    Ragged,
    dequantize,
    paged_attention,
    plain_paged_attention,
    quantize,
    read,
)

needs_native = pytest.mark.skipif(not build.ready(), reason="no C++ compiler")
LAYERS, LAYER = 2, 1
FP32_EXP = 1e-6
"""What fp32 scores and their exponentials may be off by, of a weight."""


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: str, *, rounded: bool = False):
    """One whole sequence, float64, on what the cache keeps of its keys and values (and queries, in int8).
    ``rounded``: with weights rounded as the native kernel rounds them, page by page and for each scale of the
    values. Besides, how much of it goes either way, because a weight lies on the edge between two codes.
    """
    if kind == "int8":
        scale_Sgb = quantize(v)[1]
        q, k, v = (dequantize(*quantize(x), torch.float64) for x in (q, k, v))
    elif kind == "bf16":
        k, v = k.bfloat16(), v.bfloat16()
    T, H, K = q.shape
    k, v = (x.double().repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q.double(), k) / K**0.5
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -torch.inf)
    if rounded:
        return rounded_average(
            scores, later, scale_Sgb.double().repeat_interleave(H // scale_Sgb.shape[1], 1), v
        )
    return torch.einsum("hts,shk->thk", scores.softmax(-1), v), torch.zeros(())


def rounded_average(scores_HTS, later_TS, scale_SHb, v_SHK):
    """Weights relative to each page's best, times the values' scales, in steps of 1 / 32767 of the largest scale."""
    H, T, S = scores_HTS.shape
    top_HT1 = scores_HTS.amax(-1, keepdim=True)
    out_THK, either_way_THK = torch.zeros(2, T, H, v_SHK.shape[2], dtype=torch.float64)
    for page in range(0, S, PAGE):
        keys = slice(page, page + PAGE)
        best_HT1 = scores_HTS[..., keys].amax(-1, keepdim=True)
        relative_HTs = (scores_HTS[..., keys] - best_HT1.nan_to_num(neginf=0)).exp()
        for b in range(scale_SHb.shape[2]):
            seen_HTs = scale_SHb[keys, :, b].T[:, None].masked_fill(later_TS[:, keys], 0)
            step_HT1 = seen_HTs.amax(-1, keepdim=True) / 32767
            whole_HTs = (relative_HTs * seen_HTs / step_HT1).nan_to_num(0)
            codes_HTs = whole_HTs.round()
            edge_HTs = ((whole_HTs - codes_HTs).abs() > 0.5 - 1e-3 - FP32_EXP * whole_HTs).double()
            channels = slice(b * BLOCK, (b + 1) * BLOCK)
            unit_sHk = (v_SHK[keys, :, channels] / scale_SHb[keys, :, b : b + 1]).nan_to_num(0)
            weight_HTs = codes_HTs * step_HT1 * (best_HT1 - top_HT1).exp()
            out_THK[..., channels] += torch.einsum("hts,shk->thk", weight_HTs, unit_sHk)
            one_HTs = edge_HTs * step_HT1 * (best_HT1 - top_HT1).exp()
            either_way_THK[..., channels] += torch.einsum("hts,shk->thk", one_HTs, unit_sHk.abs())
    total_TH1 = (scores_HTS - top_HT1).exp().sum(-1).T[..., None]
    return out_THK / total_TH1, either_way_THK / total_TH1


class Sequences:
    """Sequences of these lengths, scattered over the pages of a pool that begins as noise."""

    def __init__(self, lengths, H, G, K, kind, dtype, seed=0):
        self.lengths, self.generator = lengths, torch.Generator().manual_seed(seed)
        n_pages = [-(-n // PAGE) for n in lengths]
        order = iter(torch.randperm(sum(n_pages), generator=self.generator).tolist())
        self.tables = torch.full((len(lengths), max(n_pages)), -1, dtype=torch.int32)
        for i, n in enumerate(n_pages):
            self.tables[i, :n] = torch.tensor([next(order) for _ in range(n)])
        size = (sum(n_pages), LAYERS, G, head_bytes(kind, K))
        self.pool = torch.randint(0, 255, size, dtype=torch.uint8, generator=self.generator)
        self.qkv = [[self.randn(n, heads, K).to(dtype) for heads in (H, G, G)] for n in lengths]

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def run(self, pieces, attention, pool) -> list[torch.Tensor]:
        """Feed each sequence by its pieces, those of one step together.

        ``pieces[i]`` ends with its length.
        """
        outs: list[list[torch.Tensor]] = [[] for _ in self.lengths]
        at = [0] * len(self.lengths)
        for step in range(max(map(len, pieces))):
            rows, fed, start = [], [], 0
            for i, sizes in enumerate(pieces):
                if step < len(sizes):
                    rows.append((i, start, sizes[step], at[i]))
                    fed.append([x[at[i] : at[i] + sizes[step]] for x in self.qkv[i]])
                    start += sizes[step]
                    at[i] += sizes[step]
            q, k, v = (torch.cat(x) for x in zip(*fed, strict=True))
            out = attention(q, k, v, pool, Ragged(self.tables, torch.tensor(rows), pool.device), LAYER)
            for i, first, n, _ in rows:
                outs[i].append(out[first : first + n])
        return [torch.cat(parts) for parts in outs]


def cut(data, n: int) -> list[int]:
    """``n`` tokens as a few pieces, single ones among them."""
    sizes: list[int] = []
    while n:
        sizes.append(data.draw(st.sampled_from([m for m in (1, 3, 8, 9, 64, 130, 700) if m <= n])))
        n -= sizes[-1]
        if len(sizes) > 6:
            return [*sizes, n] if n else sizes
    return sizes


@pytest.mark.parametrize(
    "attention", [pytest.param(paged_attention, marks=needs_native), plain_paged_attention]
)
@pytest.mark.parametrize("kind", BYTES)
@given(data=st.data())
@settings(max_examples=12)
def test_ragged_steps_are_the_whole_attention(attention, kind, data):
    K = data.draw(st.sampled_from([32, 64, 128] if kind == "int8" else [16, 32, 48, 128]))
    G, R = data.draw(st.sampled_from([(1, 1), (2, 3), (1, 4), (3, 5), (1, 16)]))
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 63, 64, 65, 200, 513, 1100]), min_size=1, max_size=4))
    s = Sequences(lengths, G * R, G, K, kind, torch.float32, seed=K)
    got = s.run([cut(data, n) for n in lengths], attention, s.pool)
    for out, qkv in zip(got, s.qkv, strict=True):
        rounded = kind == "int8" and attention is paged_attention
        want, either_way = truth(*qkv, kind, rounded=rounded)
        assert ((out.double() - want).abs() - either_way).clamp(min=0).norm() <= 1e-5 * want.norm()
        if rounded:  # and what rounding costs
            exact, _ = truth(*qkv, kind)
            assert (out.double() - exact).norm() <= 1e-4 * exact.norm()


@needs_native
@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("H, G", [(8, 2), (3, 1), (5, 5)])
def test_bits_do_not_depend_on_company_pieces_or_threads(kind, H, G):
    """In a ragged batch, alone all at once, alone token by token (past a split), with one and with three threads."""
    s = Sequences([600, 130, 33, 1], H, G, 32, kind, torch.float32)
    together = s.run(
        [[300, 1, 1, 100, 64, 5, 129], [1] * 5 + [125], [33], [1]], paged_attention, s.pool.clone()
    )
    alone = s.pool.clone()
    for i, n in enumerate(s.lengths):
        for threads, piece in ((1, n), (3, n), (1, 1), (2, 37)):
            pieces = [piece] * (n // piece) + [n % piece] * (n % piece > 0)
            torch.set_num_threads(threads)
            try:
                out = run_one(s, i, pieces, alone)
            finally:
                torch.set_num_threads(1)
            assert torch.equal(out, together[i])


def run_one(s: Sequences, i: int, pieces: list[int], pool: torch.Tensor) -> torch.Tensor:
    outs, at = [], 0
    for n in pieces:
        ragged = Ragged(s.tables, torch.tensor([(i, 0, n, at)]), pool.device)
        outs.append(paged_attention(*(x[at : at + n] for x in s.qkv[i]), pool, ragged, LAYER))
        at += n
    return torch.cat(outs)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BYTES)
def test_kernel_and_reference_write_the_same_bytes(kind, dtype):
    s = Sequences([300, 70], 6, 2, 64, kind, dtype)
    pools = s.pool.clone(), s.pool.clone()
    outs = [s.run([[150, 1, 149], [70]], f, pool) for f, pool in zip(BOTH, pools, strict=True)]
    assert torch.equal(*pools)
    assert torch.equal(pools[0][:, 1 - LAYER], s.pool[:, 1 - LAYER])  # no other layer was touched
    for a, b in zip(*outs, strict=True):
        bar = 1e-2 if dtype == torch.bfloat16 else 1e-4 if kind == "int8" else 1e-5
        assert (a.double() - b.double()).norm() <= bar * b.double().norm()


BOTH = (paged_attention, plain_paged_attention)


@pytest.mark.parametrize("kind", BYTES)
def test_reading_returns_what_was_written(kind):
    s = Sequences([130], 2, 2, 32, kind, torch.float32)
    s.run([[130]], plain_paged_attention, s.pool)
    kept = {"fp32": lambda x: x, "bf16": lambda x: x.bfloat16().float()}
    kept["int8"] = lambda x: dequantize(*quantize(x), torch.float32)
    for got, want in zip(
        read(s.pool, LAYER, s.tables[0].long(), 32, torch.float32), s.qkv[0][1:], strict=True
    ):
        assert torch.equal(got[:130], kept[kind](want))


@given(st.floats(-30, 30), st.integers(0, 10))
def test_a_rounded_number_is_half_a_step_off_at_most(log2, seed):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**log2
    _, scale = quantize(x)
    off = (dequantize(*quantize(x), torch.float32) - x).abs().unflatten(-1, (2, 32))
    assert (off <= 0.5001 * scale.float()[..., None]).all()
    assert torch.equal(dequantize(*quantize(torch.zeros(32)), torch.float32), torch.zeros(32))


@needs_native
def test_a_row_outside_its_tensors_is_refused():
    s = Sequences([64], 2, 2, 32, "fp32", torch.float32)
    for row in ((1, 0, 64, 0), (0, 1, 64, 0), (0, 0, 64, 1), (-1, 0, 64, 0)):
        with pytest.raises(ValueError, match="outside its tensors"):
            paged_attention(*s.qkv[0], s.pool, Ragged(s.tables, torch.tensor([row]), s.pool.device), LAYER)


def test_projections_side_by_side_need_no_copy():
    """Keys and values as slices of one fused projection."""
    s = Sequences([90], 4, 2, 32, "fp32", torch.float32)
    q, k, v = s.qkv[0]
    fused = torch.cat((k.flatten(1), v.flatten(1)), 1)
    k2, v2 = (x.unflatten(1, (2, 32)) for x in fused.split(64, 1))
    ragged = Ragged(s.tables, torch.tensor([(0, 0, 90, 0)]), s.pool.device)
    assert not k2.is_contiguous()
    assert torch.equal(
        paged_attention(q, k2, v2, s.pool, ragged, LAYER), paged_attention(q, k, v, s.pool, ragged, LAYER)
    )
