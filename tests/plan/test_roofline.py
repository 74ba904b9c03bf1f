"""Operators add up to the model's own counts. Rooflines bend where they must."""

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.errors import PlanError
from herd.llama.config import SIZES
from herd.plan import machines, ops
from herd.plan.roofline import EfficiencyCurve, Op, all_gather, all_reduce, operator_cost


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tp", [1, 8])
def test_operators_add_up_to_the_models_flops(size, tp):
    config, rows, keys = SIZES[size], 64, 777
    found = sum(op.flops * op.count for op in ops.forward_ops(config, rows, keys, keys * rows, tp=tp))
    assert found * tp == pytest.approx(rows * config.flops_per_token(keys), rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_one_token_reads_every_weight_once_and_the_whole_cache(size, monkeypatch):
    monkeypatch.setattr(ops, "ACTIVATION", 0.0)
    config, context = SIZES[size], 10_000
    moved = sum(
        op.nbytes * op.count
        for op in ops.forward_ops(config, 1, context, context)
        if op.kind in ("gemm", "attention")
    )
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.dim
    norms = (2 * config.n_layers + 1) * config.dim
    logits = 4 * config.vocab_size + 2 * config.dim
    expected = config.nbytes() - 2 * (embedding + norms) + context * config.kv_nbytes_per_token() + logits
    assert moved == pytest.approx(expected, rel=1e-12)


def test_decode_is_bound_by_memory_and_prefill_by_compute():
    device = machines.find_machine("H100").device
    config = SIZES["8B"]
    for rows, bound in ((1, "memory"), (4096, "compute")):
        by_name = {op.name: operator_cost(op, device) for op in ops.layer_ops(config, rows, rows / 2, rows)}
        found = by_name["gate up"]
        assert (found.compute > found.memory) == (bound == "compute")


def test_tp_that_does_not_divide_or_exceeds_the_machine_is_refused():
    with pytest.raises(PlanError, match="tp=3"):
        ops.layer_ops(SIZES["8B"], 1, 1, 1, tp=3)
    with pytest.raises(PlanError, match="use a smaller tp"):
        ops.decode_seconds(SIZES["8B"], machines.find_machine("2xA100"), tp=4)


@given(st.floats(1, 1e12), st.floats(1, 1e12))
def test_a_curve_stays_between_its_points_and_rises_with_them(a, b):
    curve = EfficiencyCurve(((10.0, 0.1), (1e3, 0.5), (1e6, 0.9)))
    assert 0.1 <= curve(a) <= 0.9
    if a <= b:
        assert curve(a) <= curve(b) + 1e-12


def test_a_curve_passes_through_its_points():
    curve = EfficiencyCurve(((10.0, 0.1), (1e3, 0.5)))
    assert curve(10) == 0.1
    assert curve(1e3) == 0.5
    assert curve(100) == pytest.approx(0.3)
    with pytest.raises(PlanError):
        EfficiencyCurve(((2.0, 0.1), (1.0, 0.2)))


def test_an_operator_takes_the_longer_of_compute_and_memory_plus_overhead():
    device = machines.find_machine("A100").device
    share = device.efficiency
    gemm = operator_cost(Op("x", "gemm", 1e12, 1.0), device)
    assert gemm.seconds == pytest.approx(1e12 / (312e12 * share.gemm["bf16"](1)) + share.op_seconds)
    stream = operator_cost(Op("x", "memory", 0.0, 1e9), device)
    assert stream.seconds == pytest.approx(1e9 / (2.039e12 * share.memory(1)) + share.op_seconds)


def test_a_dtype_that_the_chip_lacks_falls_back_to_bf16():
    a100 = machines.find_machine("A100").device
    assert a100.peak("fp8") == a100.peak("bf16")
    assert not a100.has("fp8")


@given(st.integers(2, 4096), st.floats(1e3, 1e12))
def test_a_ring_is_never_faster_than_its_link(ranks, nbytes):
    link = machines.find_machine("8xH100").link
    assert all_gather(nbytes, ranks, link) >= nbytes / 2 / link.bandwidth
    assert all_reduce(nbytes, ranks, link) == pytest.approx(2 * all_gather(nbytes, ranks, link))
    assert all_gather(nbytes, 1, link) == 0


def test_planning_needs_no_torch():
    code = "import sys, herd.plan.ops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_more_ranks_decode_faster_but_less_than_proportionally():
    times = [
        ops.decode_seconds(SIZES["70B"], machines.find_machine("8xA100"), context=128, tp=tp)
        for tp in (1, 2, 4, 8)
    ]
    assert all(math.ceil(a / b) == 2 and a / b < 2 for a, b in itertools.pairwise(times))
