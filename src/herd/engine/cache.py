"""The KV cache: pages of 64 tokens in one pool, and a table of pages for each sequence.

The pool is a range of *addresses* as long as the cache may ever become; a page gets memory when it is first
written. So the cache grows without copying, and what it holds is `nbytes`, to the byte. (A GPU has no
addresses without memory: there the pool is allocated whole.) Sequences share the pages of a common beginning;
a page that others hold or can find is copied before it is changed.

A model attends through a `PagedAttention` (an `llama.attention.Attend`) of the new tokens of any number of
sequences, concatenated: it never sees a cache, and a decode step, a piece of a prompt and both together are
one forward.

Shapes: N new tokens of all sequences, H query heads, G KV heads, K head dim, P pages, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import EngineError
from ..kernels.large_pages import reserve
from ..kernels.page_layout import BLOCK, BYTES, PAGE, head_bytes
from ..kernels.paged_attention import Ragged, paged_attention
from ..llama.config import ModelConfig
from .memory import n_pages, page_nbytes
from .pages import Pages, chain


@dataclass(eq=False)
class Cached:
    """A sequence in the cache: the number of its tokens there, their pages, and its line in the table."""

    line: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class PagedAttention:
    """The attention of one step's new tokens: it writes them to the cache and reads it, layer by layer."""

    pool: Tensor
    ragged: Ragged

    def __call__(self, layer: int, q_1NHK: Tensor, k_1NGK: Tensor, v_1NGK: Tensor) -> Tensor:
        return paged_attention(q_1NHK[0], k_1NGK[0], v_1NGK[0], self.pool, self.ragged, layer)[None]


class PagedCache:
    """A KV cache of "fp32", "bf16" or "int8" values (``kind``).

    ``cache_bytes`` is what all sequences together may take, but a single one may always reach ``context``.
    Raises EngineError for an unknown kind, and for a head size that blocks of int8 do not divide.
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
        self.pages = Pages(limit, max(limit, self._line_pages))
        self._pool: Tensor | None = None
        self._tables = torch.zeros(0, self._line_pages, dtype=torch.int32)
        self._lines: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all pages written so far; `memory.nbytes` computes the same."""
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
        """Return a new, empty sequence."""
        if not self._lines:
            n = len(self._tables)
            self._tables = torch.cat((self._tables, self._tables.new_zeros(max(4, n), self._line_pages)))
            self._lines = list(range(n, len(self._tables)))
        return Cached(self._lines.pop())

    def close(self, cached: Cached) -> None:
        """Free the pages of a sequence. Full ones can be found by their content until they are needed."""
        self.pages.give(cached.pages)
        self._lines.append(cached.line)
        cached.pages, cached.length = [], 0

    def lacking(self, cached: Cached, length: int) -> int:
        """Return how many more pages a sequence needs to hold ``length`` tokens."""
        return max(0, n_pages(length) - len(cached.pages))

    def grow(self, cached: Cached, length: int) -> None:
        """Take the pages to hold ``length`` tokens; compare `lacking` with `Pages.available` before."""
        self._append(cached, [self.pages.take() for _ in range(self.lacking(cached, length))])

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
        """Return another sequence with the same tokens, sharing full pages and copying an unfinished one."""
        full = cached.length // PAGE
        twin = self.open()
        self._append(twin, [self.pages.share(page) for page in cached.pages[:full]])
        if cached.length % PAGE:
            self._append(twin, [self._copy(cached.pages[full])])
        twin.length, twin.digests = cached.length, cached.digests[:full]
        return twin

    def match(self, cached: Cached, digests: Sequence[bytes]) -> None:
        """Give an empty sequence the pages that are known already, as far as these hashes agree."""
        found: list[int] = []
        for digest in digests:
            if (page := self.pages.find(digest)) is None:
                break
            found.append(self.pages.share(page))
        self._append(cached, found)
        cached.length, cached.digests = len(found) * PAGE, list(digests[: len(found)])

    def remember(self, cached: Cached, tenant: str, tokens: Sequence[int]) -> None:
        """Make the full pages of a sequence findable for the tenant; it holds the first of ``tokens``."""
        known = len(cached.digests)
        if cached.length // PAGE > known:
            chain(cached.digests, tenant, tokens, cached.length)
            for page, digest in zip(cached.pages[known:], cached.digests[known:], strict=False):
                self.pages.remember(page, digest)

    def step(self, parts: Sequence[tuple[Cached, int]]) -> tuple[Tensor, PagedAttention]:
        """Return positions (1, N) and attention for the next n tokens of each (sequence, n), concatenated in
        order.

        The pages must have been taken (`grow`). The sequences hold these tokens from now on.
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
        cached.pages += pages
        if pages:
            self._tables[cached.line, first : len(cached.pages)] = torch.tensor(pages, dtype=torch.int32)

    def _copy(self, page: int) -> int:
        copy = self.pages.take()
        self.pool[copy] = self.pool[page]
        return copy


def _reserve(n: int, device: torch.device) -> Tensor:
    """Reserve ``n`` bytes: on the CPU only addresses, in large pages where the system has them."""
    if device.type != "cpu":
        return torch.zeros(n, dtype=torch.uint8, device=device)
    try:
        return reserve(n)
    except OSError as error:
        raise EngineError(
            f"no room for a cache of {n / 1e9:.1f} GB ({error}): lower cache_bytes or max_context"
        ) from None
