"""Published runs against predictions: the fit, the simulation of failures and the sizes that the benches
use."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

import published_runs as published
from failures import simulate_run
from fitting import cross_fit, fit_factors
from herd.llama.config import SIZES
from herd.plan import machines
from herd.plan.goodput import RESTART, young_daly
from herd.plan.layout import PLAIN_RECOMPUTES, check_layout
from herd.plan.search import search
from herd.plan.step import model_flops_utilization, predict_step
from herd.quant import formats
from herd.train.memory import state_nbytes
from plan_published import block_formats, checkpoint_nbytes


@pytest.mark.parametrize("index", range(3))
def test_mfu_of_metas_layouts_is_predicted_within_15_percent(index):
    row = published.META[index]
    machine = machines.find_machine(f"{row.devices}xH100")
    assert row.layout.devices == row.devices
    seconds = predict_step(row.job, row.layout, machine).seconds
    assert model_flops_utilization(row.job, machine, seconds) == pytest.approx(row.mfu, rel=0.15)
    result = search(row.job, machine, recomputes=PLAIN_RECOMPUTES)
    rank = [found.layout for found in result.found].index(row.layout) + 1
    assert rank <= 0.1 * len(result.found)


def test_predictions_keep_the_order_of_metas_layouts():
    found = [
        model_flops_utilization(row.job, machine, predict_step(row.job, row.layout, machine).seconds)
        for row in published.META
        for machine in [machines.find_machine(f"{row.devices}xH100")]
    ]
    assert found == sorted(found, reverse=True)


def test_published_layouts_divide_their_jobs_and_machines():
    for row in published.TITAN:
        check_layout(row.layout, row.job)
        assert row.layout.devices == machines.find_machine(row.machine).count


def test_the_fit_recovers_known_factors():
    rows = [(a, b) for a in (1.0, 2.0, 5.0) for b in (1.0, 3.0, 7.0)]

    def predict_row(row, values):
        return 1 / (row[0] * values["x"] + row[1] * values["y"])

    true = {"x": 1.7, "y": 0.6}
    found = fit_factors(rows, lambda row: predict_row(row, true), predict_row, {"x": 1.0, "y": 1.0})
    assert found == pytest.approx(true, rel=0.05)
    errors, _ = cross_fit(rows, lambda row: predict_row(row, true), predict_row, {"x": 1.0, "y": 1.0})
    assert statistics.median(map(abs, errors)) < 0.05


def test_simulated_54_days_agree_with_meta_and_with_the_formula():
    good = young_daly(16_384, state_nbytes(SIZES["405B"]))

    def share(restart):
        times = {"interval": good.interval, "checkpoint_seconds": good.checkpoint_seconds, "restart": restart}
        return statistics.fmean(simulate_run(54, 419, 47, **times, seed=seed) for seed in range(5))

    assert 0.9 <= share(RESTART) <= 0.97
    assert share(1800) < share(RESTART) < share(60)
    assert share(RESTART) == pytest.approx(good.effective, abs=0.03)


def test_without_failures_only_checkpoints_cost_time():
    assert simulate_run(10, 0, 0, interval=90, checkpoint_seconds=10, restart=60) == pytest.approx(
        0.9, abs=1e-3
    )
    assert simulate_run(1, 0, 1, interval=90, checkpoint_seconds=0, restart=8640) == pytest.approx(
        0.9, abs=0.02
    )


@given(st.integers(0, 300), st.floats(1, 7200), st.floats(1, 3600), st.integers(0, 99))
def test_the_simulated_share_is_between_0_and_1(failures, restart, interval, seed):
    share = simulate_run(5, failures, 3, interval=interval, checkpoint_seconds=2, restart=restart, seed=seed)
    assert 0 <= share <= 1


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_checkpoint_bytes_equal_those_of_the_quantizer(name):
    config = SIZES["8B"]
    assert checkpoint_nbytes(config, name) == formats.scheme(name).nbytes(config)


def test_block_formats_of_every_size_are_ordered_by_bits():
    for config in SIZES.values():
        found = block_formats(config)
        assert found["BF16"] == config.nbytes(2.0)
        assert found["F32"] == config.nbytes(4.0)
        assert set(formats.FORMATS) < set(found)
        assert found["Q2_K"] < found["Q4_K"] < found["Q8_0"] < found["BF16"]
