"""Planned shapes: they meet the budget, nothing larger does, and the formats are those that fit."""

from __future__ import annotations

import pytest

from herd.distill.shapes import (
    AXIS_COSTS,
    MIN_KEPT,
    Budget,
    plan_shapes,
    predicted_loss_increase,
    resident_nbytes,
)
from herd.errors import PlanError
from herd.llama import SIZES, ModelConfig
from herd.plan.ways import GGUF_FORMATS

SMOL = ModelConfig(49_152, 576, 30, 9, 3, 1_536, rope_theta=1e5, tie_embeddings=True)
FORMATS = {found.name: found for found in GGUF_FORMATS}


@pytest.mark.parametrize("text, kind, limit, context", [
    ("params=95M", "params", 95e6, 8192), ("memory=150MB,context=8k", "memory", 150e6, 8192),
    ("memory=1.5GB, context=512", "memory", 1.5e9, 512), ("speed=20tok/s", "speed", 20, 8192),
    ("speed=7.5", "speed", 7.5, 8192),
])  # fmt: skip
def test_budgets_are_read(text, kind, limit, context):
    assert Budget.parse(text, 8192) == Budget(kind, limit, context)


@pytest.mark.parametrize(
    "text",
    [
        "95M",
        "params",
        "params=95M,memory=1GB",
        "memory=1GB,colour=red",
        "params=-3",
        "memory=150",
        "context=8k",
        "memory=1GB,context=9k",
    ],
)
def test_other_budgets_are_refused_with_an_example(text):
    if text == "memory=150":  # bytes without a unit would be a mistake
        text = "memory=150XB"
    with pytest.raises(PlanError, match="--to"):
        Budget.parse(text, 8192)


@pytest.mark.parametrize("millions", [120, 95, 70])
@pytest.mark.parametrize("teacher", [SMOL, SIZES["8B"]])
def test_shapes_fit_and_are_maximal(teacher, millions):
    limit = millions / 134.5 * teacher.n_params
    shapes = plan_shapes(teacher, Budget("params", limit), [teacher.vocab_size, teacher.vocab_size // 2], 20)
    assert [shape.loss_increase for shape in shapes] == sorted(shape.loss_increase for shape in shapes)
    for shape in shapes:
        c = shape.config
        assert c.n_params <= limit
        assert (c.n_kv_heads, c.head_dim) == (teacher.n_kv_heads, teacher.head_dim)
        assert c.n_layers >= MIN_KEPT["n_layers"] * teacher.n_layers
        if c.ffn_dim < teacher.ffn_dim:
            step = 64 if teacher is SMOL else 256
            assert c.replace(ffn_dim=c.ffn_dim + step).n_params > limit
    axes = [
        (*(getattr(s.config, n) != getattr(teacher, n) for n in AXIS_COSTS), s.config.vocab_size)
        for s in shapes
    ]
    assert len(set(axes)) == len(axes)


def test_memory_counts_the_cache_and_its_format_is_part_of_the_plan():
    budget = Budget("memory", 150e6, 8192)
    for shape in plan_shapes(SMOL, budget, [49_152, 24_576], 5):
        assert resident_nbytes(shape.config, FORMATS[shape.weights], shape.kv, 8192) <= 150e6
        assert shape.kv == "int8"  # a bf16 cache of the teacher alone is 189 MB
    whole = plan_shapes(SMOL, Budget("memory", 400e6, 8192), [49_152], 5)[0]
    assert whole.config == SMOL  # the unshrunk teacher is a candidate
    assert whole.label(SMOL) == "teacher"
    assert resident_nbytes(SMOL, FORMATS["bf16"], "bf16", 8192) == 2 * SMOL.n_params + 23_040 * 8192


def test_speed_asks_the_machine():
    class Machine:
        formats = GGUF_FORMATS

        def decode(self, config, weights, kv, context):
            return weights.nbytes(config) / 1e9

    for shape in plan_shapes(SMOL, Budget("speed", 15, 100), [49_152], 3, Machine()):  # type: ignore[arg-type]
        assert FORMATS[shape.weights].nbytes(shape.config) <= 1e9 / 15


def test_harm_grows_with_every_axis_and_is_zero_for_the_teacher():
    assert predicted_loss_increase(SMOL, SMOL) == 0
    for name, smaller in (("n_layers", 25), ("ffn_dim", 1024), ("vocab_size", 24_576)):
        assert predicted_loss_increase(SMOL, SMOL.replace(**{name: smaller})) > 0


def test_an_impossible_budget_is_refused():
    with pytest.raises(PlanError, match=r"the smallest has [\d,]+ of the [\d,]+ parameters.*shrink twice"):
        plan_shapes(SMOL, Budget("params", 20e6), [49_152], 3)
