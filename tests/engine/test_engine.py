"""Continuous batching: every request is answered as if it were alone."""

import random

import pytest
import torch

from herd.engine import Engine, Request, Sampling
from herd.engine.constraint import Constraint
from herd.engine.generate import encode_prompt, generate, generate_many, stream
from herd.errors import EngineError


def requests(n: int, seed: int = 0, longest: int = 90) -> list[Request]:
    """Requests with prompts of all lengths, greedy and sampled in all ways, with long and short answers."""
    rng = random.Random(seed)
    out = []
    for i in range(n):
        sampling = Sampling(
            max_tokens=rng.randrange(1, 50),
            temperature=rng.choice([0, 0, 0.7, 1.5]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1, 0.8]),
            min_p=rng.choice([0, 0.05]),
            seed=i,
            logprobs=rng.choice([None, 0, 2]),
        )
        out.append(Request([rng.randrange(256) for _ in range(rng.randrange(1, longest))], sampling))
    return out


def same(a, b) -> bool:
    """Assert that completions are equal except for the last digits of logprobs."""
    if (a.ids, a.text, a.finish_reason, a.stop_id) != (b.ids, b.text, b.finish_reason, b.stop_id):
        return False
    ours, theirs = (sum(p.logprob for p in c.logprobs or ()) for c in (a, b))
    return ours == pytest.approx(theirs, abs=1e-3)


@pytest.fixture(scope="module")
def alone(model, tokenizer):
    return [Engine(model, tokenizer).run([r])[0] for r in requests(30)]


@pytest.mark.parametrize("max_batch", [2, 7, 64])
def test_batched_answers_equal_those_alone(model, tokenizer, alone, max_batch):
    got = Engine(model, tokenizer, max_batch=max_batch).run(requests(30))
    assert all(map(same, got, alone))


def test_batched_answers_equal_those_alone_for_other_model_shapes(models, tokenizer):
    for kind in ("ungrouped", "single", "scaled"):
        rs = requests(8, seed=5)
        got = Engine(models[kind], tokenizer, max_batch=5).run(rs)
        assert all(same(a, Engine(models[kind], tokenizer).run([r])[0]) for a, r in zip(got, rs, strict=True))


def test_the_pieces_of_a_stream_add_up_to_the_completion(model, tokenizer, alone):
    """Requests arrive while others are decoding, and their streams are read in turns."""
    engine, taken = Engine(model, tokenizer, max_batch=4), {}
    streams = {}
    for i, request in enumerate(requests(30)):
        streams[i] = engine.submit(request)
        taken[i] = []
        for j in list(streams):
            if (delta := next(streams[j], None)) is None:
                del streams[j]
            else:
                taken[j].append(delta)
    for j, rest in streams.items():
        taken[j] += rest
    for i, want in enumerate(alone):
        deltas = taken[i]
        assert "".join(d.text for d in deltas) == want.text
        assert [t for d in deltas for t in d.token_ids] == want.ids
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [want.finish_reason]
    assert (engine.n_active, engine.n_waiting, engine.cache.pages.n_used) == (0, 0, 0)


def test_a_stop_token_is_not_part_of_the_text(model, tokenizer):
    """A token that the model would pick is made a stop token: the answer ends just before it."""
    plain = Engine(model, tokenizer).run([Request([1, 2, 3], Sampling(max_tokens=20))])[0]
    stop_id = plain.ids[7]
    at = plain.ids.index(stop_id)
    got = Engine(model, tokenizer).run([Request([1, 2, 3], Sampling(max_tokens=20), frozenset({stop_id}))])[0]
    assert (got.ids, got.finish_reason, got.stop_id) == (plain.ids[:at], "stop", stop_id)
    assert got.text == tokenizer.decode(plain.ids[:at])


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(model, tokenizer):
    plain = Engine(model, tokenizer).run([Request([5, 6], Sampling(max_tokens=30))])[0]
    for a in range(0, len(plain.text) - 3, 3):
        stop = plain.text[a : a + 3]
        got = Engine(model, tokenizer).run([Request([5, 6], Sampling(max_tokens=30, stop=(stop, "never")))])[
            0
        ]
        assert got.text == plain.text[: plain.text.index(stop)]
        assert got.finish_reason == "stop"
        assert got.stop_id is None


def test_answers_end_at_max_tokens_and_at_the_end_of_the_context(model, tokenizer):
    engine = Engine(model, tokenizer, max_context=20)
    run = lambda n, most: engine.run([Request([7] * n, Sampling(max_tokens=most))])[0]  # noqa: E731
    assert (len(run(10, 4).ids), run(10, 4).finish_reason) == (4, "length")
    assert (len(run(10, 10).ids), run(10, 10).finish_reason) == (10, "length")
    assert (len(run(10, 11).ids), run(10, 11).finish_reason) == (10, "context")
    assert (len(run(19, None).ids), run(19, None).finish_reason) == (1, "context")
    assert run(10, 4).prompt_tokens == 10


def test_it_tells_how_much_of_a_prompt_is_computed(model, monkeypatch):
    monkeypatch.setattr("herd.engine.engine.PREFILL_TOKENS", 120)
    engine, told = Engine(model, None), []
    engine.on_prompt = lambda n, of: told.append((n, of))
    engine.run([Request(list(range(200)), Sampling(max_tokens=5))])
    first = [(n, 200) for n in (0, 40, 80, 120)]  # three layers
    assert told == first + [(n, 200) for n in (120, 146, 173, 200)]
    told.clear()
    engine.run([Request([*range(192), 5, 6, 7], Sampling(max_tokens=5))])  # three pages are in the cache
    assert told == [(n, 3) for n in range(4)]


def test_cancelling_makes_room_for_the_next_request(model, tokenizer):
    engine = Engine(model, tokenizer, max_batch=2)
    rs = [Request([i, 3], Sampling(max_tokens=40)) for i in range(4)]
    want = [Engine(model, tokenizer).run([r])[0].ids for r in rs]
    streams = [engine.submit(r) for r in rs]
    for _ in range(5):
        next(streams[0])
    assert (engine.n_active, engine.n_waiting) == (2, 2)
    streams[0].cancel()
    streams[2].cancel()
    assert (engine.n_active, engine.n_waiting) == (1, 1)
    assert [d.finish_reason for d in streams[0]][-1] == "cancelled"
    assert [d.finish_reason for d in streams[2]] == ["cancelled"]
    assert [streams[1].completion().ids, streams[3].completion().ids] == [want[1], want[3]]
    streams[1].cancel()  # ended long ago: nothing happens
    with pytest.raises(EngineError, match="already read"):
        streams[1].completion()


def test_requests_wait_when_the_cache_is_full(model, tokenizer):
    """There is room for the worst case of two: the third waits. A single one runs however small the bound."""
    rs = [Request([i] * 20, Sampling(max_tokens=20)) for i in range(3)]
    per_row = 64 * model.config.kv_nbytes_per_token(4)
    engine = Engine(model, tokenizer, cache_bytes=2 * per_row)
    streams = [engine.submit(r) for r in rs]
    engine.step()
    assert (engine.n_active, engine.n_waiting) == (2, 1)
    assert [s.completion().ids for s in streams] == [c.ids for c in Engine(model, tokenizer).run(rs)]
    assert Engine(model, tokenizer, cache_bytes=0).run(rs[:1])[0].finish_reason == "length"


def test_logprobs_are_the_softmax_of_the_full_forward(model, tokenizer):
    prompt = [9, 8, 7]
    sampling = Sampling(max_tokens=12, temperature=1.3, top_k=9, seed=4, logprobs=3)
    got = Engine(model, tokenizer).run([Request(prompt, sampling)])[0]
    with torch.inference_mode():
        logp = (
            model.logits(torch.tensor([prompt + got.ids])).double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        )
    assert [p.id for p in got.logprobs] == got.ids
    for row, p in zip(logp, got.logprobs, strict=True):
        assert p.logprob == pytest.approx(float(row[p.id]), abs=1e-4)
        best = row.topk(3)
        assert [i for i, _ in p.top] == best.indices.tolist()
        assert [v for _, v in p.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_seed_repeats_its_answer_and_none_does_not(model, tokenizer):
    def run(seed):
        return (
            Engine(model, tokenizer)
            .run([Request([1], Sampling(max_tokens=20, temperature=1, seed=seed))])[0]
            .ids
        )

    assert run(3) == run(3) != run(4)
    assert run(None) != run(None)


def test_padded_rows_of_the_head_are_never_picked(tokenizer, make_model):
    """The head is padded beyond the vocabulary, and its extra rows have the largest logits."""
    model = make_model(vocab_size=320)
    with torch.no_grad():
        model.lm_head.weight[259:] *= 50
    for temperature in (0, 1.5):
        sampling = Sampling(max_tokens=60, temperature=temperature, seed=1)
        assert max(Engine(model, tokenizer).run([Request([1], sampling)])[0].ids) < 259


def test_damaged_weights_fail_every_request_and_leave_nothing_behind(make_model):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    engine = Engine(model, None)
    streams = [engine.submit(Request([i], Sampling())) for i in (1, 2)]
    for answer in streams:
        with pytest.raises(EngineError, match="logits are not finite numbers"):
            answer.completion()
    with pytest.raises(EngineError, match="not finite"):
        engine.run([Request([1], Sampling())])
    assert engine.n_active == engine.n_waiting == engine.cache.pages.n_used == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kv", ["fp32", "bf16"])
@pytest.mark.parametrize("draft", [None, "ngram", "model"])
def test_only_the_request_with_a_damaged_embedding_fails(make_model, tokenizer, bad, kv, draft):
    """The other requests, in the same batch or later on the same pages, give the very same tokens."""
    model, damaged = make_model(), make_model()
    with torch.no_grad():
        damaged.model.embed_tokens.weight[200, 7] = bad
    how = {"kv": kv, "draft": make_model(4, n_layers=1) if draft == "model" else draft}
    short = Request([1, 2, 3], Sampling(max_tokens=30, logprobs=2, seed=1))
    # A draft model proposes token 200 too. Then drafting stops, which changes what a seed draws, but no
    # greedy token
    long = Request(list(range(90)), Sampling(max_tokens=30, temperature=int(draft != "model"), seed=5))
    guilty = Request([4, 200, 5] * 30, Sampling(max_tokens=1))
    first, _, second = Engine(model, tokenizer, **how).run([short, guilty, long])
    assert 200 not in first.ids + second.ids
    engine = Engine(damaged, tokenizer, **how)
    streams = [engine.submit(request) for request in (short, guilty, long)]
    with pytest.raises(EngineError, match="logits are not finite numbers"):
        streams[1].completion()
    got = [streams[0].completion(), streams[2].completion()]
    assert [a.ids for a in got] == [first.ids, second.ids]
    assert draft == "model" or got == [first, second]
    tight = Engine(damaged, tokenizer, cache_bytes=1, **how)  # one at a time, on the pages of the one before
    for request in (short, long):
        want = Engine(model, tokenizer, **how).run([request])[0]
        with pytest.raises(EngineError, match="not finite"):
            tight.run([guilty])
        assert tight.run([request])[0].ids == want.ids


def test_a_draft_model_that_is_damaged_changes_no_answer(make_model, tokenizer):
    model, draft = make_model(), make_model(4, n_layers=1)
    with torch.no_grad():
        draft.model.embed_tokens.weight[2] = float("nan")
    requests = [Request([1, 2, 3], Sampling(max_tokens=30)), Request([1, 3], Sampling(max_tokens=30))]
    got = Engine(model, tokenizer, draft=draft).run(requests)
    assert [a.ids for a in got] == [a.ids for a in Engine(model, tokenizer).run(requests)]
    assert got[0].speculated.drafted == 0 < got[1].speculated.drafted


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 512, {}, "prompt has 512 tokens, the context has 512"),
        ([1, 259], {}, "token 259 is outside the model's vocabulary of 259"),
        ([-1], {}, "token -1 is outside"),
        ([1], {"top_k": 300}, "top_k=300 is more than the vocabulary"),
        ([1], {"logprobs": 300}, "logprobs=300 is more than the vocabulary"),
    ],
)
def test_impossible_requests_are_refused_by_submit_and_run(model, tokenizer, prompt, sampling, message):
    engine = Engine(model, tokenizer)
    bad = Request(prompt, Sampling(**sampling))
    with pytest.raises(EngineError, match=message):
        engine.submit(bad)
    with pytest.raises(EngineError, match=message):
        engine.run([Request([1]), bad])
    assert engine.n_waiting == 0


def test_impossible_engines_are_refused(model, tokenizer):
    with pytest.raises(
        EngineError, match="max_context=1000 must be between 2 and the model's context of 512"
    ):
        Engine(model, tokenizer, max_context=1000)
    with pytest.raises(EngineError, match="max_batch=0"):
        Engine(model, tokenizer, max_batch=0)
    with pytest.raises(EngineError, match="stop strings need a tokenizer"):
        Engine(model, None).submit(Request([1], Sampling(stop=("x",))))

    class Bigger(type(tokenizer)):
        vocab_size = 300

    with pytest.raises(EngineError, match="tokenizer has 300 tokens, the model only 259"):
        Engine(model, Bigger())


def test_a_step_without_requests_does_nothing(model):
    assert Engine(model, None).run([]) == []
    assert Engine(model, None).step() is False


def test_generate_stream_and_generate_many_agree(model, tokenizer):
    text = generate(model, tokenizer, "Hello", max_tokens=25)
    assert text == "".join(stream(model, tokenizer, "Hello", max_tokens=25))
    ids = encode_prompt(tokenizer, "Hello")
    assert ids == [256, *b"Hello"]
    assert text == Engine(model, tokenizer).run([Request(ids, Sampling(max_tokens=25))])[0].text
    assert generate_many(model, tokenizer, ["Hello", "x"], max_tokens=25)[0].text == text


def test_generate_follows_a_constraint_and_gives_several_answers(model, tokenizer):
    how = {"temperature": 1, "seed": 1, "constraint": Constraint.regex("[a-c]{5}")}
    some = generate_many(model, tokenizer, ["a", "b"], n=3, **how)
    assert len(some) == 6
    assert all(set(c.text) <= set("abc") and len(c.text) == 5 for c in some)
    assert some[0].text == generate(model, tokenizer, "a", **how)
    assert "".join(stream(model, tokenizer, "a", stop=["q"], constraint=Constraint.regex("x{4}"))) == "xxxx"


def test_generate_without_a_tokenizer_is_refused(model):
    with pytest.raises(EngineError, match="no tokenizer"):
        generate(model, None, "Hello")
