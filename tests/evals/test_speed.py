"""Measuring speed: the bytes and operations counted, and the turns taken. No time is asserted."""

import math
import sys

import pytest
import torch

from herd.errors import EngineError
from herd.evals import speed
from herd.evals.rival import LlamaCpp, find_python
from herd.llama.config import SIZES, ModelConfig
from herd.llama.model import LlamaLM
from herd.quant import scheme
from herd.quant.random import random_quantized

CONFIG = ModelConfig(512, 256, 2, 4, 2, 512, max_context=256)


@pytest.fixture(scope="module")
def model() -> LlamaLM:
    return random_quantized(CONFIG, scheme("q4"))


def test_bytes_of_a_step_are_all_weights_but_the_embedding(model):
    plan = scheme("q4")
    embedding = 512 * 256 // 32 * 18
    assert speed.weights_read(model) == plan.nbytes(CONFIG) - embedding
    tied = CONFIG.replace(tie_embeddings=True)
    assert speed.weights_read(random_quantized(tied, plan)) == plan.nbytes(tied)
    plain = LlamaLM(CONFIG)
    assert speed.weights_read(plain) == CONFIG.nbytes(4.0) - 512 * 256 * 4


def test_the_bytes_read_from_the_cache_follow_its_dtype():
    """8B: 32 layers, 8 KV heads of 128 channels, keys and values. With int8 there is a bf16 scale for 32 of them."""
    assert speed.cache_read(SIZES["8B"], "bf16", 10) == 10 * 32 * 8 * 128 * 2 * 2
    assert speed.cache_read(SIZES["8B"], "int8", 10) == 10 * 32 * 8 * 128 * 2 * (1 + 2 / 32)


def test_the_operations_of_a_turn_follow_the_configuration():
    """Against sums written out by hand for 8B: 7.5e9 weights outside the embedding, 2 operations each."""
    config = SIZES["8B"]
    outside = config.n_params - 128_256 * 4096 - 65 * 4096
    attention = 4 * 32 * 32 * 128
    assert speed.Work("decode", 100).flops(config) == 2 * outside + attention * 100
    assert speed.Work("decode", 100, 16).flops(config) == 16 * (2 * outside + attention * 100)
    head = 2 * 128_256 * 4096
    assert speed.Work("prefill", 512).flops(config) == 512 * (2 * outside - head + attention * 256) + head


def test_turns_are_taken_and_the_first_round_does_not_count():
    calls: list[str] = []
    numbers = {"a": iter([100.0, 1.0, 2.0]), "b": iter([200.0, 3.0, 5.0])}

    def turn(name: str) -> float:
        calls.append(name)
        return next(numbers[name])

    found = speed.alternate({name: (lambda name=name: turn(name)) for name in numbers}, 2)
    assert found == {"a": [1.0, 2.0], "b": [3.0, 5.0]}
    assert calls == ["a", "b"] * 3
    assert speed.paired(found["a"], found["b"]) == (2.75, 2.625, 2.875)
    assert speed.paired([2.0], [3.0]) == (1.5, 1.5, 1.5)


def test_steps_move_every_sequence_by_one(model):
    """What the runner times is what the engine gives: as many tokens as steps, whatever the batch."""
    runner = speed.Runner(model, context=64, batch=3)
    work = speed.Work("decode", 10, 3)
    runner.start(work, 6)
    assert len(runner.steps(5)) == 5
    rest = [
        stream.completion().ids for stream in runner._streams
    ]  # what is left of 6 + AHEAD after one and five
    assert [len(ids) for ids in rest] == [speed.AHEAD] * 3
    runner.start(work, 2)
    runner.stop()
    assert runner.engine.n_active == 0


def test_no_prompt_is_used_twice(model, monkeypatch):
    runner = speed.Runner(model, context=64, batch=2)
    prompts = []
    submit = runner.engine.submit
    monkeypatch.setattr(
        runner.engine,
        "submit",
        lambda request: (prompts.append(tuple(request.prompt_ids)), submit(request))[1],
    )
    for _ in range(3):
        assert runner.prefill(speed.Work("prefill", 12, 2)) > 0
    assert len(set(prompts)) == len(prompts) == 6


def test_records_hold_medians_ratios_and_shares(model):
    started: list[tuple[int, int]] = []

    class Rival:
        def prefill(self, tokens):
            return 3600.0

        def start(self, context, batch):
            started.append((context, batch))

        def steps(self, n):
            return [3600.0] * n

    works = [speed.Work("decode", 8, 2), speed.Work("prefill", 16)]
    decode, prefill = speed.measure_speed(
        model, works, rounds=2, steps=2, bandwidth=lambda: 1e9, rival=Rival()
    )
    assert started == [(8, 2)]
    assert decode["nbytes"] == speed.weights_read(model) + 2 * speed.cache_read(CONFIG, "bf16", 11)
    assert math.isclose(decode["bytes_per_second"], decode["nbytes"] / decode["seconds"])
    assert decode["read_bandwidth"] == 1e9
    assert math.isclose(decode["tokens_per_second"], 2 / decode["seconds"])
    assert math.isclose(prefill["tokens_per_second"], 16 / prefill["seconds"])
    assert math.isclose(prefill["gops"], speed.Work("prefill", 16).flops(CONFIG) / prefill["seconds"] / 1e9)
    assert "bytes_per_second" not in prefill
    for record in (decode, prefill):
        low, high = record["rival"]["ratio_quartiles"]
        assert 1 < low <= record["rival"]["ratio"] <= high


def test_the_overhead_is_measured_with_the_same_number_of_layers(monkeypatch):
    seen = []
    monkeypatch.setattr(
        speed,
        "random_quantized",
        lambda config, plan, dtype: seen.append((config, plan)) or random_quantized(config, plan),
    )
    config, plan = SIZES["1B"].replace(n_layers=3), scheme("q4k")
    assert speed.overhead_seconds(config, plan, torch.float32, batch=2, steps=3) > 0
    assert seen[0][0].n_layers == 3
    assert seen[0][1] == plan


@pytest.mark.parametrize("name", ["q4", "q8", "bf16"])
def test_the_scheme_of_a_model_is_recognized(name):
    plan = scheme(name)
    assert speed.scheme_of(random_quantized(CONFIG, plan, dtype=torch.bfloat16)) == plan


# The rival's side of the line, by a stand-in ----------------------------------------------------------------

STAND_IN = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "load":
        answer = {"version": "0", "system": request["file"]}
    elif request["do"] == "prefill":
        answer = {"seconds": float(request["tokens"])}
    elif request["do"] == "start":
        answer = {"error": "RuntimeError: no room"}
    else:
        sys.exit("it fell over")
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/stand_in.py"\n')
    python.chmod(0o755)
    monkeypatch.setenv("HERD_RIVALS", str(tmp_path))
    return tmp_path / "model.gguf"


def test_the_rival_is_asked_and_answers_by_lines(stand_in):
    with LlamaCpp(stand_in, threads=1, context=64) as rival:
        assert (rival.version, rival.system) == ("0", str(stand_in))
        assert rival.prefill(12) == 12.0
        with pytest.raises(EngineError, match=r"model\.gguf: llama\.cpp: RuntimeError: no room"):
            rival.start(8, 2)
        with pytest.raises(EngineError, match="process ended: it fell over"):
            rival.steps(1)
    assert rival._process.returncode is not None


def test_a_missing_rival_is_refused_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("HERD_RIVALS", str(tmp_path))
    with pytest.raises(EngineError, match=r"make rivals.*HERD_RIVALS"):
        find_python()
