"""Plans: the same work on every machine, possible in every part, and recipes that `herd train` accepts."""

from pathlib import Path

import pytest
import yaml

from herd.distill.prune import check_target
from herd.errors import DataError
from herd.life import probe
from herd.life.plan import Plan, make_plan, student_of, toy_config
from herd.life.run import RaiseRun
from herd.life.stages import config_of, shape_section
from herd.llama.config import extended
from herd.train.recipe import ModelSpec

MODES = ("quick", "demo", "full")
STAGES = ["teacher", "long", "instruct", "student", "control"]


@pytest.mark.parametrize("mode", MODES)
def test_every_plan_is_possible(mode: str) -> None:
    plan = make_plan("x", mode, 0, None)
    teacher, student = plan.teacher_config, plan.student_config
    check_target(teacher, student)
    assert student.n_params < teacher.n_params
    assert [stage.name for stage in plan.training] == STAGES
    assert plan.stage("student").phases == plan.stage("control").phases
    contexts = [phase.context for phase in plan.stage("long").phases]
    assert contexts == sorted(contexts)
    assert all(phase.context <= teacher.max_context for phase in plan.stage("teacher").phases)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_a_machine_decides_only_dtype_and_time(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine ten times slower, and faster in the other dtype, does the same work in ten times the time."""

    def speed(config: object, dtype: str, *_: object) -> float:
        return factor * (2e4 if (dtype == "bf16") == (factor > 1) else 1e4)

    plan = make_plan("x", "demo", 0, None)
    monkeypatch.setattr(probe, "training_speed", speed)
    timed = probe.predict(plan)
    assert timed.training == plan.training
    assert timed.dtype == ("bf16" if factor > 1 else "fp32")
    tokens = sum(phase.tokens for phase in plan.stage("control").phases)
    assert 1 < timed.predicted_seconds["control"] / (tokens / (factor * 2e4)) < 1.6
    assert set(timed.predicted_seconds) == {"tokenizer", *STAGES, "measure", "report"}


@pytest.mark.parametrize("shape", [(64, 3), (128, 3), (192, 4), (256, 4)])
def test_a_student_is_about_half_its_teacher(shape: tuple[int, int]) -> None:
    teacher = toy_config(*shape, vocab_size=2048)
    student = student_of(teacher)
    check_target(teacher, student)
    assert 0.3 < student.n_params / teacher.n_params < 0.75


def test_a_recipe_can_have_the_shape_of_an_extended_model() -> None:
    """The control of a run whose context was extended starts from such a shape."""
    config = extended(toy_config(64, 2, 600), 512)
    shape = yaml.safe_load(yaml.safe_dump(shape_section(config)))
    assert config_of(shape) == config
    assert ModelSpec(shape=shape).config() == config


def test_scaling_is_relative_to_the_first_context() -> None:
    config = extended(extended(toy_config(64, 2, 600), 512), 1024)
    assert config.max_context == 1024
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.rope_scaling.original_context) == (4.0, 256)
    assert extended(config, 512) == config


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    RaiseRun.create(folder, make_plan("x", "quick", 0, None))
    with pytest.raises(DataError, match="--resume"):
        RaiseRun.refuse_existing(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        RaiseRun.saved_plan(folder)
    with pytest.raises(DataError, match="not a run"):
        RaiseRun.saved_plan(tmp_path / "nothing")
