"""Decide which requests are active, and which of their tokens each step computes. Does not import torch.

Requests wait in one queue for each owner, first come, first served. The owner with the fewest active requests
goes next, so a flood of one owner delays its own requests and not those of others. If all places are taken
and the owners' numbers of active requests differ by two or more, the latest request of the owner with the
most gives up its place: it waits again, and its pages stay findable until they are reused.

A step computes the next token of every sequence that decodes, and pieces of prompts up to a bound (`admit`
first, then `plan`). Owners share this bound equally. What one does not need goes to the others.

When pages run out, the latest request of the owner with the most pages frees its pages and waits again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..errors import EngineError
from ..kernels.page_layout import PAGE
from .pages import PageBook, chain

if TYPE_CHECKING:
    from .stream import Sequence


class Scheduler:
    """The waiting and the active sequences of an engine, at most ``max_batch`` active at once.

    ``released`` is called for each sequence that leaves the cache. ``keeps_last``: a sequence that had to
    begin again leaves its last token for a step of its own, so that draft tokens follow it as before.
    """

    def __init__(
        self,
        book: PageBook,
        max_batch: int,
        released: Callable[[Sequence], None] = lambda sequence: None,
        keeps_last: bool = False,
    ) -> None:
        self.book, self.max_batch = book, max_batch
        self.active: list[Sequence] = []
        """In the order of their submission."""
        self.n_preempted = 0
        self._released, self._keeps_last = released, keeps_last
        self._waiting: dict[str, deque[Sequence]] = {}
        self._turns: dict[str, int] = {}  # number of the last admission of each owner
        self._submitted = self._admitted = 0

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that have not begun, or had to free their pages."""
        return [sequence for waiting in self._waiting.values() for sequence in waiting]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind the others of its owner."""
        sequence.number, self._submitted = self._submitted, self._submitted + 1
        self._waiting.setdefault(sequence.owner, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, which is waiting or active, and free its pages."""
        if sequence.in_cache is not None:
            self._released(sequence)
            self.book.close(sequence.cached)
            sequence.in_cache = None
            self.active.remove(sequence)
        else:
            self._waiting[sequence.owner].remove(sequence)
        if not self._waiting.get(sequence.owner):
            self._waiting.pop(sequence.owner, None)
            if all(other.owner != sequence.owner for other in self.active):
                self._turns.pop(sequence.owner, None)

    def admit(self) -> None:
        """Begin waiting sequences while there are enough pages for them and for the growth of active ones.

        If there are not enough for the next sequence, the others wait with it, so that a long prompt gets
        its pages at last.
        """
        if not self._waiting:
            return
        computing = {digest for s in self.active for digest in s.digests[len(s.cached.digests) :]}
        put_off: set[str] = set()
        while (owner := self._next_owner(put_off)) is not None:
            n_active = Counter(sequence.owner for sequence in self.active)
            richest = max(self.active, key=lambda s: (n_active[s.owner], s.number), default=None)
            full = len(self.active) >= self.max_batch
            if full and (richest is None or n_active[richest.owner] < n_active[owner] + 2):
                return
            sequence = self._waiting[owner][0]
            chain(sequence.digests, sequence.tenant, sequence.tokens, len(sequence.tokens) - 1)
            shareable = sequence.digests[: sequence.n_shareable // PAGE]
            cached = self.book.open()
            self.book.match(cached, shareable)
            missing = shareable[len(cached.digests) :]
            if missing and missing[0] in computing:
                # a page that an active sequence is about to compute is worth waiting for
                self.book.close(cached)
                put_off.add(owner)
                continue
            needed = self.book.lacking(cached, sequence.soon)
            needed += sum(self.book.lacking(s.cached, s.soon) for s in self.active)
            if self.active and needed > self.book.pages.available:
                self.book.close(cached)
                return
            if full and richest is not None:
                self._preempt(richest)
            self._waiting[owner].popleft()
            if not self._waiting[owner]:
                del self._waiting[owner]
            self._admitted += 1
            self._turns[owner] = self._admitted
            sequence.in_cache = cached
            sequence.begin(cached.length)
            computing.update(sequence.digests[len(cached.digests) :])
            self.active.append(sequence)
            self.active.sort(key=lambda sequence: sequence.number)

    def plan(self, room: int, drafts: Mapping[Sequence, int | None]) -> list[tuple[Sequence, int]]:
        """Take pages for a step, and return its sequences and the number of tokens that each feeds.

        ``room`` bounds the tokens of prompts, and ``drafts`` are the numbers of draft tokens that follow the
        last token of a sequence (None: it skips this step).
        """
        wanted: dict[Sequence, int] = {}
        for sequence in self.active:
            n = len(sequence.tokens) - sequence.cached.length
            if n > 1:
                wanted[sequence] = n - 1 if sequence.n_new and self._keeps_last else n
        pieces = _divide(wanted, room) if wanted else {}
        parts: list[tuple[Sequence, int]] = []
        for sequence in list(self.active):
            draft, n = drafts.get(sequence, 0), pieces.get(sequence, 1)
            if sequence.in_cache is None or draft is None or not n:
                continue
            try:
                if self._make_room(sequence, sequence.cached.length + n + draft):
                    parts.append((sequence, n))
            except EngineError as error:
                sequence.fail(error)
                self.remove(sequence)
        # a later sequence may have taken the pages of an earlier one of another owner
        return [(sequence, n) for sequence, n in parts if sequence.in_cache is not None]

    def _next_owner(self, put_off: set[str]) -> str | None:
        """Return the owner with the fewest active sequences, of these the one that has waited longest."""
        n_active = Counter(sequence.owner for sequence in self.active)
        owners = self._waiting.keys() - put_off
        return min(
            owners,
            key=lambda owner: (n_active[owner], self._turns.get(owner, 0), self._waiting[owner][0].number),
            default=None,
        )

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Take pages for ``length`` tokens of a sequence, if necessary from others.

        Returns False if the sequence had to free its own pages.
        """
        book = self.book
        while book.lacking(sequence.cached, length) > book.pages.available and len(self.active) > 1:
            held: Counter[str] = Counter()
            for each in self.active:
                held[each.owner] += len(each.cached.pages)
            victim = max(self.active, key=lambda each: (held[each.owner], each.number))
            self._preempt(victim)
            if victim is sequence:
                return False
        book.grow(sequence.cached, length)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Make an active sequence wait again, as the first of its owner."""
        turn = self._turns[sequence.owner]
        self.remove(sequence)
        self._turns[sequence.owner] = turn
        self._waiting.setdefault(sequence.owner, deque()).appendleft(sequence)
        self.n_preempted += 1


def _divide(wanted: Mapping[Sequence, int], room: int) -> dict[Sequence, int]:
    """Divide ``room`` tokens among prompts: equally among owners, and in the order of one owner's prompts.

    An owner that wants less than its part leaves the rest to the others. Each gets one token at least.
    """
    by_owner: dict[str, list[Sequence]] = {}
    for sequence in wanted:
        by_owner.setdefault(sequence.owner, []).append(sequence)
    totals = {owner: sum(wanted[s] for s in sequences) for owner, sequences in by_owner.items()}
    room = max(room, len(totals)) if room else 0
    pieces: dict[Sequence, int] = {}
    for index, owner in enumerate(sorted(totals, key=lambda owner: totals[owner])):
        part = min(totals[owner], room // (len(totals) - index))
        room -= part
        for sequence in by_owner[owner]:
            pieces[sequence] = min(wanted[sequence], part)
            part -= pieces[sequence]
    return pieces
