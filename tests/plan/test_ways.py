"""Ways of running a model: bytes against the allocator, times against sums by hand, answers to impossible
wishes."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd import checkpoint
from herd.checkpoint.gguf import GGUF
from herd.cli import plan_local, run
from herd.engine import memory
from herd.errors import PlanError
from herd.kernels.page_layout import BYTES
from herd.llama.config import SIZES, ModelConfig
from herd.llama.model import LlamaLM
from herd.plan import compare, feel, machines, profile, quantizing, score, serve, ways
from herd.plan.layout import Job, ParallelLayout
from herd.plan.profile import Profile
from herd.plan.step import predict_step
from herd.quant import scheme, tensor_nbytes
from herd.quant.mixtures import named_scheme
from herd.train import AdamW, TrainConfig

LARGE = 25_000_000_000


def made_up(**changes: object) -> Profile:
    """A machine of round numbers: 40 GB/s, 400 GOP/s, matmuls of one row bound by memory."""
    rates = {"bf16": 2.0, "q8": 1.0625, "q4k": 0.5625, "q4": 0.5625}
    base = Profile(
        key=profile.machine_key(), date="2026-01-01T00:00:00Z", cpu="made up", cores=2, isa=("avx2",),
        memory=LARGE, threads=2,
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
    made = made_up(key=profile.machine_key())
    profile.save_profile(made)
    return ways.MeasuredTarget(made, LARGE)


# Bytes and seconds ------------------------------------------------------------


def test_bytes_equal_those_of_the_allocators():
    target = ways.MeasuredTarget(made_up(), LARGE)
    for weights in target.formats:
        found = ways.plan_way(target, SIZES["8B"], weights, "int8", 1000)
        assert found.kv_nbytes == memory.nbytes(SIZES["8B"], 1, 1000, BYTES["int8"])
        on_top = max(found.kv_nbytes, found.loading_nbytes)
        assert found.resident == found.weights_nbytes + found.working_nbytes + on_top
    q4 = ways.plan_way(target, SIZES["8B"], target.formats[-1], "bf16", 1000)
    assert q4.weights_nbytes == sum(
        rows * cols * (210 if name == "lm_head.weight" else 144) // 256 if len(shape) == 2 else 4 * rows
        for name, shape in SIZES["8B"].param_shapes()
        for rows, cols in [(shape[0], shape[-1])]
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:.* matrices have rows", "ignore:.* has no tokenizer")
def test_bytes_equal_those_of_the_files_that_quantize_writes(tmp_path, tied):
    """Of each format, with rows that do not divide into blocks of 256 too. A tied head is in memory twice."""
    config = ModelConfig(512, 256, 8, 4, 2, 576, tie_embeddings=tied)
    checkpoint.save_model(tmp_path / "plain", LlamaLM(config).init_weights(0))
    for weights in ways.GGUF_FORMATS[1:]:
        scheme = named_scheme(weights.name, config)
        checkpoint.quantize_folder(checkpoint.ImportSource(tmp_path / "plain"), tmp_path / "packed", scheme)
        tensors = GGUF(tmp_path / "packed" / "model.gguf").tensors
        nbytes = {name: tensor_nbytes(entry.shape, entry.format) for name, entry in tensors.items()}
        again = nbytes["token_embd.weight"] if tied else 0
        assert weights.nbytes(config) == sum(nbytes.values()) + again
        layers = [
            entry for name, entry in tensors.items() if name.startswith("blk.") and len(entry.shape) > 1
        ]
        mean = sum(tensor_nbytes(e.shape, e.format) for e in layers) / sum(math.prod(e.shape) for e in layers)
        assert weights.stored(config, "bf16").linears == pytest.approx(mean)


def test_a_decode_step_reads_the_weights_once():
    """With nothing else in the way, a step is bytes over bandwidth. A full cache adds its bytes at
    attention's rate."""
    target, config = ways.MeasuredTarget(made_up(), LARGE), SIZES["8B"]
    weights = next(f for f in target.formats if f.name == "Q8_0")
    read = (
        weights.nbytes(config) - config.vocab_size * config.dim * 34 / 32
    )  # the embedding gives one row only
    short, long = (target.decode(config, weights, "bf16", c) for c in (1, 32_768))
    assert short == pytest.approx(read / 4e10, rel=0.01)
    assert long - short == pytest.approx(32_767 * config.kv_nbytes_per_token() / 2e10, rel=0.01)


def test_prefill_takes_flops_over_the_measured_rate():
    target, config = ways.MeasuredTarget(made_up(pointwise=1e15), LARGE), SIZES["8B"]
    weights = ways.BF16
    head = 2 * config.dim * config.vocab_size
    short = target.prefill(config, weights, "bf16", 1024)
    matmuls = (config.flops_per_token() - head) * 1024 / 4e11
    attention = 1024 * (config.flops_per_token(512) - config.flops_per_token()) / 1e11
    assert short == pytest.approx(matmuls + attention + head / 4e10, rel=0.01)
    double = target.prefill(config, weights, "bf16", 8192)
    assert double > 8 * short  # attention grows with the square, and pieces read the weights again


def test_learned_factors_multiply_their_kind_of_work():
    plain, learned = (
        ways.MeasuredTarget(made_up(), LARGE),
        ways.MeasuredTarget(made_up(), LARGE, {"decode": 2.0}),
    )
    assert learned.decode(SIZES["8B"], ways.BF16, "bf16", 10) == 2 * plain.decode(
        SIZES["8B"], ways.BF16, "bf16", 10
    )
    assert learned.prefill(SIZES["8B"], ways.BF16, "bf16", 10) == plain.prefill(
        SIZES["8B"], ways.BF16, "bf16", 10
    )


@given(st.sampled_from(list(SIZES)), st.integers(1, 131_072), st.integers(0, 10**12))
def test_what_fits_has_times_and_what_does_not_has_a_cure(size, context, free):
    target = ways.MeasuredTarget(made_up(), free)
    rows = ways.plan_ways(target, SIZES[size], (context,))
    chosen = ways.best_way(rows)
    for row in rows:
        assert row[0].fits == (row[0].resident <= free) == (row[0].step is not None)
    if chosen is None:
        assert ways.smallest_change(target, SIZES[size], context)
    else:
        assert chosen.fits


def test_the_smallest_change_is_enough_and_needed():
    """What is offered instead fits: so much more memory, or so short a context."""
    target = ways.MeasuredTarget(made_up(), LARGE)
    more = float(ways.smallest_change(target, SIZES["70B"], 1024).split()[1]) * 1e9
    richer = ways.MeasuredTarget(made_up(), LARGE + more + 0.1e9)
    assert ways.best_way(ways.plan_ways(richer, SIZES["70B"], (1024,))) is not None
    assert (
        ways.best_way(
            ways.plan_ways(ways.MeasuredTarget(made_up(), LARGE + more - 0.2e9), SIZES["70B"], (1024,))
        )
        is None
    )
    pair = ways.catalogue_target(machines.find_machine("2xRTX4090"), SIZES["70B"])
    told = ways.smallest_change(pair, SIZES["70B"], 32_768)
    tokens = int(told.split()[3].replace(",", ""))
    assert ways.best_way(ways.plan_ways(pair, SIZES["70B"], (tokens,))) is not None
    assert ways.best_way(ways.plan_ways(pair, SIZES["70B"], (tokens + 2048,))) is None


def test_the_best_way_reaches_reading_speed_if_any_does():
    slow = ways.MeasuredTarget(made_up(), LARGE)
    fast = ways.MeasuredTarget(
        made_up(bandwidth={2: 1e12}, gemm={name: {1: 1e13} for name in made_up().gemm}), LARGE
    )
    chosen = ways.best_way(ways.plan_ways(slow, SIZES["8B"], (1024,)))
    assert chosen is not None
    assert chosen.weights.name == "Q4_K_M"  # nothing larger reaches 5 tokens/s at 40 GB/s
    chosen = ways.best_way(ways.plan_ways(fast, SIZES["8B"], (1024,)))
    assert chosen is not None
    assert chosen.weights.name == "bf16"


def test_quantizing_adds_up_its_stages():
    """Rounding, hashing both ways and writing, one after another."""
    config, plan = SIZES["1B"], scheme("q8")
    made = made_up(hash=1e9, encode={"q8": 1e8}, disk_write=5e8)
    packed = config.n_params - (2 * config.n_layers + 1) * config.dim  # all but the norms
    out = plan.nbytes(config)
    expected = packed / 1e8 + (config.nbytes(2.0) + out) / 1e9 + out / 5e8
    assert quantizing.quantize_seconds(made, config, plan) == pytest.approx(expected)


# Serving and draft models ------------------------------------------------------------


def test_serving_follows_littles_law_and_saturates():
    target = ways.catalogue_target(machines.find_machine("H100"), SIZES["8B"])
    few, many = (
        serve.predict_serving(target, SIZES["8B"], ways.BF16, serve.Load(n, 2048, 400)) for n in (10, 60)
    )
    for found in (few, many):
        assert found.batch == pytest.approx(found.requests_per_s * 400 * found.tpot, rel=0.01)
        users = found.requests_per_s * (30 + found.ttft_mean + 400 * found.tpot)
        assert users == pytest.approx(10 if found is few else 60, rel=0.01)
    assert many.ttft_p95 > few.ttft_p95
    assert few.meets(1.0)
    crowd = serve.predict_serving(target, SIZES["8B"], ways.BF16, serve.Load(100_000, 2048, 400))
    assert not crowd.meets(1.0)
    assert crowd.prefill_share <= 1


def test_speculation_equals_a_sum_by_hand():
    """α = 1/2, k = 2: 1 + 1/2 + 1/4 tokens for two drafts and one pass."""
    found = serve.predict_draft(0.5, 0.1, 2)
    assert found.tokens_a_round == pytest.approx(1.75)
    assert found.speedup == pytest.approx(1.75 / 1.2)
    assert serve.predict_draft(0.0, 0.1, 3).speedup == pytest.approx(1 / 1.3)
    assert serve.best_draft(0.9, 0.01).k > serve.best_draft(0.5, 0.2).k
    for wrong in ({"alpha": 1.0}, {"alpha": -0.1}, {"cost": -1.0}, {"k": 0}):
        with pytest.raises(PlanError):
            serve.predict_draft(**({"alpha": 0.5, "cost": 0.1, "k": 2} | wrong))


# Profile, score and feel ------------------------------------------------------------------------------------


def test_a_profile_is_read_back_and_stale_or_broken_ones_are_not(here, tmp_path, monkeypatch):
    assert profile.load_profile() == here.profile
    monkeypatch.setattr(profile, "machine_key", lambda: "another machine")
    assert profile.load_profile() is None
    monkeypatch.undo()
    monkeypatch.setenv("HERD_CACHE", str(tmp_path))
    for text in ("{}", "[]", "no json", '{"schema": 4}'):
        profile.profile_path().write_text(text)
        assert profile.load_profile() is None


def test_the_device_reaches_the_measured_rates():
    made = made_up()
    device = made.device()
    for name, rates in made.gemm.items():
        for rows, rate in rates.items():
            assert device.reachable(name, rows) == pytest.approx(rate)


def test_factors_are_learned_from_three_runs_and_broken_lines_are_skipped(here):
    key = here.profile.key
    for measured in (2.0, 2.2):
        score.record_prediction(score.ScoredPrediction("decode", "8B", "s", 1.0, measured, key))
    assert score.learned_factors(key) == {}
    with score.history_path().open("a") as file:
        file.write('{"kind": "decode", "what"\n')
    score.record_prediction(score.ScoredPrediction("decode", "8B", "s", 1.0, 3.0, key))
    score.record_prediction(score.ScoredPrediction("decode", "8B", "s", 1.0, 9.0, "another machine"))
    assert score.learned_factors(key) == {"decode": 2.2}
    (summary,) = score.summarize_errors(score.read_history())
    assert (summary.n, summary.worst_error) == (4, pytest.approx(8 / 9))
    with pytest.raises(PlanError):
        score.record_prediction(score.ScoredPrediction("decode", "8B", "s", 0.0, 1.0, key))


def test_bench_rows_and_stages_are_recorded_with_their_predictions(here):
    rows = [
        {"work": "decode", "name": "decode at 128", "tokens": 128, "batch": 1, "seconds": 0.2, "kv": "bf16"},
        {"work": "prefill", "name": "prefill of 512", "tokens": 512, "batch": 1, "seconds": 20.0},
    ]
    compare.compare_bench(SIZES["8B"], "Q4_0", rows, "8B")
    weights = next(weights for weights in here.formats if weights.name == "Q4_0")
    assert rows[0]["predicted_seconds"] == here.decode(SIZES["8B"], weights, "bf16", 128)
    assert rows[1]["predicted_seconds"] == here.prefill(SIZES["8B"], weights, "bf16", 512)
    compare.compare_bench(
        SIZES["8B"], "Q6_K", rows, "8B"
    )  # not a format that the planner knows: nothing is recorded
    stage = {"stage": "teacher", "seconds": 90.0, "predicted_seconds": 75.0, "peak_rss_bytes": 9}
    compare.record_stages("demo", [stage])
    events = score.read_history()
    assert [event.kind for event in events] == ["decode", "prefill", "stage"]
    assert events[0].measured == 0.2
    assert {event.machine for event in events} == {here.profile.key}


def test_training_and_quantizing_are_recorded_with_their_predictions(here):
    config = ModelConfig(4096, 256, 5, 8, 4, 704)
    train = TrainConfig(steps=10, batch_size=16, context=256, optimizer=AdamW(lr=1e-3))
    planned = compare.compare_training(config, train, seconds=5.0, steps=10, what="tiny")
    assert planned == pytest.approx(10 * planned_step(here, config, train))
    assert compare.compare_training(config, train, seconds=0.0, steps=0, what="nothing was done") is None
    assert compare.compare_quantizing(config, scheme("q8"), 4.0, 1.0, "tiny-q8") > 0
    assert (
        compare.compare_quantizing(SIZES["1B"], scheme("Q6_K"), 4.0, 1.0, "a format that is not measured")
        is None
    )
    assert [(event.kind, event.measured) for event in score.read_history()] == [
        ("train", 5.0),
        ("quantize", 1.0),
    ]


def planned_step(here, config, train):
    job = Job(config, train.batch_size, train.context)
    return predict_step(job, ParallelLayout(micro=16, precision="fp32"), here.profile.machine()).seconds


def test_sample_text_takes_the_predicted_time():
    slept: list[float] = []
    said: list[str] = []
    count = feel.print_at_speed(5.0, 10.0, most_seconds=3.0, write=said.append, sleep=slept.append)
    assert slept[0] == 3.0
    assert sum(slept[1:]) == pytest.approx(3.0, abs=0.11)
    assert count == len(said) == len(slept) - 1
    whole = "".join(feel.sample_tokens())
    assert whole == feel.SAMPLE
    assert 1.1 < len(list(feel.sample_tokens())) / len(whole.split()) < 1.6


# The verbs ------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["8b", "llama3.1-70b"],
        ["run", "--size", "70b", "--machine", "2xRTX4090", "--context", "4k"],
        ["run", "--size", "405B", "--machine", "2xRTX4090"],
        ["run", "--price", "1500", "--watts", "120"],
        "serve --machine 8xH100 --users 50 --prompt 2k --answer 400 --p95-ttft 1s".split(),
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
        (["9B"], "9B: no such file, folder or model name"),
        (["run", "--size", "9B"], "no such file, folder or model name"),
        (["run", "--machine", "2xRTX409"], "RTX4090"),
        (["run", "--machine", "0xH100"], "1 to"),
        (["run", "--context", "256k"], "131,072"),
        (["run", "--batch", "0"], "1 to"),
        (["run", "--price", "-5", "--watts", "100"], "out of range"),
        (["run", "--usd-per-hour", "0"], "out of range"),
        (["serve", "--users", "0"], "1 to"),
        (["serve", "--p95-ttft", "soon"], "1s, 500ms"),
        (["serve", "--prompt", "130k", "--answer", "4k"], "131,072"),
        (["draft", "--size", "8B", "--draft", "70B"], "smaller"),
        (["draft", "--alpha", "1", "--size", "8B", "--draft", "1B"], "alpha"),
        (["draft", "--size", "405B", "--draft", "8B"], "does not fit"),
    ],
)
def test_an_impossible_request_is_refused_in_one_line(here, capsys, args, says):
    assert run(["plan", *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


def test_plan_with_a_saved_profile_needs_no_torch(here):
    code = "import sys; from herd.cli import run; code = run(['plan', '--json']); "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    record = json.loads(done.stdout)
    assert set(record["sizes"]) == {"1B", "3B", "8B", "70B"}


def test_any_model_is_planned_from_its_configuration(here, tmp_path, capsys):
    """A folder needs no weights, and a context that the model does not have is not shown."""
    config = ModelConfig(512, 256, 8, 4, 2, 576, max_context=2048)
    checkpoint.save_model(tmp_path / "whole", LlamaLM(config).init_weights(0))
    (tmp_path / "small").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "small")
    small = str(tmp_path / "small")
    assert run(["plan", small, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [way["context"] for way in found["sizes"][small]] == [1024, 2048] * 4
    assert found["sizes"][small][-1]["weights_bytes"] == named_scheme("Q4_0", config).nbytes(config)
    assert run(["plan", "run", "--model", small]) == 0
    assert f"{small} on this machine" in capsys.readouterr().out
    for verb in ("train", "finetune"):
        words = ["--size", small, "--machine", "RTX4090", "--tokens", "1M", "--json"]
        assert run(["plan", verb, *words]) == 0
        assert json.loads(capsys.readouterr().out)["n_params"] == config.n_params


@pytest.mark.parametrize(
    ("name", "weights", "command"),
    [
        ("8B", "Q4_K_M", "herd chat llama3.1-8b"),
        ("1B", "Q8_0", "herd quantize llama3.2-1b-bf16 --to Q8_0 --out llama3.2-1b-bf16-Q8_0 && herd chat "),
        ("405B", "bf16", "herd chat llama3.1-405b --dtype bf16"),
        ("smollm2", "Q4_0", "herd quantize smollm2-135m-bf16 --to Q4_0"),
        ("my/model.gguf", "Q8_0", "herd chat my/model.gguf"),
        (
            "runs/demo/instruct",
            "Q4_0",
            "herd quantize runs/demo/instruct --to Q4_0 --out instruct-Q4_0 && herd ",
        ),
    ],
)
def test_the_command_runs_the_planned_formats(name, weights, command):
    chosen = next(each for each in ways.GGUF_FORMATS if each.name == weights)
    way = ways.plan_way(ways.MeasuredTarget(made_up(), LARGE), SIZES["1B"], chosen, "bf16", 1024)
    assert plan_local._shell_command(name, way).startswith(command)


def test_the_time_of_measuring_is_the_same_everywhere(here, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"measures this machine once ({profile.SECONDS} s)" in readme
    assert run(["plan", "here", "--help"]) == 0
    assert f"({profile.SECONDS} s)" in capsys.readouterr().out


def test_learned_factors_are_applied_only_with_the_option(here, capsys):
    for _ in range(3):
        score.record_prediction(score.ScoredPrediction("decode", "8B", "s", 1.0, 2.0, here.profile.key))
    rates = []
    for options in ([], ["--learned"]):
        assert run(["plan", "run", "--size", "1B", *options, "--json"]) == 0
        rates.append(json.loads(capsys.readouterr().out)["best"]["tokens_per_s"])
    assert rates[0] == pytest.approx(2 * rates[1])


def test_a_machine_without_quantized_peaks_unpacks_the_weights(capsys):
    assert run(["plan", "run", "--machine", "M2Ultra-192GB", "--json"]) == 0
    ways_found = json.loads(capsys.readouterr().out)["ways"]
    assert [way["weights"] for way in ways_found] == ["bf16", "Q8_0", "Q4_K_M", "Q4_0"]
