"""Manage the KV cache's pages with a free list, reference counts, and an index of full pages by content.

A full page can be found by the hash of all tokens up to its end. Each page's hash includes the hash of the
page before it, and the first page's hash includes the tenant's name, so that no tenant can find another
tenant's pages. Sequences with the same tokens share the page. When no sequence uses it any longer, it is
idle, and when pages run short, the page that has been idle longest is reused first. This is vLLM's automatic
prefix caching. There are no tensors here: pages are numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from ..kernels.page_layout import PAGE


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
        longest."""
        if self._free:
            page = self._free.pop()
        elif self.touched < self.limit or (not self._idle and self.touched < self.capacity):
            page, self.touched = self.touched, self.touched + 1
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    def share(self, page: int) -> int:
        """Add a user to a page, and return it."""
        self._users[page] = self._users.get(page, 0) + 1
        self._idle.pop(page, None)
        return page

    def give(self, pages: Sequence[int]) -> None:
        """Remove a user from each page. The last pages are reused first: they are useless without the earlier
        ones."""
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

    def _forget(self, page: int) -> None:
        del self._by_digest[self._digests.pop(page)]


def chain(known: list[bytes], tenant: str, tokens: Sequence[int], length: int) -> None:
    """Extend ``known``, the hashes of full pages, to all full pages of the first ``length`` tokens."""
    for start in range(len(known) * PAGE, length - PAGE + 1, PAGE):
        before = known[-1] if known else hashlib.blake2b(tenant.encode(), digest_size=16).digest()
        page = array("i", tokens[start : start + PAGE]).tobytes()
        known.append(hashlib.blake2b(before + page, digest_size=16).digest())
