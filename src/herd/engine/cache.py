"""Keep the keys and values of many sequences in pages of 64 tokens, with a table of pages for each sequence.

On a CPU the pool reserves *addresses* for the largest size that the cache may reach, and a page gets memory
when it is first written. So the cache grows without copying, and it takes exactly `nbytes` bytes. (On a GPU,
addresses without memory do not exist, so the whole pool is allocated at once.) Sequences share the pages of a
common beginning. A page that other sequences use, or that can be found by its content, is copied before it is
changed.

A model attends through a `PagedAttention` (an `llama.attention.Attend`) over the concatenated new tokens of
any number of sequences, and never sees the cache itself. So a decode step, a chunk of a prompt, and both
together are one forward.

Shapes: N new tokens of all sequences, H query heads, G KV heads, K head dim, P pages, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import units
from ..errors import EngineError
from ..kernels.large_pages import reserve
from ..kernels.page_layout import BLOCK, BYTES, PAGE, head_bytes
from ..kernels.paged_attention import Ragged, paged_attention
from ..llama.config import ModelConfig
from .memory import n_pages, page_nbytes
from .pages import Cached, PageBook, Pages


@dataclass(frozen=True)
class PagedAttention:
    """The attention of one step's new tokens: it writes them to the cache and reads it, layer by layer."""

    pool: Tensor
    ragged: Ragged

    def __call__(self, layer: int, q_1NHK: Tensor, k_1NGK: Tensor, v_1NGK: Tensor) -> Tensor:
        return paged_attention(q_1NHK[0], k_1NGK[0], v_1NGK[0], self.pool, self.ragged, layer)[None]


class PagedCache(PageBook):
    """A KV cache of "fp32", "bf16" or "int8" values (``kind``).

    ``cache_bytes`` bounds the bytes of all sequences together, but a single sequence may always reach
    ``context`` tokens (default: the model's context). Raises EngineError for an unknown kind, and for int8
    with a head size that is no multiple of its block.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        cache_bytes: int,
        context: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if kind not in BYTES:
            raise EngineError(f"kv={kind!r}: the cache can be {', '.join(BYTES)} or auto")
        if kind == "int8" and config.head_dim % BLOCK:
            raise EngineError(
                f'kv="int8" needs a head_dim that is a multiple of {BLOCK}, not {config.head_dim}: use "bf16"'
            )
        self.config, self.kind, self.device = config, kind, torch.device(device)
        self.page_bytes = page_nbytes(config, BYTES[kind])
        self._line_pages = n_pages(context or config.max_context)
        limit = max(1, cache_bytes // self.page_bytes)
        super().__init__(Pages(limit, max(limit, self._line_pages)))
        self._pool: Tensor | None = None
        self._tables = torch.zeros(0, self._line_pages, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages taken so far. `memory.nbytes` predicts this number."""
        return self.pages.touched * self.page_bytes

    @property
    def pool(self) -> Tensor:
        """All pages as a tensor (P, L, G, bytes of a head) uint8."""
        if self._pool is None:
            c = self.config
            shape = (self.pages.capacity, c.n_layers, c.n_kv_heads, head_bytes(self.kind, c.head_dim))
            self._pool = _reserve(self.pages.capacity * self.page_bytes, self.device).view(shape)
        return self._pool

    def open(self) -> Cached:
        cached = super().open()
        if cached.line >= (n := len(self._tables)):
            self._tables = torch.cat((self._tables, self._tables.new_zeros(max(4, n), self._line_pages)))
        return cached

    def truncate(self, cached: Cached, length: int) -> None:
        """Drop all tokens from ``length`` on."""
        keep = n_pages(length)
        self.pages.give(cached.pages[keep:])
        del cached.pages[keep:], cached.digests[length // PAGE :]
        cached.length = length
        if length % PAGE and not self.pages.writable(cached.pages[-1]):
            shared = cached.pages.pop()
            self._append(cached, [self._copy(shared)])
            self.pages.give([shared])

    def fork(self, cached: Cached) -> Cached:
        """Return a sequence with the same tokens that shares full pages and copies a partly filled one."""
        full = cached.length // PAGE
        twin = self.open()
        self._append(twin, [self.pages.share(page) for page in cached.pages[:full]])
        if cached.length % PAGE:
            self._append(twin, [self._copy(cached.pages[full])])
        twin.length, twin.digests = cached.length, cached.digests[:full]
        return twin

    def step(self, parts: Sequence[tuple[Cached, int]]) -> tuple[Tensor, PagedAttention]:
        """Add the next n tokens of each (sequence, n) and return their positions (1, N) and attention.

        The pages must have been taken before (`grow`).
        """
        rows: list[tuple[int, int, int, int]] = []
        positions: list[int] = []
        start = 0
        for cached, n in parts:
            rows.append((cached.line, start, n, cached.length))
            positions += range(cached.length, cached.length + n)
            cached.length += n
            start += n
        ragged = Ragged(self._tables, torch.tensor(rows), self.device)
        return torch.tensor([positions], device=self.device), PagedAttention(self.pool, ragged)

    def _append(self, cached: Cached, pages: list[int]) -> None:
        first = len(cached.pages)
        super()._append(cached, pages)
        if pages:
            self._tables[cached.line, first : len(cached.pages)] = torch.tensor(pages, dtype=torch.int32)

    def _copy(self, page: int) -> int:
        copy = self.pages.take()
        self.pool[copy] = self.pool[page]
        return copy


def _reserve(n: int, device: torch.device) -> Tensor:
    """Reserve ``n`` bytes. On a CPU these are only addresses, in large pages if the system has them."""
    if device.type != "cpu":
        return torch.zeros(n, dtype=torch.uint8, device=device)
    try:
        return reserve(n)
    except OSError as error:
        raise EngineError(
            f"cannot reserve a cache of {units.nbytes(n)} ({error}): lower cache_bytes or max_context"
        ) from None
