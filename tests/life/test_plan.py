"""Plans are pure functions of the measured speeds, possible in every part, and within their time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.distill.prune import check_target
from herd.errors import DataError
from herd.life.plan import (
    TIMED_MODES,
    Plan,
    Speeds,
    chosen,
    extended,
    quick_plan,
    rung,
    student_of,
    timed_plan,
)
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
    seconds, speed = TIMED_MODES[mode].seconds, speeds.rungs[teacher.dim, teacher.n_layers]
    assert plan.dtype == speeds.dtype
    if plan.distil.steps > 20:
        assert plan.distil.tokens == pytest.approx(seconds["student"] * speeds.distil, rel=0.05)
    if (
        plan.pretrain.steps > 20
    ):  # else the machine is too slow for the mode, and the minimum of steps is done
        assert plan.pretrain.tokens == pytest.approx(seconds["teacher"] * speed, rel=0.05)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_largest_size_that_is_fast_enough_is_chosen() -> None:
    wanted = TIMED_MODES["full"].wanted_speed
    speeds = {LADDER[0]: 4 * wanted, LADDER[1]: 2 * wanted, LADDER[2]: wanted, LADDER[3]: wanted / 2}
    assert chosen(speeds, "full") == LADDER[2]


def test_a_machine_that_is_too_slow_gets_the_smallest_size() -> None:
    assert chosen({LADDER[0]: 10.0}, "demo") == LADDER[0]


@pytest.mark.parametrize("shape", LADDER)
def test_a_student_is_about_half_its_teacher(shape: tuple[int, int]) -> None:
    teacher = rung(*shape, vocab_size=4096, context=256)
    student = student_of(teacher)
    check_target(teacher, student)
    assert 0.3 < student.n_params / teacher.n_params < 0.75


def test_scaling_is_relative_to_the_first_context() -> None:
    config = extended(extended(rung(64, 2, 600, 256), 512), 1024)
    assert config.max_context == 1024
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.rope_scaling.original_context) == (4.0, 256)


def test_an_existing_run_is_never_overwritten(tmp_path) -> None:
    folder = tmp_path / "x"
    RaiseRun.create(folder, quick_plan("x", 0, None))
    with pytest.raises(DataError, match="--resume"):
        RaiseRun.refuse_existing(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        RaiseRun.saved_plan(folder)
    with pytest.raises(DataError, match="not a run"):
        RaiseRun.saved_plan(tmp_path / "nothing")
