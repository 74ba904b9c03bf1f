"""Comparisons: differences item by item, Holm's procedure, flips, published scores apart, and every
format."""

import csv
import io
import json
import math
import re

import pytest

from herd.errors import DataError
from herd.evals.bootstrap import Interval
from herd.evals.compare import Difference, compare, holm, p_value
from herd.evals.compare_page import (
    as_csv,
    as_markdown,
    colours,
    comparison_page,
    group_rows,
    write_comparison,
)
from herd.evals.results import ItemResult, TaskFile, TaskResult, read_evaluation, write_summary
from herd.evals.tasks.task import by_group, mean
from herd.evals.verdicts import CLAIMS, judge_claims


def evaluation(folder, model, tasks, hash_=None):
    """A folder as `herd eval` leaves it. ``tasks``: name to item values, or to why it did not run."""
    rows = []
    for name, values in tasks.items():
        if isinstance(values, str):
            rows.append(TaskResult(name, "failed", settings={"shots": 0, "mode": "base"}, reason=values))
            continue
        items = [
            ItemResult(
                str(i), float(v), "gold", "x", f"said <b>{v}</b>", ("en", "de")[i % 2], why="no" * (not v)
            )
            for i, v in enumerate(values)
        ]
        with TaskFile(folder / f"{name}.jsonl", {"schema": 1}) as file:
            file.add(items)
        detail = {"by_group": by_group([i.group for i in items], [i.value for i in items])}
        score = mean("acc", [i.value for i in items], detail).record()
        told = {"settings": {"shots": 5, "mode": "base"}, "scores": [score], "ids": [i.id for i in items]}
        n = {"n_items": len(items), "n_total": len(items)}
        rows.append(TaskResult(name, "done", file=f"{name}.jsonl", **told, **n))
    write_summary(folder, model, hash_ or f"{model}-hash", rows, mode="base", data="builtin", limit=None)
    return read_evaluation(folder)


@pytest.fixture
def three(tmp_path):
    good, bad = [1] * 90 + [0] * 10, [1] * 40 + [0] * 60
    return compare(
        [
            evaluation(tmp_path / "a", "teacher", {"boolq": good, "piqa": good}),
            evaluation(tmp_path / "b", "student", {"boolq": bad, "piqa": [*good[:-1], 1]}),
            evaluation(tmp_path / "c", "control", {"boolq": bad, "piqa": "no piqa/validation.jsonl"}),
        ]
    )


def test_differences_on_the_same_items(three):
    found = {(d.task, d.first, d.second): d for d in three.differences}
    assert len(found) == 3 + 1
    student = found["boolq, 5-shot", "student", "teacher"]
    assert student.interval.value == pytest.approx(-0.5)
    assert (student.gained, student.lost, student.n) == (0, 50, 100)
    assert student.stands
    assert student.better == "teacher"
    assert student.by_group["en"].value == pytest.approx(-0.5)
    assert not found["piqa, 5-shot", "student", "teacher"].stands
    assert found["boolq, 5-shot", "control", "student"].interval == Interval(0.0, 0.0, 0.0)


def test_flips_are_the_items_on_which_models_disagree(three):
    assert three.n_flips == {"boolq, 5-shot": 50, "piqa, 5-shot": 1, "piqa": 0}
    flip = next(f for f in three.flips if f.task == "piqa, 5-shot")
    assert flip.id == "99"
    assert {model: answer[0] for model, answer in flip.answers.items()} == {"teacher": 0.0, "student": 1.0}


def test_holm_stops_at_the_first_difference_that_fails():
    def some(p):
        return Difference("t", "a", "b", Interval(1, 0.5, 1.5), 10, "fraction", p=p)

    stands = [d.stands for d in holm([some(p) for p in (0.04, 0.001, 0.0126, 0.9)])]
    assert stands == [False, True, True, False]  # 0.001 ≤ .05/4, 0.0126 ≤ .05/3, 0.04 > .05/2
    assert [d.stands for d in holm([some(0.02), some(0.03)])] == [True, True]
    assert [d.stands for d in holm([some(0.03), some(0.04)])] == [False, False]


def test_the_p_value_of_an_interval():
    assert p_value(Interval(1.96, 0.0, 3.92)) == pytest.approx(0.05, abs=1e-3)
    assert p_value(Interval(0.0, -1, 1)) == 1
    assert p_value(Interval(0.5, math.nan, math.nan)) == 0  # one item: a difference, but nothing about spread


def test_the_page_shows_everything_and_escapes_it(three):
    text = comparison_page(three)
    assert "<b>1</b>" not in text
    assert "no piqa/validation.jsonl" in text
    assert "Holm" in text
    assert "published, under other settings" in text
    assert "Llama 3.1 405B" in text
    assert not re.search(r"(src|href)=\"https?:", text)
    for tag in ("table", "section", "details", "div", "svg"):
        assert text.count(f"<{tag}") == text.count(f"</{tag}>"), tag


def test_groups_have_their_paired_differences(three):
    row = next(row for row in three.rows if row.task == "boolq")
    [(name, cells), (other, _)] = group_rows(three, row)
    assert (name, other) == ("English", "German")
    assert [cell.text for cell in cells] == ["90.0", "40.0", "40.0"]
    assert "Δ" not in cells[0].sub
    assert "Δ −50.0 (−" in cells[1].sub


def test_every_format_is_written_with_the_same_numbers(three, tmp_path):
    paths = write_comparison(three, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in paths.values()}
    record = json.loads(paths["json"].read_text())
    assert record["models"] == ["teacher", "student", "control"]
    lines = list(csv.DictReader(io.StringIO(as_csv(three))))
    scores = {(line["task"], line["model"], line["group"]): float(line["value"]) for line in lines}
    assert scores["boolq", "student", ""] == 0.4
    assert scores["boolq", "teacher", "de"] == 0.9
    text = as_markdown(three)
    assert "| boolq, 5-shot | acc | % | 90.0 [82.6 – 94.5] | 40.0" in text
    assert "**−50.0** [" in text


def test_one_model_alone_and_two_of_the_same_name_are_compared(tmp_path):
    first = evaluation(tmp_path / "a", "m", {"boolq": [1, 0]}, "aaaaaaaa")
    alone = compare([first])
    assert "needs two models" in comparison_page(alone)
    twins = compare([first, evaluation(tmp_path / "b", "m", {"boolq": [1, 1]}, "bbbbbbbb")])
    assert twins.models == ["a", "b"]
    with pytest.raises(DataError, match="twice"):
        compare([first, first])
    with pytest.raises(DataError, match="nothing to compare"):
        compare([])


def test_colours_are_each_models_own():
    found = colours(["instruct", "instruct-q8", "instruct-q4", "teacher", "student", "control"])
    assert len(set(found.values())) == 6
    assert found["instruct"] == "instruct"


def test_claims_are_counted_on_published_scores():
    by_claim = {v.claim.said: v for v in judge_claims({})}
    assert len(by_claim) == len(CLAIMS)
    leak = by_claim["Llama 3.1 405B beats GPT-4o"]
    assert len(leak.wins) + len(leak.losses) + len(leak.ties) == 13
    assert "gsm8k" in [*leak.wins]
    assert leak.verdict == "mostly within the noise"
    assert by_claim["Llama 3.1 8B is far ahead of Llama 3 8B"].losses == []
