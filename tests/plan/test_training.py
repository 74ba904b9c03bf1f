"""Training plans: bytes as the trainer counts them, time that behaves, published runs met, impossible asks
refused."""

import contextlib
from dataclasses import replace

import pytest
import torch

from herd.errors import PlanError
from herd.kernels import build, recompute
from herd.llama.config import SIZES, ModelConfig
from herd.llama.model import LlamaLM
from herd.plan import machines, training
from herd.plan.goodput import HOURS_PER_FAILURE, young_daly
from herd.plan.layout import Job, ParallelLayout, check_layout, stage_layers
from herd.plan.memory import in_flight, rank_nbytes, usable_memory
from herd.plan.money import run_cost
from herd.plan.search import layouts, search
from herd.plan.step import model_flops_utilization, step_time
from herd.train.memory import state_nbytes, train_nbytes

SMALL = Job(SIZES["8B"], 512, 8192)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("ranks", [8, 64])
def test_sharded_data_parallel_bytes_equal_the_trainers_formula(activation_checkpointing, ranks):
    layout = ParallelLayout(
        dp=ranks, micro=2, recompute="full" if activation_checkpointing else "none", shard="all"
    )
    own = train_nbytes(
        SIZES["8B"],
        2,
        8192,
        dtype="bf16",
        activation_checkpointing=activation_checkpointing,
        shard=ranks,
        ranks=ranks,
    )
    assert rank_nbytes(SMALL, layout).total == pytest.approx(own.total, rel=1e-6)


def test_every_split_saves_memory_and_the_full_state_adds_up():
    config = SIZES["405B"]
    job = Job(config, 2048, 8192)
    base = ParallelLayout(tp=4, pp=4, dp=64, chunks=1, shard="optimizer")
    whole = rank_nbytes(job, base)
    assert rank_nbytes(job, replace(base, tp=8)).weights == pytest.approx(whole.weights / 2)
    assert rank_nbytes(job, replace(base, cp=2)).activations == pytest.approx(whole.activations / 2)
    assert rank_nbytes(job, replace(base, recompute="full")).activations < whole.activations / 5
    assert rank_nbytes(job, replace(base, shard="gradients")).gradients < whole.gradients * 1.1
    assert rank_nbytes(job, replace(base, dp=128)).optimizer == pytest.approx(whole.optimizer / 2)
    one = rank_nbytes(Job(config, 1, 8192), ParallelLayout())
    assert one.optimizer == state_nbytes(config)


def test_a_pipeline_holds_at_most_all_micro_batches():
    assert in_flight(ParallelLayout(pp=16, chunks=8), 32) == 16 + 15 / 8
    assert in_flight(ParallelLayout(pp=16), 8) == 8
    assert in_flight(ParallelLayout(), 100) == 1


def test_405b_divides_with_one_layer_less_in_the_first_and_last_stage():
    assert stage_layers(126, 16) == (8, 7)
    assert stage_layers(126, 7) == (18, 18)
    assert stage_layers(126, 5) is None
    for pp in range(1, 127):
        layers = stage_layers(126, pp)
        if layers and pp > 1:
            assert layers[0] * (pp - 2) + 2 * layers[1] == 126


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tp": 3}, "tp=3"),
        ({"pp": 5}, "pp=5"),
        ({"dp": 7}, "use a multiple of 7"),
        ({"cp": 3}, "cp=3"),
        ({"chunks": 2}, "chunks=2"),
        ({"micro": 0}, "micro=0"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_a_cure(changes, said):
    with pytest.raises(PlanError) as caught:
        check_layout(replace(ParallelLayout(), **changes), SMALL)
    assert said in str(caught.value)


def test_no_layout_computes_faster_than_the_machine_can():
    machine = machines.find_machine("64xH100")
    for layout in list(layouts(SMALL, machine))[::40]:
        step = step_time(SMALL, layout, machine)
        assert (
            0
            < model_flops_utilization(SMALL, machine, step.seconds)
            < machine.device.efficiency.gemm["bf16"](1)
        )
        assert all(part >= 0 for part in step.parts().values())


def test_the_bubble_follows_the_formula():
    machine, job = machines.find_machine("8192xH100"), Job(SIZES["405B"], 2048, 8192)
    for chunks in (1, 2, 8):
        step = step_time(job, ParallelLayout(8, 1, 16, 64, chunks=chunks, shard="gradients"), machine)
        busy = step.gemm + step.attention + step.memory + step.recompute + step.tp + step.cp + step.pp
        assert step.bubble / busy == pytest.approx(15 / (chunks * 32))


def test_recomputation_costs_time_and_saves_memory():
    machine = machines.find_machine("8xH100")
    runs = [ParallelLayout(dp=8, micro=1, recompute=kind) for kind in ("plain", "none", "selective", "full")]
    times = [step_time(SMALL, layout, machine).seconds for layout in runs]
    held = [rank_nbytes(SMALL, layout).total for layout in runs]
    assert times == sorted(times)
    assert held == sorted(held, reverse=True)
    assert times[0] == times[1]
    assert times[3] / times[0] == pytest.approx(4 / 3, abs=0.05)


@pytest.mark.skipif(not build.ready(), reason="no C++ compiler: plain torch keeps more")
def test_plain_autograd_keeps_the_input_of_every_matmul(monkeypatch):
    config = ModelConfig(64, 128, 4, 4, 2, 384, head_dim=32)
    model = LlamaLM(config).init_weights(0).bfloat16()
    params = {param.untyped_storage().data_ptr() for param in model.parameters()}

    def kept(nothing_made_again: bool) -> int:
        found: dict[int, int] = {}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        if nothing_made_again:
            monkeypatch.setattr("herd.llama.model.cheaply", contextlib.nullcontext)
        monkeypatch.setattr(recompute, "_keep", pack)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(torch.zeros(2, 128, dtype=torch.int64))
        assert out.requires_grad
        return sum(size for place, size in found.items() if place not in params)

    job = Job(config, 2, 128)
    plain, cheap = (
        rank_nbytes(job, ParallelLayout(micro=2, recompute=kind)).activations for kind in ("plain", "none")
    )
    assert kept(False) - kept(True) == pytest.approx(cheap - plain, rel=0.01)


def test_the_search_is_exhaustive_and_sorted():
    machine = machines.find_machine("8xH100")
    job = Job(SIZES["8B"], 64, 8192)
    result = search(job, machine)
    assert result.seen == len(set(layouts(job, machine)))
    assert 0 < len(result.found) < result.seen
    times = [found.seconds for found in result.found]
    assert times == sorted(times)
    for found in result.found:
        check_layout(found.layout, job)
        assert found.layout.devices == 8
        assert found.nbytes.total <= usable_memory(machine.device.memory)


def test_goodput_falls_with_devices_and_restarts():
    state = state_nbytes(SIZES["405B"])
    shares = [young_daly(count, state).effective for count in (1, 1_000, 16_384, 100_000)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0] < 1
    assert pytest.approx(50_677, abs=1) == HOURS_PER_FAILURE
    best = young_daly(16_384, state)
    assert best.interval == pytest.approx((2 * best.checkpoint_seconds * best.between_failures) ** 0.5)


def test_adapters_take_less_memory_and_time():
    machine = machines.find_machine("8xA100")
    jobs = [training.finetune_job(SIZES["8B"], 64, 2048, method) for method in training.METHODS]
    plans = [training.plan_training(job, machine, 1e8) for job in jobs]
    layout = ParallelLayout(dp=8, micro=1, recompute="full", shard="gradients")
    held = [rank_nbytes(job, layout).total for job in jobs]
    assert held == sorted(held, reverse=True)
    assert plans[1].hours < plans[0].hours
    assert jobs[1].adapters == training.adapter_params(SIZES["8B"], 16)
    assert plans[1].best.mfu < 1


def test_adapter_parameters_equal_a_sum_by_hand():
    config = SIZES["8B"]
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    pairs = [(config.dim, q), (config.dim, kv), (config.dim, kv), (q, config.dim)]
    pairs += [(config.dim, config.ffn_dim)] * 2 + [(config.ffn_dim, config.dim)]
    assert (
        training.adapter_params(config, 16)
        == config.n_layers * 16 * sum(a + b for a, b in pairs)
        == 41_943_040
    )


def test_labelling_takes_one_forward_pass_over_every_token():
    machine = machines.find_machine("16xH100")
    found = training.label_with_teacher(SIZES["405B"], machine, 1e9, 8192)
    ideal = 1e9 * SIZES["405B"].flops_per_token(4096) / (16 * machine.device.peak("bf16")) / 3600
    assert ideal / 0.73 < found.hours < ideal / 0.4
    with pytest.raises(PlanError, match="16xH100"):
        training.label_with_teacher(SIZES["405B"], machines.find_machine("8xH100"), 1e9, 8192)


def test_a_refusal_names_a_machine_that_would_do():
    with pytest.raises(PlanError, match="8xRTX4090 would suffice"):
        training.plan_training(
            training.finetune_job(SIZES["8B"], 16, 2048, "full"), machines.find_machine("RTX4090"), 1e8
        )


@pytest.mark.parametrize(
    "layout, said",
    [
        (ParallelLayout(tp=8), "8 devices, the machine has 16"),
        (ParallelLayout(tp=16), "exceeds the 8 devices of a node"),
        (ParallelLayout(dp=16, micro=16, shard="optimizer"), "the largest part is activations"),
    ],
)
def test_a_given_layout_that_is_impossible_is_refused(layout, said):
    with pytest.raises(PlanError, match=said):
        training.plan_training(SMALL, machines.find_machine("16xH100"), 1e9, fixed=layout)


def test_cost_is_hours_times_price():
    machine = machines.find_machine("10xH100")
    found = run_cost(machine, 100.0, 2.0)
    assert found.rent == 2000
    assert found.energy_kwh == pytest.approx(10 * 700 * 1.25 * 100 / 1000)
    assert found.own is not None
    assert found.own < found.buy
    assert run_cost(machines.find_machine("M1"), 1.0).rent is None
