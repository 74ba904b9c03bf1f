"""The cache: its bytes, its growth, and pages that sequences share, copy and give back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine.cache import PagedCache
from herd.engine.memory import nbytes
from herd.engine.pages import Pages, chain
from herd.errors import EngineError
from herd.kernels.page_layout import BYTES, PAGE
from herd.kernels.paged_attention import read
from herd.llama import SIZES, ModelConfig

TINY = ModelConfig(vocab_size=8, dim=64, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=4)


@pytest.mark.parametrize("kind", BYTES)
def test_the_cache_takes_the_bytes_that_nbytes_computes(kind):
    cache = PagedCache(TINY, kind, nbytes(TINY, 3, 100, BYTES[kind]), context=128)
    assert cache.nbytes == 0
    assert cache.pool.numel() == nbytes(TINY, 3, 100, BYTES[kind])
    for _ in range(3):
        cache.grow(cache.open(), 100)
    assert cache.nbytes == cache.pool.numel()


def test_the_size_of_a_cache_is_the_published_one():
    """8B in bf16 takes 128 KiB per token, 16 GiB for 131,072. With int8 there is a 16-bit scale per 32 bytes."""
    assert nbytes(SIZES["8B"], 1, 131_072) == 16 << 30
    assert nbytes(SIZES["8B"], 1, 131_072, BYTES["int8"]) == (8 << 30) * 34 // 32


def test_a_pool_of_addresses_takes_no_memory():
    """If it took memory, 16 TiB would be refused or this process killed."""
    cache = PagedCache(TINY, "fp32", 1 << 36)
    cache.grow(row := cache.open(), 1)
    cache.pool[row.pages[0]] = 1
    assert cache.nbytes == cache.page_bytes


def test_impossible_caches_are_refused():
    with pytest.raises(EngineError, match="kv='int4': the cache can be fp32, bf16, int8 or auto"):
        PagedCache(TINY, "int4", 1 << 20)
    with pytest.raises(EngineError, match="multiple of 32, not 24"):
        PagedCache(TINY.replace(head_dim=24), "int8", 1 << 20)


class Sequences:
    """A cache in which every key is the number of its token, and plain lists of the tokens it should hold."""

    def __init__(self) -> None:
        self.cache = PagedCache(TINY, "fp32", 1 << 24)
        self.rows: list = []
        self.tokens: list[list[int]] = []
        self.count = 0

    def extend(self, i: int, tokens: list[int]) -> None:
        row = self.rows[i]
        self.cache.grow(row, row.length + len(tokens))
        _, attend = self.cache.step([(row, len(tokens))])
        values = torch.tensor(tokens, dtype=torch.float32)[None, :, None, None].expand(1, -1, 2, 32)
        for layer in range(2):
            attend(layer, values, values, values)
        self.tokens[i] += tokens

    def add(self, row, tokens: list[int]) -> None:
        self.rows.append(row)
        self.tokens.append(tokens)

    def check(self) -> None:
        held: dict[int, int] = {}
        for row, tokens in zip(self.rows, self.tokens, strict=True):
            assert row.length == len(tokens)
            k, v = read(self.cache.pool, 1, torch.tensor(row.pages, dtype=torch.int64), 32, torch.float32)
            assert k[: row.length, 1, 5].tolist() == tokens == v[: row.length, 0, 31].tolist()
            for page in row.pages:
                held[page] = held.get(page, 0) + 1
        assert held == self.cache.pages._users


@settings(max_examples=40)
@given(st.data())
def test_any_history_keeps_every_sequence(data):
    """Sequences are opened, extended, forked, truncated, remembered, matched and closed in any order."""
    s = Sequences()
    for _ in range(data.draw(st.integers(1, 15))):
        acts = ["open", "extend", "fork", "truncate", "remember", "close"] if s.rows else ["open"]
        act = data.draw(st.sampled_from(acts))
        i = data.draw(st.integers(0, len(s.rows) - 1)) if s.rows else 0
        if act == "open":  # begins with what another sequence holds, and finds as much of it as is remembered
            tokens = list(data.draw(st.sampled_from(s.tokens))) if s.tokens else []
            digests: list[bytes] = []
            chain(digests, "me", tokens, len(tokens))
            row = s.cache.open()
            s.cache.match(row, digests)
            s.add(row, tokens[: row.length])
        elif act == "extend":
            n = data.draw(st.sampled_from([1, 5, PAGE - 1, PAGE, 2 * PAGE + 3]))
            s.count += n
            s.extend(i, list(range(s.count - n, s.count)))
        elif act == "fork":
            s.add(s.cache.fork(s.rows[i]), list(s.tokens[i]))
        elif act == "truncate":
            n = data.draw(st.integers(0, s.rows[i].length))
            s.cache.truncate(s.rows[i], n)
            del s.tokens[i][n:]
        elif act == "remember":
            s.cache.remember(s.rows[i], "me", s.tokens[i])
        else:
            s.cache.close(s.rows.pop(i))
            s.tokens.pop(i)
        s.check()


def test_a_page_is_found_by_all_tokens_before_it():
    tokens, other = list(range(2 * PAGE)), [9, *range(1, 2 * PAGE)]
    a, b = [], []
    chain(a, "", tokens, len(tokens))
    chain(b, "", other, len(other))
    assert len(a) == 2
    assert not set(a) & set(b)


def test_the_page_that_idled_longest_is_reused_first():
    pages = Pages(limit=3, capacity=3)
    taken = [pages.take() for _ in range(3)]
    for page in taken:
        pages.remember(page, bytes([page]))
    pages.give(taken[:1])
    pages.give(taken[1:])
    assert (pages.n_used, pages.available) == (0, 3)
    pages.share(taken[0])  # found again: it idles no longer
    pages.give(taken[:1])
    assert pages.take() == taken[2]  # of the two given together the later part goes first
    assert pages.find(bytes([taken[2]])) is None
    assert pages.take() == taken[1]
    assert pages.find(bytes([taken[0]])) == taken[0]
