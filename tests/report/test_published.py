"""Published scores: the file against the primary source, and its own sense."""

import csv
import subprocess
import sys

import pytest

from herd.errors import ReportError
from herd.report.published import find_published, published, published_score

COLUMNS = {
    "gpt-4o_2024-05-13_first_run": ("GPT-4o", "instruct", "azure-leak"),
    "gpt-4o_rerun": ("GPT-4o", "instruct", "azure"),
    "meta-llama-3_1-405b-instruct": ("Llama 3.1 405B", "instruct", "azure"),
    "meta-llama-3_1-70b-instruct": ("Llama 3.1 70B", "instruct", "azure"),
    "meta-llama-3-70b-instruct": ("Llama 3 70B", "instruct", "azure"),
    "meta-llama-3-70b": ("Llama 3 70B", "base", "azure"),
    "meta-llama-3_1-8b-instruct": ("Llama 3.1 8B", "instruct", "azure"),
    "meta-llama-3-8b-instruct": ("Llama 3 8B", "instruct", "azure"),
    "meta-llama-3-8b": ("Llama 3 8B", "base", "azure"),
}


def test_azure_columns_are_the_published_ones(real_data):
    path = real_data("azure_results") / "azure_evaluation_results.csv"
    rows = list(csv.DictReader(path.open()))
    seen = 0
    for row in rows:
        task = row["task"].replace("human_eval", "humaneval")
        for column, (model, kind, source) in COLUMNS.items():
            (found,) = find_published(task=task, model=model, kind=kind, source=source)
            assert found.score == pytest.approx(100 * float(row[column]), abs=0.0051), (task, column)
            assert found.shots == row["n_shot"]
            seen += 1
    assert seen == len(find_published(source="azure")) + len(find_published(source="azure-leak")) == 117


def test_card_and_paper_agree_where_they_should():
    """Table 2 repeats the card's instruct scores. Only GPQA is known to differ."""
    differing = [
        (row.task, row.model)
        for row in find_published(source="paper-t2")
        for other in find_published(task=row.task, model=row.model, kind="instruct", source="card")
        if other.score != row.score
    ]
    assert {task for task, _ in differing} == {"gpqa"}


def test_every_published_score_is_a_percentage_and_is_unique():
    keys = [(row.task, row.model, row.kind, row.source.name) for row in published()]
    assert len(keys) == len(set(keys)) > 400
    assert all(0 < row.score <= 100 for row in published())
    assert {row.source.name for row in published()} == {
        "card",
        "paper",
        "paper-t2",
        "paper-t20",
        "azure",
        "azure-leak",
    }


def test_a_star_marks_another_setting():
    (starred,) = find_published(task="gsm8k", model="Claude 3.5 Sonnet", source="paper-t2")
    assert starred.starred
    assert starred.setting == "8-shot, chain of thought, exact match (another setting)"


def test_unknown_names_offer_the_nearest():
    assert published_score("mmlu", "Llama 3.1 405B", kind="instruct", source="card") == 87.3
    with pytest.raises(ReportError, match=r"'humanevil'.*humaneval"):
        published_score("humanevil", "GPT-4o", kind="instruct", source="azure")
    with pytest.raises(ReportError, match="card has no score of Llama 3 8B"):
        published_score("gpqa", "Llama 3 8B", kind="instruct", source="card")


def test_published_scores_load_without_torch():
    code = "import sys, herd.report.published as p; p.published(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
