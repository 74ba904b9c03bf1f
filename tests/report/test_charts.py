"""Charts: valid XML, every label inside, ticks round and in range, labels apart, and numbers in words."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from herd import units
from herd.report import charts, languages, svg
from herd.report.charts import ChartRow, Line

finite = st.floats(-1e6, 1e6, allow_nan=False)
positive = st.floats(1e-3, 1e12)


@example(low=-879609.9999999999, span=1e-06, count=6)  # steps near the numbers' own precision
@given(finite, st.floats(1e-6, 1e6), st.integers(1, 10))
def test_linear_ticks_are_inside_even_and_round(low, span, count):
    high = low + span
    ticks = svg.linear_ticks(low, high, count)
    assert 0 <= len(ticks) <= count + 1
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert any(math.isclose(mantissa, good, rel_tol=1e-3) for good in (1, 2, 2.5, 5, 10))
        shown = [units.fixed(tick, svg.decimals_for(ticks)) for tick in ticks]
        assert len(set(shown)) == len(shown), "two ticks read the same"


@given(positive, st.floats(1.0, 1e9))
def test_log_ticks_are_inside(low, factor):
    assert all(low * 0.99 <= tick <= low * factor * 1.01 for tick in svg.log_ticks(low, low * factor))


@given(st.lists(st.floats(0, 300), max_size=12))
def test_spread_keeps_order_and_distance(positions):
    placed = svg.spread(positions, 16, 0, 300)
    order = sorted(range(len(positions)), key=lambda i: (positions[i], placed[i]))
    gaps = [placed[b] - placed[a] for a, b in pairwise(order)]
    assert all(gap >= 16 - 1e-6 for gap in gaps)
    if len(positions) <= 12:
        assert all(-1e-6 <= place <= 300 + 1e-6 for place in placed)


@given(
    st.lists(st.tuples(positive, finite), min_size=1, max_size=60, unique_by=lambda p: p[0]), st.booleans()
)
def test_a_line_chart_is_valid_and_stays_in_its_frame(points, x_log):
    drawn = charts.line_chart(
        [Line("a <b>", sorted(points), "teacher", dots=True)],
        label="Loss",
        x_title="tokens",
        y_title="nats",
        x_log=x_log,
    )
    root = ElementTree.fromstring(drawn)
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    for circle in root.iter("circle"):
        assert -0.1 <= float(circle.attrib["cx"]) <= width + 0.1
        assert -0.1 <= float(circle.attrib["cy"]) <= height + 0.1
    assert root.attrib["aria-label"].startswith("Loss: a <b> ends at ")


def test_nothing_to_draw_draws_nothing():
    for lines in ([], [Line("a", [(0, 1.0)], "long")]):
        assert charts.line_chart(lines, label="", x_title="", y_title="", x_log=True) == ""
    assert charts.interval_chart([ChartRow("a", None, None, None, "long", "–")], label="", title="") == ""
    assert charts.divided_bar([("measured", [("a", 0.0, "none")])], label="", show=str) == ""


def test_every_chart_is_xml_with_words_for_those_who_cannot_see_it():
    rows = [
        ChartRow("teacher", 1.41, 1.40, 1.42, "teacher", "1.41"),
        ChartRow("long", None, None, None, "long", "not measured"),
    ]
    cells, titles = {("256", "50"): 0.8}, {"x_title": "length", "y_title": "depth"}
    bars = [("measured", [("a", 1.0, "teacher"), ("b", 2.0, "none")])]
    drawn = {
        "one: teacher 1.41; long not measured": charts.interval_chart(
            rows, label="one", title="bits per byte"
        ),
        "two: 256 at 50: 80 %": charts.heat_map(cells, ["256", "512"], ["50"], label="two", **titles),
        "three: measured: a 1, b 2": charts.divided_bar(bars, label="three", show="{:g}".format),
    }
    for said, chart in drawn.items():
        root = ElementTree.fromstring(chart)
        assert root.attrib["aria-label"] == said
        assert root.attrib["role"] == "img"


@given(st.lists(st.tuples(finite, finite), max_size=3000))
def test_thinning_keeps_ends_and_mean(points):
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MAX_POINTS
    if points:
        assert min(y for _, y in points) - 1e-6 <= min(y for _, y in thinned)
        assert max(y for _, y in thinned) <= max(y for _, y in points) + 1e-6


@pytest.mark.parametrize(
    "shown, text",
    [
        (units.fixed(-0.0004, 3), "0.000"),
        (units.fixed(-1234.5, 1), "−1,234.5"),
        (units.short(0.012345), "0.0123"),
        (units.short(1234.5), "1,234"),
        (units.short(0), "0"),
        (units.si(405_853_388_800), "406 B"),
        (units.si(999_600, digits=3), "1.00 M"),
        (units.si(999), "999"),
        (units.si(3.1e14, "FLOP"), "310 TFLOP"),
        (units.nbytes(811_706_777_600), "812 GB"),
        (units.nbytes(512), "512 B"),
        (units.duration(0.0123), "12 ms"),
        (units.duration(0.44), "0.4 s"),
        (units.duration(9.97), "10.0 s"),
        (units.duration(59.6), "1 min 00 s"),
        (units.duration(372), "6 min 12 s"),
        (units.duration(3725), "1 h 02 min"),
        (units.duration(3599.7), "1 h 00 min"),
        (units.duration(47 * 3600), "47 h 00 min"),
        (units.duration(50 * 3600), "2.1 days"),
        (units.duration(1e9), "32 years"),
        (units.short(9.996), "10.0"),
        (units.format_value(0.8701, "fraction"), "87.0"),
        (units.format_value(1.41234, "bits/byte", 3), "1.412"),
        (languages.language("ja"), "Japanese"),
        (languages.language("code"), "code"),
    ],
)
def test_numbers_are_formatted_for_readers(shown, text):
    assert shown == text
