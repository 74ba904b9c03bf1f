"""Paging: shared prompts, requests preempted when pages run out, and long prompts that delay nobody."""

import pytest
import torch

from herd.engine import Engine, Request, Sampling
from herd.engine import engine as module
from herd.kernels import build
from herd.kernels.page_layout import PAGE
from herd.quant import scheme
from herd.quant.linear import swap_linears


@pytest.fixture(scope="module")
def wide(make_model):
    """A model with heads of 32 channels, as int8 and the native kernel need."""
    return make_model(seed=7, dim=64, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=96)


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def pages(engine: Engine, n: int) -> Engine:
    """Return an engine with room for ``n`` pages."""
    engine.cache.pages.limit = n
    return engine


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_a_prompt_seen_before_is_not_computed_again(wide, kv):
    """Tokens are the same with and without sharing, also where the new prompt continues differently."""
    engine = Engine(wide, None, kv=kv)
    start = prompt(3 * PAGE + 10)
    for tail, shared in (([], 0), ([], 3), (prompt(70, 1), 3), (prompt(70, 2), 3)):
        request = Request(start + tail, Sampling(max_tokens=30))
        want = Engine(wide, None, kv=kv).run([request])[0]
        got = engine.run([request])[0]
        assert got.ids == want.ids
        assert (got.shared_tokens, want.shared_tokens) == (shared * PAGE, 0)
    whole = Request(start[: 2 * PAGE], Sampling(max_tokens=3))
    assert engine.run([whole])[0].shared_tokens == PAGE  # one token at least is fed, or there were no logits


def test_an_answer_is_found_in_the_next_prompt(wide):
    """In a dialog, an answer is part of the next prompt."""
    engine = Engine(wide, None)
    first = prompt(50)
    answer = engine.run([Request(first, Sampling(max_tokens=PAGE))])[0].ids
    again = engine.run([Request([*first, *answer, 1, 2], Sampling(max_tokens=1))])[0]
    assert again.shared_tokens == PAGE


def test_a_single_request_may_exceed_the_bound_of_the_cache(wide):
    engine = Engine(wide, None, cache_bytes=0)
    assert engine.run([Request(prompt(400), Sampling(max_tokens=112))])[0].finish_reason == "length"
    assert engine.cache.nbytes <= 8 * engine.cache.page_bytes


def test_the_oldest_request_is_never_preempted(wide):
    engine = pages(Engine(wide, None), 4)
    streams = [engine.submit(Request(prompt(100, i), Sampling(max_tokens=150))) for i in range(3)]
    while not streams[0].done:
        held = engine.scheduler.active[0].cached.length if engine.scheduler.active else 0
        engine.step()
        assert streams[0].done or engine.scheduler.active[0].stream is streams[0]
        assert streams[0].done or engine.scheduler.active[0].cached.length > held


def test_a_long_prompt_does_not_delay_the_others(wide, monkeypatch):
    """While it is computed piece by piece, every step gives a token to each sequence that decodes."""
    monkeypatch.setattr(module, "MIXED_TOKENS", 32)
    engine = Engine(wide, None)
    talker = engine.submit(Request([1, 2, 3], Sampling(max_tokens=100)))
    next(talker)
    long = engine.submit(Request(prompt(320), Sampling(max_tokens=4)))
    steps = 0
    while not long._deltas:
        before = len(talker._deltas)
        engine.step()
        steps += 1
        assert len(talker._deltas) == before + 1
    assert steps == 10
    assert (
        long.completion().ids == Engine(wide, None).run([Request(prompt(320), Sampling(max_tokens=4))])[0].ids
    )


def test_cancelling_frees_pages_at_once(wide):
    engine = Engine(wide, None)
    streams = [engine.submit(Request(prompt(100, i), Sampling(max_tokens=100))) for i in range(3)]
    engine.step()
    used = engine.cache.pages.n_used
    streams[1].cancel()
    assert engine.cache.pages.n_used == used - 2
    for stream in streams:
        stream.cancel()
    assert engine.cache.pages.n_used == engine.n_active == 0


def test_interrupted_steps_leave_no_pages_behind(wide, monkeypatch):
    engine = Engine(wide, None)
    want = engine.run([Request(prompt(100), Sampling(max_tokens=5))])[0].ids
    stream = engine.submit(Request(prompt(150), Sampling(max_tokens=50)))
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(wide, "forward", None)
        patch.setattr(
            type(wide), "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), raising=False
        )
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert engine.cache.pages.n_used == engine.n_active == 0
    assert [d.finish_reason for d in stream] == ["cancelled"]
    assert engine.run([Request(prompt(100), Sampling(max_tokens=5))])[0].ids == want


def test_every_kind_of_cache_gives_close_answers(wide, make_model):
    """auto is what the model computes in, bf16 for quantized weights. With int8 results stay close to fp32."""
    import copy

    assert Engine(wide, None).cache.kind == "fp32"
    assert Engine(copy.deepcopy(wide).to(torch.bfloat16), None).cache.kind == "bf16"
    assert Engine(swap_linears(copy.deepcopy(wide), scheme("q8")), None).cache.kind == "bf16"
    request = Request(prompt(200), Sampling(max_tokens=20, logprobs=0))
    plain, small = (Engine(wide, None, kv=kv).run([request])[0] for kv in ("fp32", "int8"))
    assert small.ids[0] == plain.ids[0]
    assert small.logprobs[0].logprob == pytest.approx(plain.logprobs[0].logprob, abs=0.05)


@pytest.mark.skipif(not build.ready(), reason="no C++ compiler")
def test_the_reference_kernel_gives_the_same_tokens(wide, monkeypatch):
    requests = [Request(prompt(n, n), Sampling(max_tokens=20)) for n in (1, 70, 150)]
    want = {kv: [c.ids for c in Engine(wide, None, kv=kv).run(requests)] for kv in ("fp32", "bf16", "int8")}
    monkeypatch.setattr("herd.kernels.paged_attention._native", lambda *_: False)
    assert want == {kv: [c.ids for c in Engine(wide, None, kv=kv).run(requests)] for kv in want}
