"""The scheduler alone, with pages but without a model: nobody starves, and owners take turns."""

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from herd.engine.pages import Cached, PageBook, Pages
from herd.engine.scheduler import Scheduler
from herd.kernels.page_layout import PAGE


@dataclass(eq=False)
class Answer:
    """A request of ``owner`` whose answer has ``limit`` tokens. ``start`` is the first token of its prompt."""

    owner: str
    n_prompt: int
    limit: int
    start: int = 0
    tenant: str = ""
    number: int = -1
    n_new: int = 0
    digests: list[bytes] = field(default_factory=list)
    in_cache: Cached | None = None
    error: Exception | None = None
    n_begun: int = 0

    def __post_init__(self) -> None:
        self.tokens = [self.start] * self.n_prompt

    @property
    def cached(self) -> Cached:
        assert self.in_cache is not None
        return self.in_cache

    @property
    def n_shareable(self) -> int:
        return len(self.tokens) - 1

    @property
    def soon(self) -> int:
        return min(len(self.tokens) + PAGE, self.n_prompt + self.limit - 1)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.cached.length

    def begin(self, shared_tokens: int) -> None:
        self.n_begun += 1

    def fail(self, error: Exception) -> None:
        self.error = error


class Simulation:
    """An engine whose forward only counts."""

    def __init__(self, n_pages: int, max_batch: int, room: int = 100, longest: int = 2000) -> None:
        book = PageBook(Pages(n_pages, max(n_pages, longest // PAGE + 1)))
        self.scheduler = Scheduler(book, max_batch)
        self.room, self.ended, self.begun = room, [], []

    def step(self) -> list[tuple[Answer, int]]:
        scheduler, pages = self.scheduler, self.scheduler.book.pages
        scheduler.admit()
        self.begun += [s for s in scheduler.active if s not in self.begun]
        before = {s: s.pending for s in scheduler.active}
        parts = scheduler.plan(self.room, {})
        assert pages.n_used <= pages.limit or len(scheduler.active) == 1
        users = Counter(page for s in scheduler.active for page in s.cached.pages)
        assert users == pages._users
        assert len({s for s, _ in parts}) == len(parts)
        assert [s.number for s, _ in parts] == sorted(s.number for s, _ in parts)
        owners = {s.owner for s, n in before.items() if n > 1}
        assert sum(n for s, n in parts if before[s] > 1) <= max(self.room, len(owners))
        # whoever decodes and has pages is never left out
        assert {s for s in scheduler.active if before[s] == 1} <= {s for s, _ in parts}
        for s, n in parts:
            assert s.error is None
            s.cached.length += n
            assert s.cached.length <= len(s.cached.pages) * PAGE
            if s.cached.length == len(s.tokens):
                s.tokens.append(1000 + s.number)
                s.n_new += 1
            scheduler.book.remember(s.cached, s.tenant, s.tokens)
            if s.n_new == s.limit:
                scheduler.remove(s)
                self.ended.append(s)
        return parts

    def check_order(self) -> None:
        """Of one owner, the active requests were submitted before the waiting ones."""
        for s in self.scheduler.waiting:
            assert all(other.number < s.number for other in self.scheduler.active if other.owner == s.owner)


answers = st.builds(
    Answer,
    owner=st.sampled_from("abc"),
    n_prompt=st.sampled_from([1, 2, 63, 64, 65, 130, 500]),
    limit=st.integers(1, 150),
    start=st.integers(0, 3),
    tenant=st.sampled_from(["", "x"]),
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), answers), max_size=25),
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 200),
    st.sets(st.integers(0, 24)),
)
def test_every_request_ends_and_nothing_is_left(arrivals, n_pages, max_batch, room, cancelled):
    """Requests arrive between steps, some are cancelled at any moment, and there are few pages."""
    simulation = Simulation(n_pages, max_batch, room)
    scheduler, waits = simulation.scheduler, list(arrivals)
    submitted: list[Answer] = []
    gone = 0
    for step in range(30_000):
        while waits and (waits[0][0] <= step % 31 or not scheduler.active):
            submitted.append(waits.pop(0)[1])
            scheduler.add(submitted[-1])
        if step % 7 == 3 and step // 7 in cancelled and submitted:
            victim = submitted[(step * 31) % len(submitted)]
            if victim.in_cache is not None or victim in scheduler.waiting:
                scheduler.remove(victim)
                gone += 1
        if not (simulation.step() or waits or scheduler.waiting):
            break
        simulation.check_order()
    assert len(simulation.ended) + gone == len(submitted) == len(arrivals)
    assert scheduler.book.pages.n_used == 0
    assert not scheduler._waiting
    assert not scheduler._turns
    for owner in "abc":
        numbers = [s.number for s in simulation.begun if s.owner == owner]
        assert numbers == sorted(numbers)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.integers(1, 9), st.data())
def test_places_are_divided_evenly_among_owners_that_wait(owners, max_batch, data):
    simulation = Simulation(10_000, max_batch)
    for n, owner in enumerate(owners):
        simulation.scheduler.add(Answer(owner, 10, data.draw(st.integers(1, 20)), start=n))
        if data.draw(st.booleans()):
            simulation.step()
            simulation.scheduler.admit()
            n_active = Counter(s.owner for s in simulation.scheduler.active)
            for owner in simulation.scheduler._waiting:
                assert len(simulation.scheduler.active) == max_batch
                assert n_active[owner] >= max(n_active.values()) - 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(2, 400)), min_size=1, max_size=12),
    st.integers(1, 300),
)
def test_prompts_are_computed_in_equal_parts_for_each_owner(prompts, room):
    simulation = Simulation(10_000, 100, room)
    for n, (owner, length) in enumerate(prompts):
        simulation.scheduler.add(Answer(owner, length, 2, start=n))
    simulation.scheduler.admit()
    wanted: Counter[str] = Counter()
    for owner, length in prompts:
        wanted[owner] += length
    got: Counter[str] = Counter()
    pieces = {}
    for s, n in simulation.scheduler.plan(room, {}):
        got[s.owner] += n
        pieces[s.number] = n
    room = max(room, len(wanted))
    assert got.total() == min(room, wanted.total())
    for owner in wanted:
        assert got[owner] == wanted[owner] or got[owner] >= room // len(wanted)
        mine = [(n, length) for n, (other, length) in enumerate(prompts) if other == owner]
        computed = [pieces.get(n, 0) == length for n, length in mine]
        assert computed == sorted(computed, reverse=True)  # the oldest first
        assert sum(0 < pieces.get(n, 0) < length for n, length in mine) <= 1


def test_a_flood_of_one_owner_delays_another_owner_by_one_step_only():
    """All places are taken by answers of 500 tokens. One of them is interrupted, and no token is lost."""
    simulation = Simulation(10_000, 4)
    for n in range(50):
        simulation.scheduler.add(Answer("flood", 100, 500, start=n))
    for _ in range(10):
        simulation.step()
    late = Answer("late", 90, 3, start=99)
    simulation.scheduler.add(late)
    simulation.step()
    assert late.n_new == 1
    while late not in simulation.ended:
        before = {s: s.n_new for s in simulation.scheduler.active}
        simulation.step()
        assert all(s.n_new == n + 1 for s, n in before.items())
    assert simulation.scheduler.n_preempted == 1
    simulation.step()
    assert [s.number for s in simulation.scheduler.active] == [0, 1, 2, 3]


def test_scheduling_needs_no_torch():
    code = "import sys, herd.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
