"""The verbs of `herd eval` on small checkpoints: what they measure, write and print, and how they refuse
mistakes."""

import json

import pytest
import torch

from herd import checkpoint
from herd.checkpoint import Lineage
from herd.cli import run as herd
from herd.evals.results import read_evaluation
from herd.evals.tasks import Data, make_task

TASKS = "piqa,gsm8k"


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model, tokenizer):
    """A parent and a child with other weights. The child's context is too short for many shots."""
    root = tmp_path_factory.mktemp("models")
    for seed, name, context in ((1, "elder", 2048), (2, "younger", 1024)):
        model = make_model(seed, max_context=context)
        checkpoint.save_model(root / name, model, tokenizer, lineage=Lineage(name=name, stage="lm"))
    return root


@pytest.fixture(scope="module")
def results(models):
    """Evaluate both models. One of the child's tasks cannot run."""
    for name, status in (("elder", 0), ("younger", 1)):
        args = ["--tasks", TASKS, "--limit", "4", "--out", str(models / "out" / name)]
        assert herd(["eval", str(models / name), *args]) == status
    return models / "out"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # results go to runs/evals unless told otherwise


def said(capsys, *args: str, status: int = 0) -> str:
    """What a command prints. Errors go to stderr."""
    capsys.readouterr()
    assert herd(["eval", *args]) == status
    out, err = capsys.readouterr()
    return err if status and not out else out


def test_results_are_printed_and_unknown_tasks_named(models, tmp_path, capsys):
    ask = (str(models / "elder"), "--tasks", "boolq,piqa,bolq", "--out", str(tmp_path), "--limit", "2")
    text = said(capsys, *ask, status=1)
    assert "unknown task 'bolq': did you mean boolq" in text
    assert "not run" in text
    assert "too few for a score" in text
    record = json.loads(said(capsys, *ask, "--json", status=1))
    assert [row["status"] for row in record["tasks"]] == ["done", "done", "failed"]
    assert record["tasks"][0]["scores"][0]["n"] == 2


def test_suites_and_licences_are_listed(capsys):
    text = said(capsys, "list")
    assert "llama31: boolq, gsm8k, hellaswag, human_eval, mmlu_humanities" in text
    assert "CC BY-SA 3.0" in text


def test_compare_writes_four_files_and_the_differences(results, tmp_path, capsys):
    folders = [str(results / name) for name in ("elder", "younger")]
    text = said(capsys, "compare", *folders, "--out", str(tmp_path))
    assert "not run" in text
    assert "- gsm8k, 8-shot, younger: a prompt has" in text
    assert "Llama 3.1 405B" in text
    kinds = ("html", "json", "csv", "md")
    assert {path.name for path in tmp_path.iterdir()} == {f"compare.{kind}" for kind in kinds}
    record = json.loads(said(capsys, "compare", *folders, "--out", str(tmp_path), "--json"))
    assert record["models"] == ["elder", "younger"]
    assert [row["metric"] for row in record["rows"]] == ["acc_norm", "exact_match"]
    assert [row["metric"] for row in record["further"]] == ["acc", "flexible_match"]
    assert [d["task"] for d in record["differences"]] == ["piqa, 5-shot"]


def test_own_questions_are_asked_compared_and_searched_for(models, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(
        '{"question": "One and one is", "choices": ["two", "three"], "answer": "two"}\n'
        '{"question": "def double(x):", "tests": "assert double(2) == 4", "max_tokens": 8}\n'
        '{"question": "Say a number", "schema": {"type": "integer"}, "constrained": true, "max_tokens": 8}\n'
    )
    text = said(capsys, str(models / "elder"), "mine.jsonl", "--out", "elder", "--mode", "base")
    assert "mine.jsonl" in text
    assert "built-in" not in text
    said(capsys, str(models / "younger"), "--tasks", "mine.jsonl", "--out", "younger", "--mode", "base")
    record = json.loads(said(capsys, "compare", "elder", "younger", "--json"))
    assert [(row["task"], row["metric"]) for row in record["rows"]] == [("mine.jsonl", "acc")]
    said(capsys, "contamination", "elder", "--corpus", "builtin")
    (tmp_path / "mine.jsonl").write_text('{"question": 1}\n')
    text = said(capsys, str(models / "elder"), "mine.jsonl", "--out", "elder", "--mode", "base", status=1)
    assert "mine.jsonl:1: question: Input should be a valid string" in text


@pytest.mark.parametrize(
    "args, words",
    [
        (["compare", "nowhere"], "nowhere: no evaluation here (no summary.json); make one with: herd eval"),
        (["contamination", "nowhere", "--corpus", "builtin"], "no evaluation here"),
        (["nowhere"], "name what to evaluate: --suite llama31, base, instruct"),
        (["nowhere", "--tasks", "piqa"], "nowhere: no such file, folder or model name"),
        (["fidelity", "nowhere", "--parent", "nowhere"], "nowhere: no such file, folder or model name"),
        (["nowhere", "--suite", "fidelity"], "--suite fidelity needs --parent"),
        (["nowhere", "--tasks", ""], "--tasks '' names no task"),
        (["nowhere", "--tasks", " , "], "--tasks ' , ' names no task"),
        (["nowhere", "nowhere.jsonl"], "nowhere.jsonl: no such file; give a file of questions, or --tasks"),
        (["nowhere", "--mode", "chat"], "--mode chat is unknown: use base or instruct"),
        (["nowhere", "--tasks", "piqa", "--suite", "llama31"], "give one of the two"),
        (["nowhere", "--suite", "llama3"], "did you mean llama31"),
        (["nowhere", "--data", "/nowhere"], "no such folder"),
        (["nowhere", "--tasks", "piqa", "--model", "x"], "--model names the model of an endpoint"),
        (["http://127.0.0.1:9", "--tasks", "piqa", "--model", "x"], "127.0.0.1:9/v1: no answer"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, capsys, args, words):
    text = said(capsys, *args, status=1)
    assert words in text
    assert text.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option",
    ["--shots=-1", "--shots=x", "--limit=0", "--limit=-3", "--batch=0", "--threads=0", "--dtype=fp8",
     "--dtype=int4", "--device=nowhere"],
)  # fmt: skip
def test_an_impossible_option_is_refused_with_its_name(capsys, option):
    name = option.partition("=")[0]
    assert f"Error: Invalid value for '{name}'" in said(capsys, "nowhere", option, status=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("verb", [["nowhere"], ["fidelity", "nowhere", "--parent", "nowhere"]])
def test_a_gpu_that_is_not_there_is_refused(capsys, verb):
    text = said(capsys, *verb, "--device", "cuda", status=2)
    assert "Error: Invalid value for '--device': 'cuda' cannot be used here" in text
    assert "Traceback" not in text


def test_compare_refuses_the_same_folder_twice(results, capsys):
    folder = str(results / "elder")
    assert "give each folder once" in said(capsys, "compare", folder, folder, status=1)


def test_fidelity_is_measured_kept_and_exact_for_a_model_itself(models, tmp_path, capsys):
    args = ("fidelity", str(models / "younger"), "--parent", str(models / "elder"), "--limit", "3", "--json")
    row = json.loads(said(capsys, *args))
    kl, top1, overlap = row["scores"]
    assert (kl["name"], top1["name"], overlap["name"]) == ("kl", "top1", "overlap")
    assert kl["value"] > 0 < overlap["value"] < 1
    assert row["n_items"] == 3
    assert json.loads(said(capsys, *args))["scores"] == row["scores"]
    [file] = tmp_path.glob("runs/evals/younger-*/fidelity-*.jsonl")
    assert len(file.read_text().splitlines()) == 1 + 3
    itself = json.loads(said(capsys, *args[:3], str(models / "younger"), *args[4:]))["scores"]
    assert [score["value"] for score in itself] == pytest.approx([0, 1, 1], abs=1e-6)


def test_fidelity_counts_flips_where_both_were_evaluated(models, capsys):
    ask = ("fidelity", str(models / "younger"), "--parent", str(models / "elder"), "--limit", "2")
    assert "To count flipped items, evaluate both models: herd eval" in said(capsys, *ask)
    for name in ("elder", "younger"):
        said(capsys, str(models / name), "--tasks", "piqa", "--shots", "0")
    assert json.loads(said(capsys, *ask, "--json"))["flips"][0].keys() == {"task", "won", "lost", "n"}
    assert "items flipped" in said(capsys, *ask)


def test_fidelity_as_a_suite_is_compared_with_the_others(models, results, tmp_path, capsys):
    out = str(tmp_path / "out")
    ask = (str(models / "younger"), "--suite", "fidelity", "--parent", str(models / "elder"), "--limit", "2")
    assert "younger was compared with elder on 2 texts" in said(capsys, *ask, "--out", out)
    record = json.loads(said(capsys, "compare", str(results / "elder"), out, "--out", out, "--json"))
    kl = next(row for row in record["rows"] if row["task"] == "fidelity")
    assert kl["scores"]["elder"] is None
    assert {row["metric"] for row in record["further"] if row["task"] == "fidelity"} == {"top1", "overlap"}


def test_contamination_finds_the_overlap_and_adds_it_to_the_score(results, tmp_path, capsys):
    item = make_task("gsm8k", 0).items(Data())[1]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Nothing here.\n\n" + item.request.prompt + "\n")
    ask = ("contamination", str(results / "elder"), "--corpus")
    record = json.loads(said(capsys, *ask, str(corpus), "--json"))
    assert (record["gsm8k"]["n_hit"], record["gsm8k"]["n_clean"]) == (1, 3)
    assert record["piqa"]["n_hit"] == 0
    assert read_evaluation(results / "elder").tasks[1].scores[0]["detail"]["contamination"] == record["gsm8k"]
    assert "25.0 %" in said(capsys, *ask, str(corpus))
    text = said(capsys, *ask, "x", "--data", str(tmp_path), status=1)
    assert "was measured on builtin: give the same --data" in text
