"""An engine in a thread of its own: the answers are the same, and no failure touches another request."""

import asyncio
import random
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.engine import Constraint, Engine, EngineLoop, Request, Sampling, Usage
from herd.engine.scheduler import Scheduler
from herd.errors import ConstraintError, EngineBusyError, EngineError


def request(i: int = 0, n: int = 20, **more) -> Request:
    return Request([i + 1, 7, 9], Sampling(max_tokens=n, temperature=1, seed=i), **more)


@pytest.fixture
def loop(model, tokenizer):
    with EngineLoop(Engine(model, tokenizer, max_batch=4)) as loop:
        yield loop
    assert loop.stats().used_pages == loop.stats().active == loop.stats().waiting == 0


def test_answers_read_from_asyncio_and_from_threads_equal_those_of_the_engine(loop, model, tokenizer):
    requests = [request(i) for i in range(12)]
    want = Engine(model, tokenizer, max_batch=4).run(requests)

    async def read(generation):
        return "".join([delta.text async for delta in generation])

    async def read_all():
        return await asyncio.gather(*(read(loop.submit(each)[0]) for each in requests))

    assert asyncio.run(read_all()) == [c.text for c in want]
    got = [loop.submit(each)[0] for each in requests]
    assert [generation.completion().ids for generation in got] == [c.ids for c in want]
    assert loop.stats().decoded_tokens == 2 * sum(len(c.ids) for c in want)


def test_n_answers_are_those_of_submit_many(loop, model, tokenizer):
    want = [s.completion().ids for s in Engine(model, tokenizer).submit_many(request(3), 3)]
    assert [g.completion().ids for g in loop.submit(request(3), n=3)] == want


def test_cancelling_ends_an_answer_and_returns_its_pages(loop):
    first, second = loop.submit(request(1, n=400)), loop.submit(request(2, n=30))
    next(first[0])
    first[0].cancel()
    assert [d.finish_reason for d in first[0]][-1] == "cancelled"
    assert len(second[0].completion().ids) == 30
    first[0].cancel()  # it has ended: nothing happens


def test_bad_requests_are_refused_by_submit(loop):
    with pytest.raises(EngineError, match="outside the model's vocabulary"):
        loop.submit(Request([1000]))


def test_a_bad_constraint_fails_its_own_request(loop):
    bad, good = loop.submit(request(1, constraint=Constraint.regex("(")))[0], loop.submit(request(2))[0]
    with pytest.raises(ConstraintError, match="malformed"):
        asyncio.run(bad.ready())
    with pytest.raises(ConstraintError, match="malformed"):
        next(bad)
    asyncio.run(good.ready())
    constrained = loop.submit(request(1, constraint=Constraint.regex("[ab]{5}")))[0]
    asyncio.run(constrained.ready())
    assert len(constrained.completion().text) == 5
    assert len(good.completion().ids) == 20


def test_a_full_queue_refuses_more(model, tokenizer, monkeypatch):
    engine, go = Engine(model, tokenizer, max_batch=1), threading.Event()
    monkeypatch.setattr(Scheduler, "admit", lambda self, admit=Scheduler.admit: (go.wait(), admit(self)))
    with EngineLoop(engine, max_waiting=3) as loop:
        some = loop.submit(request(1), n=3)
        with pytest.raises(EngineBusyError, match="3 requests wait for the engine"):
            loop.submit(request(2))
        go.set()
        assert all(len(each.completion().ids) == 20 for each in some)
        loop.submit(request(2))[0].completion()


def test_a_step_that_fails_ends_its_requests_with_an_error_and_the_loop_lives_on(loop, monkeypatch, caplog):
    engine, want = loop.engine, loop.submit(request(5))[0].completion()
    faulty, real = threading.Event(), engine._runner

    def forward(*args):
        if faulty.is_set():
            raise ZeroDivisionError("by zero")
        return real(*args)

    monkeypatch.setattr(engine, "_runner", forward)
    faulty.set()
    some = loop.submit(request(5), n=2)
    for each in some:
        with pytest.raises(EngineError, match="failed in a step of this answer: ZeroDivisionError: by zero"):
            each.completion()
    faulty.clear()
    assert "a step of the engine failed" in caplog.text
    assert loop.submit(request(5))[0].completion().ids == want.ids


def test_a_scheduler_that_fails_ends_those_that_wait_instead_of_failing_forever(loop, monkeypatch):
    scheduler, real, faults = loop.engine.scheduler, loop.engine.scheduler.admit, []

    def admit():
        if len(faults) < 1 and scheduler.waiting:
            faults.append(1)
            raise ZeroDivisionError
        real()

    monkeypatch.setattr(scheduler, "admit", admit)
    with pytest.raises(EngineError, match="failed in a step of this answer: ZeroDivisionError"):
        loop.submit(request(1))[0].completion()
    assert len(loop.submit(request(2))[0].completion().ids) == 20


def test_three_agents_in_turns_compute_little_of_their_prompts_again(make_model):
    """Each turn repeats the whole dialog before it. All of it but the last page of a turn comes from the cache."""
    dialogs = [[(7 * a + 3 * i) % 250 for i in range(600)] for a in range(3)]
    cached = computed = 0
    with EngineLoop(Engine(make_model(max_context=4096), None, max_batch=4)) as loop:
        for turn in range(20):
            asked = [
                loop.submit(Request(ids, Sampling(max_tokens=20), tenant="team", owner=str(a)))[0]
                for a, ids in enumerate(dialogs)
            ]
            for ids, generation in zip(dialogs, asked, strict=True):
                ids += [*generation.completion().ids, *((turn + i) % 250 for i in range(60))]
                if turn:
                    cached += generation.usage.cached_tokens
                    computed += generation.usage.prompt_tokens - generation.usage.cached_tokens
    assert cached / (cached + computed) >= 0.9


def test_close_lets_open_requests_finish_or_cancels_them(model, tokenizer):
    others = set(threading.enumerate())
    for drain, reason in ((60, "length"), (0, "cancelled")):
        loop = EngineLoop(Engine(model, None, max_batch=1))
        some = [loop.submit(request(i, n=200))[0] for i in range(3)]
        next(some[0])
        loop.close(drain)
        assert [[d.finish_reason for d in each][-1] for each in some][1:] == [reason] * 2
        with pytest.raises(EngineBusyError, match="closing"):
            loop.submit(request(1))
        assert not loop._thread.is_alive()
        assert not any(t.name.startswith("herd-") for t in set(threading.enumerate()) - others)


def test_constraints_of_one_owner_are_compiled_one_at_a_time_and_others_meanwhile(loop, monkeypatch):
    """A flood of constraints that compile forever does not delay another owner, nor decoding, nor the end."""
    go, real, slow = threading.Event(), loop.engine.compile, Constraint.regex("slow")
    started = []

    def compile(constraint):
        if constraint == slow:
            started.append(1)
            go.wait()
        return real(constraint)

    monkeypatch.setattr(loop.engine, "compile", compile)
    flood = [loop.submit(request(i, owner="flood", constraint=slow))[0] for i in range(5)]
    other = loop.submit(request(1, owner="other", constraint=Constraint.regex("[ab]{5}")))[0]
    assert len(other.completion().text) == 5
    assert len(loop.submit(request(2))[0].completion().ids) == 20
    assert sum(started) == 1
    flood[0].cancel()
    flood[3].cancel()
    assert [d.finish_reason for d in flood[3]] == ["cancelled"]
    asyncio.run(flood[3].ready())
    go.set()
    assert [d.finish_reason for d in flood[0]] == ["cancelled"]
    assert flood[4].completion().text == "slow"
    assert sum(started) == 4


def check(usage: Usage, request: Request, n_tokens: int) -> None:
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(request.prompt_ids), n_tokens)
    assert 0 <= usage.cached_tokens < usage.prompt_tokens
    assert 0 <= usage.queue_seconds <= usage.total_seconds
    if n_tokens:
        assert usage.queue_seconds <= usage.first_token_seconds <= usage.total_seconds


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(1, 30),  # tokens of the answer
            st.integers(0, 35),  # deltas that are read before the request is cancelled
            st.sampled_from([None, "a", "stop", "regex"]),
            st.booleans(),  # read the rest after cancelling
        ),
        min_size=1,
        max_size=6,
    )
)
def test_usage_is_exact_for_any_moment_of_cancelling(loop, asked):
    """Counted are the tokens that were read, and a stop token or stop string that ended the answer."""
    opened = []
    for i, (n, _, how, _) in enumerate(asked):
        sampling = Sampling(max_tokens=n, temperature=1, seed=i, stop=("a", "bc") if how == "a" else ())
        ids = [i + 1] * 70
        constraint = Constraint.regex("[a-f]{3}[0-9]{2,}") if how == "regex" else None
        stops = frozenset(range(90)) if how == "stop" else frozenset()
        opened.append(loop.submit(Request(ids, sampling, stops, constraint, owner=str(i % 2)))[0])
    for generation, (n, n_read, _, goes_on) in zip(opened, asked, strict=True):
        deltas = [delta for _, delta in zip(range(n_read), generation, strict=False)]
        generation.cancel()
        count = lambda: sum(len(d.token_ids) + (d.stop_id is not None) for d in deltas)  # noqa: B023, E731
        check(generation.usage, generation.request, count())
        if goes_on:
            deltas += generation
        check(generation.usage, generation.request, count())
        ended = bool(deltas) and deltas[-1].finish_reason not in (None, "cancelled")
        assert count() <= n + 1
        if ended and deltas[-1].finish_reason == "length":
            assert count() == n
    finished = loop.submit(request(1))[0]
    completion = finished.completion()
    check(finished.usage, finished.request, len(completion.ids) + (completion.stop_id is not None))
    while loop.stats().active:
        time.sleep(0.001)
    assert loop.stats().used_pages == 0


def test_cancelling_returns_pages_within_one_step_at_fifty_random_moments(loop, monkeypatch):
    engine, rng = loop.engine, random.Random(0)
    ended: dict[object, int] = {}
    real = engine.cancel
    monkeypatch.setattr(
        engine, "cancel", lambda stream: (real(stream), ended.setdefault(stream, engine.n_steps))
    )
    steady = loop.submit(Request([5] * 10, Sampling(max_tokens=490)))[0]
    for i in range(50):
        n_prompt = rng.choice([1, 100, 400])
        some = loop.submit(Request([i] * n_prompt, Sampling(max_tokens=100, seed=i)), n=rng.choice([1, 5]))
        for _ in range(rng.choice([0, 0, 1, 7])):
            next(some[0])
        time.sleep(rng.choice([0, 0.0005, 0.003]))
        moment = engine.n_steps
        for generation in some:
            generation.cancel()
        for generation in some:
            list(generation)
            assert ended[generation] <= moment + 1
    steady.cancel()
    assert [d.finish_reason for d in steady][-1] in ("cancelled", "length", "stop")


def test_no_thread_or_page_is_left_after_a_thousand_requests(model, tokenizer):
    before = set(threading.enumerate())
    with EngineLoop(Engine(model, tokenizer, max_batch=8), max_waiting=2000) as loop:
        some = [loop.submit(request(i % 200, n=2, owner=str(i % 3)))[0] for i in range(1000)]
        for i, generation in enumerate(some):
            if i % 10 == 0:
                generation.cancel()
        assert all(list(generation)[-1].finish_reason for generation in some)
        assert loop.stats().used_pages == loop.stats().waiting == 0
        assert not loop._open
    assert set(threading.enumerate()) == before


def test_a_reader_whose_event_loop_is_gone_hurts_nobody(loop):
    generation = loop.submit(request(1, n=300))[0]

    async def abandon():
        task = asyncio.ensure_future(anext(generation))
        await asyncio.sleep(0)
        task.cancel()

    for _ in range(20):
        asyncio.run(abandon())
    assert len(loop.submit(request(2))[0].completion().ids) == 20
    generation.cancel()
    list(generation)


def test_rates_and_counts_of_stats(loop):
    loop.submit(request(1))[0].completion()
    stats = loop.stats()
    assert (stats.decoded_tokens, stats.prefilled_tokens, stats.preemptions) == (20, 3, 0)
    assert stats.decode_tokens_per_second > stats.prefill_tokens_per_second > 0
    loop.submit(Request([1] * 200, Sampling(max_tokens=1)))[0].completion()
    assert loop.stats().cached_tokens == 192
    assert loop.stats().free_pages == loop.engine.cache.pages.limit


@pytest.mark.parametrize("draft", [None, "model"])
def test_a_cache_group_finds_its_own_prompts_and_no_others(make_model, tokenizer, draft):
    """Two groups ask for the same prompt in turns. Owners of one group share it."""
    ids = [(3 * i) % 250 for i in range(200)]
    engine = Engine(make_model(), tokenizer, draft=make_model(4, n_layers=1) if draft else None)
    with EngineLoop(engine) as loop:

        def cached(group: str, owner: str) -> int:
            generation = loop.submit(Request(ids, Sampling(max_tokens=3), tenant=group, owner=owner))[0]
            generation.completion()
            return generation.usage.cached_tokens

        asked = [("a", "1"), ("b", "2"), ("a", "1"), ("a", "3"), ("b", "2"), ("c", "1"), ("", "1")]
        assert [cached(*each) for each in asked] == [0, 0, 192, 192, 192, 0, 0]
