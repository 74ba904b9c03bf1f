"""Tables of the report page: costs and gates with missing and zero values."""

from pathlib import Path

from herd.report.run import Gate, Run, Stage
from herd.report.tabulate import Cell, cost_table, gates_table


def run_of(*stages: Stage) -> Run:
    return Run(Path("run"), "run", {}, {}, {}, list(stages), [], [], [])


def texts(cells: list[Cell]) -> list[str]:
    return [cell.text.replace("\u00a0", " ") for cell in cells]


def test_a_cost_of_zero_is_printed_and_a_missing_one_is_a_dash():
    table = cost_table(run_of(Stage("tokenizer", "", seconds=0.0, tokens=0)))
    assert table is not None
    assert texts(table.rows[0][2]) == ["0.0 s", "–", "–", "0", "–", "–", "–", "–", "–"]


def test_the_total_ratio_counts_only_stages_with_both_times():
    both = Stage("teacher", "", seconds=30.0, predicted_seconds=20.0)
    table = cost_table(run_of(both, Stage("long", "", seconds=100.0), Stage("x", "", predicted_seconds=40.0)))
    assert table is not None
    assert texts(table.total)[:3] == ["2 min 10 s", "1 min 00 s", "1.50 ×"]


def test_the_total_peak_memory_is_the_largest_one():
    table = cost_table(run_of(Stage("a", "", peak_rss_bytes=3e9), Stage("b", "", peak_rss_bytes=2e9)))
    assert table is not None
    assert texts(table.total)[7] == "3.00 GB"


def gate_texts(value: object, bar: object, unit: str) -> list[str]:
    table = gates_table(run_of(Stage("instruct", "", gates=[Gate("gate", True, value, bar, unit)])))
    assert table is not None
    return texts(table.rows[0][2])[1:4]


def test_a_missing_value_or_bar_of_a_gate_is_a_dash():
    assert gate_texts(0.5, 0.25, "fraction") == ["50.0", "25.0", "%"]
    assert gate_texts(0.5, None, "fraction") == ["50.0", "–", "%"]
    assert gate_texts(None, 0.25, "fraction") == ["–", "25.0", "%"]
    assert gate_texts(None, "≥ 0.25", "fraction") == ["–", "≥ 0.25", ""]
    assert gate_texts(0.5, "≥ 0.25", "fraction") == ["0.500", "≥ 0.25", ""]
    assert gate_texts(0.0, None, "nats") == ["0.000", "–", "nats"]
