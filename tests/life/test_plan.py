"""Plans: pure functions of what was measured, possible in every part, and within their time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.distill.prune import check_target
from herd.errors import DataError
from herd.life.plan import SHARES, Plan, Speeds, chosen, extended, quick_plan, rung, student_of, timed_plan
from herd.life.probe import LADDER
from herd.life.run import RaiseRun

SPEEDS = st.builds(
    lambda dtype, of, distil, control: Speeds(dtype, dict(zip(LADDER, of, strict=False)), distil, control),
    st.sampled_from(["fp32", "bf16"]),
    st.lists(st.floats(50, 1e6), min_size=1, max_size=len(LADDER)),
    st.floats(50, 1e6),
    st.floats(50, 1e6),
)


@given(speeds=SPEEDS, mode=st.sampled_from(["demo", "full"]))
def test_every_plan_is_possible_and_keeps_its_time(speeds: Speeds, mode: str) -> None:
    plan = timed_plan("x", mode, 0, None, 4096, speeds)
    teacher, student = plan.teacher_config, plan.student_config
    check_target(teacher, student)
    assert student.n_params < teacher.n_params
    assert plan.instruct.context <= plan.extend[-1].context
    shares, speed = SHARES[mode], speeds.rungs[teacher.dim, teacher.n_layers]
    assert plan.dtype == speeds.dtype
    if plan.distil.steps > 20:
        assert plan.distil.tokens == pytest.approx(shares.distil * speeds.distil, rel=0.05)
    if plan.pretrain.steps > 20:  # else the machine is too slow for its mode, and the least is done
        assert plan.pretrain.tokens == pytest.approx(shares.pretrain * speed, rel=0.05)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_largest_rung_that_sees_enough_is_chosen() -> None:
    wanted = SHARES["full"].wanted_speed
    speeds = {LADDER[0]: 4 * wanted, LADDER[1]: 2 * wanted, LADDER[2]: wanted, LADDER[3]: wanted / 2}
    assert chosen(speeds, "full") == LADDER[2]


def test_too_slow_a_machine_gets_the_smallest() -> None:
    assert chosen({LADDER[0]: 10.0}, "demo") == LADDER[0]


@pytest.mark.parametrize("shape", LADDER)
def test_half_the_teacher(shape: tuple[int, int]) -> None:
    teacher = rung(*shape, vocab_size=4096, context=256)
    student = student_of(teacher)
    check_target(teacher, student)
    assert 0.3 < student.n_params / teacher.n_params < 0.75


def test_extension_counts_from_the_first_context() -> None:
    config = extended(extended(rung(64, 2, 600, 256), 512), 1024)
    assert config.max_context == 1024
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.rope_scaling.original_context) == (4.0, 256)


def test_a_run_is_never_started_over(tmp_path) -> None:
    folder = tmp_path / "x"
    RaiseRun.create(folder, quick_plan("x", 0, None))
    with pytest.raises(DataError, match="--resume"):
        RaiseRun.refuse_existing(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        RaiseRun.saved_plan(folder)
    with pytest.raises(DataError, match="not a run"):
        RaiseRun.saved_plan(tmp_path / "nothing")
