"""The learning rate: the paper's numbers, then properties."""

import math
from itertools import pairwise

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from herd.train import Constant


def test_the_405b_schedule_has_the_published_rates():
    """8,000 warm-up steps to 8e-5, cosine to 8e-7 over 1.2 M steps (section 3.4.1)."""
    config = toy.flat(
        steps=1_200_000, batch_size=2048, context=8192, lr=8e-5, warmup_steps=8000, min_lr_ratio=0.01
    )
    assert config.learning_rate(0) == pytest.approx(1e-8)
    assert config.learning_rate(3999) == pytest.approx(4e-5)
    assert config.learning_rate(7999) == config.learning_rate(8000) == 8e-5
    assert config.learning_rate(604_000) == pytest.approx((8e-5 + 8e-7) / 2)
    assert config.learning_rate(1_199_999) == pytest.approx(8e-7, rel=1e-6)


@st.composite
def configs(draw):
    steps = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, steps))
    decay = draw(st.integers(0, steps - warmup))
    schedule = {"warmup_steps": warmup, "decay_steps": decay, "min_lr_ratio": draw(st.floats(0, 1))}
    every = draw(st.integers(0, decay)) if decay else 0
    return toy.flat(steps=steps, batch_size=1, context=1, lr=1.0, average_every=every, **schedule)


@given(configs())
def test_rates_rise_in_the_warm_up_and_fall_to_zero(config):
    rates = [config.learning_rate(step) for step in range(config.steps)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    warm = config.schedule.warmup_steps
    assert rates[:warm] == sorted(rates[:warm])
    tail = rates[warm:]
    assert all(a >= b - 1e-12 for a, b in pairwise(tail))
    if config.schedule.decay_steps:  # straight: the steps down are equal, and the next would be zero
        steps_down = [a - b for a, b in pairwise([*rates[-config.schedule.decay_steps :], 0.0])]
        if config.schedule.decay_steps > 1:
            assert max(steps_down) - min(steps_down) < 1e-9
        assert math.isclose(
            rates[-1], rates[-config.schedule.decay_steps] / config.schedule.decay_steps, abs_tol=1e-12
        )


@given(configs())
def test_only_weights_of_the_decay_are_averaged(config):
    taken = [step for step in range(1, config.steps + 1) if config.schedule.averages_at(step, config.steps)]
    if not config.schedule.average_every:
        assert taken == []
        return
    assert taken[-1] == config.steps
    assert taken[0] > config.steps - config.schedule.decay_steps
    assert len(taken) == math.ceil(config.schedule.decay_steps / config.schedule.average_every)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decay_steps": 11}, "decay_steps=11 exceed steps=10"),
        ({"warmup_steps": 6, "decay_steps": 5}, "warmup_steps=6"),
        ({"average_every": 2}, "average_every needs decay_steps"),
        ({"average_every": 5, "decay_steps": 2}, "average_every=5 exceeds decay_steps=2"),
        ({"micro_batch_size": 3}, "micro_batch_size=3 does not divide batch_size=8"),
        ({"betas": (0.9, 1.0)}, "second of betas"),
        ({"lr": 0.0}, "greater than 0"),
        ({"lr": float("inf")}, "finite"),
        ({"steps": True}, "valid integer"),
        ({"clip": -1.0}, "greater than 0"),
        ({"learning_rate": 1.0}, "Extra inputs"),
        ({"dtype": "float16"}, "fp32"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        toy.flat(**({"steps": 10, "batch_size": 8, "context": 4, "lr": 1e-3} | changes))


def test_rows_are_divided_over_ranks_or_refused():
    config = toy.flat(steps=1, batch_size=12, micro_batch_size=3, context=4, lr=1e-3)
    assert [config.rows_of_rank(world) for world in (1, 2, 4)] == [12, 6, 3]
    with pytest.raises(ValueError, match="batch_size=12 is not a multiple of the 5 ranks"):
        config.rows_of_rank(5)
    with pytest.raises(ValueError, match="micro_batch_size=3 does not divide the 2 rows of a rank"):
        config.rows_of_rank(6)


def test_a_constant_schedule_stays_at_the_peak_until_the_decay():
    schedule = Constant(warmup_steps=2, decay_steps=4)
    rates = [schedule.rate(step, 10, 1.0) for step in range(10)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
