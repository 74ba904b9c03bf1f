"""Ways of running a model: bytes against the allocator, times against sums by hand, answers to impossible wishes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.cli import run
from herd.engine import memory
from herd.errors import PlanError
from herd.kernels.page_layout import BYTES
from herd.llama.config import SIZES, ModelConfig
from herd.plan import compare, feel, machines, profile, quantity, quantizing, score, serve, ways
from herd.plan.layout import Job, ParallelLayout
from herd.plan.profile import Profile
from herd.plan.step import predict
from herd.quant import scheme
from herd.train import AdamW, TrainConfig

LARGE = 25_000_000_000


def made_up(**changes: object) -> Profile:
    """A machine of round numbers: 40 GB/s, 400 GOP/s, matmuls of one row bound by memory."""
    rates = {"bf16": 2.0, "q8": 1.0625, "q4k": 0.5625, "q4": 0.5625}
    base = Profile(
        key=profile.key(), date="2026-01-01T00:00:00Z", cpu="made up", cores=2, isa=("avx2",), memory=LARGE, threads=2,
        bandwidth={1: 2e10, 2: 4e10},
        gemm={name: {1: 2 * 4e10 / nbytes, 1024: 4e11} for name, nbytes in rates.items()},
        attention_prefill=dict.fromkeys(BYTES, 1e11), attention_decode=dict.fromkeys(BYTES, 2e10),
        pointwise=2e10, between={"plain": 0.0, "packed": 0.0}, encode=dict.fromkeys(rates, 1e8), hash=1e9,
        hash_all=1e9, disk=1e9, disk_write=5e8, base=300_000_000, seconds=30.0,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The made-up machine, saved as this one's profile."""
    monkeypatch.setenv("HERD_CACHE", str(tmp_path))
    monkeypatch.setattr("herd.machine.available_memory", lambda: LARGE)
    made = made_up(key=profile.key())
    profile.save(made)
    return ways.Here(made, LARGE)


# Bytes and seconds ---------------------------------------------------------------------------------------------------


def test_bytes_are_the_allocators():
    target = ways.Here(made_up(), LARGE)
    for form in target.forms:
        found = ways.way(target, "8B", form, "int8", 1000)
        assert found.kv_nbytes == memory.nbytes(SIZES["8B"], 1, 1000, BYTES["int8"])
        on_top = max(found.kv_nbytes, found.loading_nbytes)
        assert found.resident == found.weights_nbytes + found.beside_nbytes + on_top
    q4 = ways.way(target, "8B", target.forms[-1], "bf16", 1000)
    assert q4.weights_nbytes == sum(
        rows * cols * (17 if name == "lm_head.weight" else 9) // 16 if len(shape) == 2 else 4 * rows
        for name, shape in SIZES["8B"].param_shapes()
        for rows, cols in [(shape[0], shape[-1])]
    )


def test_decode_reads_the_weights_once():
    """With nothing else in the way, a step is bytes over bandwidth; a full cache adds its bytes at attention's rate."""
    target, config = ways.Here(made_up(), LARGE), SIZES["8B"]
    form = next(f for f in target.forms if f.name == "q8")
    read = form.nbytes(config) - config.vocab_size * config.dim * 34 / 32  # the embedding gives one row only
    short, long = (target.decode(config, form, "bf16", c) for c in (1, 32_768))
    assert short == pytest.approx(read / 4e10, rel=0.01)
    assert long - short == pytest.approx(32_767 * config.kv_nbytes_per_token() / 2e10, rel=0.01)


def test_prefill_is_flops_over_rate():
    target, config = ways.Here(made_up(pointwise=1e15), LARGE), SIZES["8B"]
    form = ways.BF16
    head = 2 * config.dim * config.vocab_size
    short = target.prefill(config, form, "bf16", 1024)
    matmuls = (config.flops_per_token() - head) * 1024 / 4e11
    attention = 1024 * (config.flops_per_token(512) - config.flops_per_token()) / 1e11
    assert short == pytest.approx(matmuls + attention + head / 4e10, rel=0.01)
    double = target.prefill(config, form, "bf16", 8192)
    assert double > 8 * short  # attention grows with the square, and pieces read the weights again


def test_learned_factors_multiply():
    plain, learned = ways.Here(made_up(), LARGE), ways.Here(made_up(), LARGE, {"decode": 2.0})
    assert learned.decode(SIZES["8B"], ways.BF16, "bf16", 10) == 2 * plain.decode(
        SIZES["8B"], ways.BF16, "bf16", 10
    )
    assert learned.prefill(SIZES["8B"], ways.BF16, "bf16", 10) == plain.prefill(
        SIZES["8B"], ways.BF16, "bf16", 10
    )


@given(st.sampled_from(list(SIZES)), st.integers(1, 131_072), st.integers(0, 10**12))
def test_what_fits_has_times_and_what_does_not_has_a_way_out(size, context, free):
    target = ways.Here(made_up(), free)
    rows = ways.ways(target, size, (context,))
    chosen = ways.best(rows)
    for row in rows:
        assert row[0].fits == (row[0].resident <= free) == (row[0].step is not None)
    if chosen is None:
        assert ways.smallest_change(target, size, context)
    else:
        assert chosen.fits


def test_the_smallest_change_is_enough():
    """What is offered instead fits: so much more memory, or so short a context."""
    target = ways.Here(made_up(), LARGE)
    more = float(ways.smallest_change(target, "70B", 1024).split()[0]) * 1e9
    richer = ways.Here(made_up(), LARGE + more + 0.1e9)
    assert ways.best(ways.ways(richer, "70B", (1024,))) is not None
    assert ways.best(ways.ways(ways.Here(made_up(), LARGE + more - 0.2e9), "70B", (1024,))) is None
    pair = ways.there(machines.find_machine("2xRTX4090"), SIZES["70B"])
    told = ways.smallest_change(pair, "70B", 32_768)
    tokens = int(told.split()[3].replace(",", ""))
    assert ways.best(ways.ways(pair, "70B", (tokens,))) is not None
    assert ways.best(ways.ways(pair, "70B", (tokens + 2048,))) is None


def test_the_best_way_speaks_at_reading_speed_if_any_does():
    slow = ways.Here(made_up(), LARGE)
    fast = ways.Here(made_up(bandwidth={2: 1e12}, gemm={name: {1: 1e13} for name in made_up().gemm}), LARGE)
    chosen = ways.best(ways.ways(slow, "8B", (1024,)))
    assert chosen is not None
    assert chosen.form.name == "q4k"  # nothing larger reaches 5 tokens/s at 40 GB/s
    chosen = ways.best(ways.ways(fast, "8B", (1024,)))
    assert chosen is not None
    assert chosen.form.name == "bf16"


def test_quantizing_adds_up():
    """Rounding, hashing both ways and writing, one after another."""
    config, plan = SIZES["1B"], scheme("q8")
    made = made_up(hash=1e9, encode={"q8": 1e8}, disk_write=5e8)
    packed = config.n_params - (2 * config.n_layers + 1) * config.dim  # all but the norms
    out = plan.nbytes(config)
    expected = packed / 1e8 + (config.nbytes(2.0) + out) / 1e9 + out / 5e8
    assert quantizing.quantize_seconds(made, config, plan) == pytest.approx(expected)
    assert quantizing.quantize_nbytes(config, plan) > config.vocab_size * config.dim * 2


# Serving and drafts --------------------------------------------------------------------------------------------------


def test_littles_law_and_saturation():
    target = ways.there(machines.find_machine("H100"), SIZES["8B"])
    few, many = (serve.serve(target, "8B", ways.BF16, serve.Load(n, 2048, 400)) for n in (10, 60))
    for found in (few, many):
        assert found.batch == pytest.approx(found.requests_per_s * 400 * found.tpot, rel=0.01)
        users = found.requests_per_s * (30 + found.ttft_mean + 400 * found.tpot)
        assert users == pytest.approx(10 if found is few else 60, rel=0.01)
    assert many.ttft_p95 > few.ttft_p95
    assert few.meets(1.0)
    crowd = serve.serve(target, "8B", ways.BF16, serve.Load(100_000, 2048, 400))
    assert not crowd.meets(1.0)
    assert crowd.prefill_share <= 1


def test_speculation_by_hand():
    """α = 1/2, k = 2: 1 + 1/2 + 1/4 tokens for two drafts and one pass."""
    found = serve.draft(0.5, 0.1, 2)
    assert found.tokens_a_round == pytest.approx(1.75)
    assert found.speedup == pytest.approx(1.75 / 1.2)
    assert serve.draft(0.0, 0.1, 3).speedup == pytest.approx(1 / 1.3)
    assert serve.best_draft(0.9, 0.01).k > serve.best_draft(0.5, 0.2).k
    for wrong in ({"alpha": 1.0}, {"alpha": -0.1}, {"cost": -1.0}, {"k": 0}):
        with pytest.raises(PlanError):
            serve.draft(**({"alpha": 0.5, "cost": 0.1, "k": 2} | wrong))


# The profile, the score, the feel ------------------------------------------------------------------------------------


def test_a_profile_comes_back_and_stale_or_broken_ones_do_not(here, tmp_path, monkeypatch):
    assert profile.load() == here.profile
    assert profile.from_file(profile.profile_path()) == here.profile
    monkeypatch.setattr(profile, "key", lambda: "another machine")
    assert profile.load() is None
    broken = tmp_path / "broken.json"
    for text in ("{}", "[]", "no json", '{"schema": 1}'):
        broken.write_text(text)
        with pytest.raises(PlanError, match="not a profile"):
            profile.from_file(broken)


def test_the_device_gives_back_what_was_measured():
    made = made_up()
    device = made.device()
    for name, rates in made.gemm.items():
        for rows, rate in rates.items():
            assert device.reachable(name, rows) == pytest.approx(rate)


def test_the_score_learns_after_three_runs_and_skips_broken_lines(here):
    key = here.profile.key
    for measured in (2.0, 2.2):
        score.record(score.Event("decode", "8B", "s", 1.0, measured, key))
    assert score.factors(key) == {}
    with score.history_path().open("a") as file:
        file.write('{"kind": "decode", "what"\n')
    score.record(score.Event("decode", "8B", "s", 1.0, 3.0, key))
    score.record(score.Event("decode", "8B", "s", 1.0, 9.0, "another machine"))
    assert score.factors(key) == {"decode": 2.2}
    (summary,) = score.summaries(score.history())
    assert (summary.n, summary.worst_error) == (4, pytest.approx(8 / 9))
    with pytest.raises(PlanError):
        score.record(score.Event("decode", "8B", "s", 0.0, 1.0, key))


def test_measurements_are_put_beside_predictions(here):
    rows = [
        {"work": "decode", "name": "decode at 128", "tokens": 128, "batch": 1, "seconds": 0.2, "kv": "bf16"},
        {"work": "prefill", "name": "prefill of 512", "tokens": 512, "batch": 1, "seconds": 20.0},
    ]
    compare.bench(SIZES["8B"], "Q4_0", rows, "8B")
    form = next(form for form in here.forms if form.name == "q4")
    assert rows[0]["predicted_seconds"] == here.decode(SIZES["8B"], form, "bf16", 128)
    assert rows[1]["predicted_seconds"] == here.prefill(SIZES["8B"], form, "bf16", 512)
    compare.bench(SIZES["8B"], "Q6_K", rows, "8B")  # not a form that is planned for: nothing is said
    stage = {"stage": "teacher", "seconds": 90.0, "predicted_seconds": 75.0, "peak_rss_bytes": 9}
    compare.stages("demo", [stage])
    events = score.history()
    assert [event.kind for event in events] == ["decode", "prefill", "stage"]
    assert events[0].measured == 0.2
    assert {event.machine for event in events} == {here.profile.key}


def test_training_and_quantizing_keep_score(here):
    config = ModelConfig(4096, 256, 5, 8, 4, 704)
    train = TrainConfig(steps=10, batch_size=16, context=256, optimizer=AdamW(lr=1e-3))
    planned = compare.training(config, train, seconds=5.0, steps=10, what="tiny")
    assert planned == pytest.approx(10 * planned_step(here, config, train))
    assert compare.training(config, train, seconds=0.0, steps=0, what="nothing was done") is None
    assert compare.quantizing(config, scheme("q8"), 4.0, 1.0, "tiny-q8") > 0
    assert compare.quantizing(SIZES["1B"], scheme("Q6_K"), 4.0, 1.0, "a format that is not measured") is None
    assert [(event.kind, event.measured) for event in score.history()] == [("train", 5.0), ("quantize", 1.0)]


def planned_step(here, config, train):
    job = Job(config, train.batch_size, train.context)
    return predict(job, ParallelLayout(micro=16, precision="fp32"), here.profile.machine()).seconds


def test_feeling_a_speed_takes_the_time_it_should():
    slept: list[float] = []
    said: list[str] = []
    count = feel.stream(5.0, 10.0, most_seconds=3.0, write=said.append, sleep=slept.append)
    assert slept[0] == 3.0
    assert sum(slept[1:]) == pytest.approx(3.0, abs=0.11)
    assert count == len(said) == len(slept) - 1
    whole = "".join(feel.pieces())
    assert whole == feel.SAMPLE
    assert 1.1 < len(list(feel.pieces())) / len(whole.split()) < 1.6


def test_times_are_read_as_people_write_them():
    assert [quantity.seconds(t) for t in ("1s", "500ms", "2min", "1.5")] == [1.0, 0.5, 120.0, 1.5]
    for wrong in ("", "0s", "-1s", "soon", "1 week"):
        with pytest.raises(PlanError):
            quantity.seconds(wrong)


# The verbs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["run", "--size", "70b", "--machine", "2xRTX4090", "--context", "4k"],
        ["run", "--size", "405B", "--machine", "2xRTX4090"],
        ["run", "--price", "1500", "--watts", "120"],
        [
            "serve",
            "--machine",
            "8xH100",
            "--users",
            "50",
            "--prompt",
            "2k",
            "--answer",
            "400",
            "--p95-ttft",
            "1s",
        ],
        ["serve", "--users", "3"],
        ["finetune", "--size", "1B", "--machine", "here", "--tokens", "1M"],
        ["draft", "--size", "8B", "--draft", "1B"],
        ["score"],
    ],
)
def test_every_verb_prints_a_table_and_json(here, capsys, args):
    assert run(["plan", *args]) == 0
    text = capsys.readouterr().out
    assert text.strip()
    assert max(map(len, text.splitlines())) <= 120
    assert run(["plan", *args, "--json"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--size", "9B"], "405B, 70B, 8B"),
        (["run", "--size", "9B"], "405B, 70B, 8B"),
        (["run", "--machine", "2xRTX409"], "RTX4090"),
        (["run", "--machine", "0xH100"], "1 to"),
        (["run", "--context", "256k"], "131,072"),
        (["run", "--batch", "0"], "at least 1"),
        (["run", "--price", "-5", "--watts", "100"], "positive"),
        (["run", "--usd-per-hour", "0"], "positive"),
        (["serve", "--users", "0"], "at least 1"),
        (["serve", "--p95-ttft", "soon"], "1s, 500ms"),
        (["serve", "--prompt", "130k", "--answer", "4k"], "131,072"),
        (["draft", "--size", "8B", "--draft", "70B"], "smaller"),
        (["draft", "--alpha", "1", "--size", "8B", "--draft", "1B"], "alpha"),
        (["draft", "--size", "405B", "--draft", "8B"], "does not fit"),
    ],
)
def test_bad_requests_get_one_line(here, capsys, args, says):
    assert run(["plan", *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


def test_a_saved_profile_needs_no_torch(here):
    code = "import sys; from herd.cli import run; code = run(['plan', '--json']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    record = json.loads(done.stdout)
    assert set(record["sizes"]) == {"8B", "70B", "405B"}


@pytest.mark.soak
def test_measuring_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HERD_CACHE", str(tmp_path))
    from herd.plan import measure

    heard: list[str] = []
    found = measure.measure(heard.append)
    assert heard[0] == "memory"
    assert found.read > 1e9
    assert all(rate > 0 for rates in found.gemm.values() for rate in rates.values())
    assert profile.from_file(profile.save(found)) == found
