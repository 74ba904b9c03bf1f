"""Intervals against theory: coverage, the normal limit, Wilson's published table."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.errors import DataError
from herd.evals.bootstrap import mean_interval, paired_difference, ratio_interval, wilson
from herd.evals.score import Score, share, shares_by


def test_mean_interval_is_near_the_normal_one():
    x = np.random.default_rng(0).normal(3, 2, 4000)
    value, lo, hi = mean_interval(x)
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert value == pytest.approx(x.mean())
    assert (value - lo, hi - value) == pytest.approx((half, half), rel=0.1)


def test_95_percent_intervals_cover_the_true_mean():
    """Of 95 % intervals about 95 % hold the truth."""
    rng = np.random.default_rng(1)
    held = 0
    for i in range(300):
        interval = mean_interval(rng.exponential(1.0, 60), seed=i, draws=500)
        held += interval.lo <= 1.0 <= interval.hi
    assert 0.88 <= held / 300 <= 0.98


@pytest.mark.parametrize("n", [12, 30])
def test_coverage_of_few_documents_of_unequal_length(n):
    """The hard case: a few long documents decide the ratio."""
    rng = np.random.default_rng(5)
    held = 0
    for i in range(400):
        lengths = np.exp(rng.normal(6, 0.8, n))
        interval = ratio_interval(rng.normal(0.05, 0.1, n) * lengths, lengths, seed=i, draws=500)
        held += interval.lo <= 0.05 <= interval.hi
    assert 0.92 <= held / 400 <= 0.98


def test_unequal_items_give_wider_intervals_than_equal_ones():
    each = np.random.default_rng(6).normal(0, 1, 30)
    long = np.array([50.0, 50.0, *[1.0] * 28])
    equal, unequal = mean_interval(each), ratio_interval(each * long, long)
    assert unequal.hi - unequal.lo > 1.5 * (equal.hi - equal.lo)


def test_one_item_with_all_the_weight_has_no_interval():
    assert math.isnan(ratio_interval([1.0, 2.0, 0.0], [0.0, 4.0, 0.0]).lo)


def test_equal_items_have_an_interval_of_no_width():
    assert ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 2.0, 2.0)


def test_ratio_weighs_items():
    assert ratio_interval([1, 9], [1, 3]).value == 2.5


def test_pairing_removes_what_items_share():
    """Hard and easy items differ by far more than the models do. The pairing still finds the difference."""
    rng = np.random.default_rng(2)
    hardness = rng.normal(0, 10, 200)
    a, b = hardness + rng.normal(0.3, 0.5, 200), hardness + rng.normal(0, 0.5, 200)
    paired = paired_difference(a, b)
    assert paired.value == pytest.approx((a - b).mean())
    assert paired.lo > 0 or paired.hi < 0
    assert mean_interval(a).lo < mean_interval(b).hi
    assert paired_difference(a, a).lo <= 0 <= paired_difference(a, a).hi


def test_weighted_difference_is_the_difference_of_ratios():
    a, b, w = [3.0, 5.0, 2.0], [1.0, 4.0, 2.5], [2, 7, 3]
    want = sum(a) / sum(w) - sum(b) / sum(w)
    assert paired_difference(a, b, w).value == pytest.approx(want)


def test_the_same_seed_gives_the_same_interval():
    x = np.random.default_rng(3).random(50)
    assert mean_interval(x, seed=1) == mean_interval(x, seed=1) != mean_interval(x, seed=2)


def test_memory_is_bounded_but_results_are_not_affected(monkeypatch):
    from herd.evals import bootstrap

    x = np.random.default_rng(4).random(100)
    want = mean_interval(x)
    monkeypatch.setattr(bootstrap, "_CHUNK", 700)
    assert mean_interval(x) == pytest.approx(want)


def test_one_item_has_no_spread():
    interval = mean_interval([2.0])
    assert interval.value == 2
    assert math.isnan(interval.lo)
    assert math.isnan(interval.hi)


@pytest.mark.parametrize(
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction)
    ("hits", "n", "lo", "hi"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_the_published_table(hits, n, lo, hi):
    got = wilson(hits, n)
    assert (got.lo, got.hi) == pytest.approx((lo, hi), abs=5e-5)


@given(st.integers(1, 10_000), st.data())
def test_wilson_holds_its_share(n, data):
    hits = data.draw(st.integers(0, n))
    got = wilson(hits, n)
    assert 0 <= got.lo <= got.value <= got.hi <= 1


@pytest.mark.parametrize(
    "call", [lambda: mean_interval([]), lambda: mean_interval([math.nan]), lambda: wilson(0, 0)]
)
def test_an_empty_list_is_refused(call):
    with pytest.raises(DataError):
        call()


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(DataError, match="same items"):
        paired_difference([1, 2], [1])


def test_a_score_is_recorded_as_plain_data():
    hits = [True, True, False, True]
    score = share("tool_use", hits, {"by_lang": shares_by(["en", "de", "en", "en"], hits)})
    record = score.record("student")
    assert record["model"] == "student"
    assert (record["value"], record["n"], record["unit"]) == (0.75, 4, "fraction")
    assert record["detail"]["by_lang"]["de"] == {"value": 1.0, "n": 1, "lo": wilson(1, 1).lo, "hi": 1.0}
    assert str(score).startswith("tool_use 75.0 % [")
    assert str(Score("bpb", 1.23456, "bits/byte")) == "bpb 1.235 bits/byte"
