"""Which pages of the KV cache are whose: a free list, reference counts and a memory of full pages by their content.

A page that is full can be found again by the hash of all tokens up to its end (a chain: each page's hash contains its
predecessor's, and the first one the tenant's name, so that nobody can find what another tenant computed). Whoever asks
for the same tokens shares the page; when nobody uses it any longer it idles, and the one that idles longest goes first
when pages run short. This is vLLM's automatic prefix caching. No tensors here: pages are numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from ..kernels.page_layout import PAGE


class Pages:
    """``limit`` pages to hand out; beyond them, up to ``capacity``, only when `take` is told so."""

    def __init__(self, limit: int, capacity: int) -> None:
        self.limit, self.capacity = limit, capacity
        self.touched = 0
        """Pages ever handed out: page numbers run from 0 to this."""
        self._free: list[int] = []
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def n_used(self) -> int:
        """Pages that sequences hold now, shared ones counted once."""
        return len(self._users)

    @property
    def n_idle(self) -> int:
        """Pages that nobody holds and whose content is still known."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Pages that can be taken within the limit; negative where it was exceeded."""
        return self.limit - self.n_used

    def take(self) -> int:
        """A page of one's own: a free one, one never used, or that which idled longest."""
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
        """One more user of a page."""
        self._users[page] = self._users.get(page, 0) + 1
        self._idle.pop(page, None)
        return page

    def give(self, pages: Sequence[int]) -> None:
        """One user less for each; the last pages of a sequence idle longest, since they need those before them."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._digests:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def find(self, digest: bytes) -> int | None:
        """The page with this content."""
        return self._by_digest.get(digest)

    def remember(self, page: int, digest: bytes) -> None:
        """A page is full and its content settled. Where another page holds the same, that one stays the known one."""
        if digest not in self._by_digest:
            self._by_digest[digest] = page
            self._digests[page] = digest

    def writable(self, page: int) -> bool:
        """Whether a sequence that holds the page may change it: nobody else holds it or may find it."""
        return self._users[page] == 1 and page not in self._digests

    def _forget(self, page: int) -> None:
        del self._by_digest[self._digests.pop(page)]


def chain(known: list[bytes], tenant: str, tokens: Sequence[int], length: int) -> None:
    """Add to ``known``, the hashes of a sequence's first pages, those of all pages that its first tokens fill."""
    for start in range(len(known) * PAGE, length - PAGE + 1, PAGE):
        before = known[-1] if known else hashlib.blake2b(tenant.encode(), digest_size=16).digest()
        page = array("i", tokens[start : start + PAGE]).tobytes()
        known.append(hashlib.blake2b(before + page, digest_size=16).digest())
