"""Manage the KV cache's pages with a free list, reference counts, and an index of full pages by content.

A full page can be found by the hash of all tokens up to its end. Each page's hash includes the hash of the
page before it, and the first page's hash includes the tenant's name, so that no tenant can find another
tenant's pages. Sequences with the same tokens share the page. When no sequence uses it any longer, it is
idle, and when pages run short, the page that has been idle longest is reused first. This is vLLM's automatic
prefix caching. `PageBook` gives pages to sequences. There are no tensors here: pages are numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import EngineError
from ..kernels.page_layout import PAGE
from .memory import n_pages


class Pages:
    """The pages of a cache: ``limit`` to hand out, and up to ``capacity`` for a single long sequence."""

    def __init__(self, limit: int, capacity: int) -> None:
        self.limit, self.capacity = limit, capacity
        self.touched = 0
        """Number of pages ever handed out. Their numbers are below this."""
        self._free: list[int] = []
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def n_used(self) -> int:
        """Pages that sequences use now. A shared page counts once."""
        return len(self._users)

    @property
    def available(self) -> int:
        """Pages that can be taken within the limit. Negative if it is exceeded."""
        return self.limit - self.n_used

    @property
    def n_findable(self) -> int:
        """Pages that can be found by their content, used or idle."""
        return len(self._by_digest)

    def take(self) -> int:
        """Return a page with one user: a free page, a page never used, or the page that has been idle
        longest. Raises EngineError if all are in use."""
        if self._free:
            page = self._free.pop()
        elif self.touched < self.limit or (not self._idle and self.touched < self.capacity):
            page, self.touched = self.touched, self.touched + 1
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._by_digest[self._digests.pop(page)]
        else:
            raise EngineError(f"the cache is full: all {self.capacity} pages are in use; raise cache_bytes")
        self._users[page] = 1
        return page

    def share(self, page: int) -> int:
        """Add a user to a page, and return it."""
        self._users[page] = self._users.get(page, 0) + 1
        self._idle.pop(page, None)
        return page

    def give(self, pages: Sequence[int]) -> None:
        """Remove a user from each page. Later pages, useless without the earlier ones, are reused first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._digests:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def find(self, digest: bytes) -> int | None:
        """Return the page with this content, or None."""
        return self._by_digest.get(digest)

    def remember(self, page: int, digest: bytes) -> None:
        """Make a full page findable, unless another page has the same content."""
        if digest not in self._by_digest:
            self._by_digest[digest] = page
            self._digests[page] = digest

    def writable(self, page: int) -> bool:
        """Return whether the only user of a page may change it: nobody else uses it or can find it."""
        return self._users[page] == 1 and page not in self._digests


@dataclass(eq=False)
class Cached:
    """A sequence in the cache: its line in the table of pages, the number of its tokens, and their pages."""

    line: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


class PageBook:
    """The sequences of a cache and their pages, of those that ``pages`` hands out."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self._n_lines = 0
        self._free_lines: list[int] = []

    def open(self) -> Cached:
        """Return a new, empty sequence."""
        if not self._free_lines:
            self._free_lines.append(self._n_lines)
            self._n_lines += 1
        return Cached(self._free_lines.pop())

    def close(self, cached: Cached) -> None:
        """Free the pages of a sequence. Full pages can be found by their content until they are reused."""
        self.pages.give(cached.pages)
        self._free_lines.append(cached.line)
        cached.pages, cached.length = [], 0

    def lacking(self, cached: Cached, length: int) -> int:
        """Return the number of pages that a sequence lacks for ``length`` tokens."""
        return max(0, n_pages(length) - len(cached.pages))

    def grow(self, cached: Cached, length: int) -> None:
        """Take the pages that a sequence lacks for ``length`` tokens. The caller checks `Pages.available`.

        Raises EngineError if not even pages beyond the limit are free.
        """
        taken: list[int] = []
        try:
            for _ in range(self.lacking(cached, length)):
                taken.append(self.pages.take())
        finally:
            self._append(cached, taken)

    def match(self, cached: Cached, digests: Sequence[bytes]) -> None:
        """Give an empty sequence the pages with these hashes, up to the first hash without a page."""
        found: list[int] = []
        for digest in digests:
            if (page := self.pages.find(digest)) is None:
                break
            found.append(self.pages.share(page))
        self._append(cached, found)
        cached.length, cached.digests = len(found) * PAGE, list(digests[: len(found)])

    def remember(self, cached: Cached, tenant: str, tokens: Sequence[int]) -> None:
        """Make the full pages of a sequence, the first of ``tokens``, findable for the tenant."""
        known = len(cached.digests)
        if cached.length // PAGE > known:
            chain(cached.digests, tenant, tokens, cached.length)
            for page, digest in zip(cached.pages[known:], cached.digests[known:], strict=False):
                self.pages.remember(page, digest)

    def _append(self, cached: Cached, pages: list[int]) -> None:
        cached.pages += pages


def chain(known: list[bytes], tenant: str, tokens: Sequence[int], length: int) -> None:
    """Extend ``known``, the hashes of full pages, to all full pages of the first ``length`` tokens."""
    for start in range(len(known) * PAGE, length - PAGE + 1, PAGE):
        before = known[-1] if known else hashlib.blake2b(tenant.encode(), digest_size=16).digest()
        page = array("i", tokens[start : start + PAGE]).tobytes()
        known.append(hashlib.blake2b(before + page, digest_size=16).digest())
