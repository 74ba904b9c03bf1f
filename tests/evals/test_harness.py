"""The harness: no answer is lost or asked for twice, and a task that cannot run does not stop the others."""

import json
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.errors import DataError
from herd.evals import harness, results
from herd.evals.harness import evaluate, run_task
from herd.evals.results import ItemResult, TaskFile, digest, read_evaluation, read_items
from herd.evals.tasks import Answer, Data, Likelihood, Rank, make_task

TASKS = ("boolq", "gsm8k", "winogrande")


class Fake:
    """A model that answers by a hash of the request, notes the requests, and may kill its process."""

    name, hash, mode, precision = "fake", "0123456789abcdef", "base", "float32"

    def __init__(self, die_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.die_after = die_after

    def answer(self, requests):
        for number, request in enumerate(requests):
            if self.die_after is not None and len(self.asked) == self.die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            key = digest(request)
            self.asked.append(key)
            if isinstance(request, Rank):
                bits = int(key, 16)
                yield (
                    number,
                    Answer(
                        likelihoods=tuple(
                            Likelihood(-float(bits >> i & 7)) for i in range(len(request.pairs))
                        )
                    ),
                )
            else:
                yield number, Answer(f"#### {int(key, 16) % 100}", "stop")


def tasks():
    return [make_task(name) for name in TASKS]


def lines(folder: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted(folder.glob("*.jsonl"))}


def scores(evaluation) -> list[tuple]:
    return [(row.task, row.status, row.scores) for row in evaluation.tasks]


def test_a_second_call_asks_no_item_again(tmp_path):
    model = Fake()
    first = evaluate(model, tasks(), Data(), tmp_path)
    before = lines(tmp_path)
    assert len(model.asked) == 30
    second = evaluate(model, tasks(), Data(), tmp_path)
    assert len(model.asked) == 30
    assert scores(first) == scores(second)
    assert lines(tmp_path) == before
    assert [row.n_items for row in second.tasks] == [10, 10, 10]


def test_a_higher_limit_asks_only_what_is_new(tmp_path):
    model = Fake()
    part = evaluate(model, tasks(), Data(), tmp_path, limit=4)
    assert len(model.asked) == 12
    assert [(row.n_items, row.n_total) for row in part.tasks] == [(4, 10)] * 3
    evaluate(model, tasks(), Data(), tmp_path)
    assert len(set(model.asked)) == len(model.asked) == 30


def test_a_lower_limit_counts_only_its_own_items(tmp_path):
    model = Fake()
    evaluate(model, tasks(), Data(), tmp_path)
    few = evaluate(model, tasks(), Data(), tmp_path, limit=4)
    assert len(model.asked) == 30
    for row in few.tasks:
        values = [item.value for item in few.items(row)]
        assert len(values) == 4
        assert row.score.value == pytest.approx(sum(values) / 4)


@pytest.mark.parametrize("change", ["shots", "mode", "precision", "model", "version"])
def test_other_settings_are_written_to_another_file(tmp_path, monkeypatch, change):
    model, task = Fake(), make_task("boolq")
    evaluate(model, [task], Data(), tmp_path)
    if change == "shots":
        task = make_task("boolq", shots=1)
    elif change == "mode":
        task = make_task("boolq", mode="instruct")
    elif change == "version":
        monkeypatch.setattr(type(task), "version", "999")
    else:
        monkeypatch.setattr(
            model, {"precision": "precision", "model": "hash"}[change], "fedcba9876543210", raising=False
        )
    evaluate(model, [task], Data(), tmp_path)
    assert len(model.asked) == 20
    assert len(lines(tmp_path)) == 2


def test_results_with_the_long_name_of_a_dtype_are_not_asked_again(tmp_path):
    model, parts = Fake(), {"a": {"parent_precision": "bfloat16"}, "precision": "float32"}
    head = {"model": "m", **parts}
    old = tmp_path / f"boolq-{digest(head)[:8]}.jsonl"
    assert results.results_file(tmp_path, "boolq", head).name != old.name
    old.touch()
    short = {"model": "m", "a": {"parent_precision": "bf16"}, "precision": "fp32"}
    assert results.results_file(tmp_path, "boolq", short) == old
    evaluate(model, tasks(), Data(), tmp_path)
    summary = tmp_path / "summary.json"
    assert '"precision": "float32"' in summary.read_text()
    assert read_evaluation(tmp_path).summary["precision"] == "fp32"


def test_items_whose_data_changed_are_asked_again(tmp_path):
    (tmp_path / "data" / "boolq").mkdir(parents=True)
    rows = Data().rows("boolq/validation.jsonl")
    file = tmp_path / "data" / "boolq" / "validation.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, task, data = Fake(), make_task("boolq", shots=0), Data(tmp_path / "data")
    evaluate(model, [task], data, tmp_path / "out")
    rows[7]["question"] = "is this another question"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = evaluate(model, [task], data, tmp_path / "out").tasks[0]
    assert len(model.asked) == 11
    items = list(read_items(tmp_path / "out" / row.file))
    assert len(items) == len({item.id for item in items}) == 10


# Killed and resumed


def killed(folder: Path, die_after: int, tear: int = 0) -> None:
    """A child process evaluates and is killed with -9 after ``die_after`` answers, or in the middle of a
    line."""
    pid = os.fork()
    if pid == 0:
        try:
            if tear:
                write, writes = os.write, iter(range(10**9))

                def torn(file, data):
                    if data.startswith(b'{"id"') and next(writes) == tear:
                        write(file, data[: len(data) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                    return write(file, data)

                results.os.write = torn
            harness.BATCH = 3
            evaluate(Fake(die_after), tasks(), Data(), folder)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("tear", [0, 2, 7, 11])
def test_an_evaluation_killed_several_times_ends_with_the_same_scores(tmp_path, tear):
    whole = evaluate(Fake(), tasks(), Data(), tmp_path / "whole")
    for die_after in (10**6, 10**6) if tear else (1, 5, 2, 9, 4):
        killed(tmp_path / "torn", die_after, tear)
    resumed = evaluate(Fake(), tasks(), Data(), tmp_path / "torn")
    assert scores(resumed) == scores(whole)
    for name, found in lines(tmp_path / "torn").items():
        assert sorted(found[1:]) == sorted(lines(tmp_path / "whole")[name][1:])  # every item once


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_results_file_cut_anywhere_is_completed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    task = make_task("boolq")
    row = run_task(Fake(), task, Data(), folder)
    path = folder / row.file
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    again = run_task(Fake(), task, Data(), folder)
    assert again.scores == row.scores
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_second_process_on_the_same_file_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    with TaskFile(path, {"schema": 1}), pytest.raises(DataError, match="another herd eval is writing it"):
        TaskFile(path, {"schema": 1})
    TaskFile(path, {"schema": 1}).close()


def test_a_file_or_folder_without_results_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match="not a results file"):
        TaskFile(tmp_path / "x.jsonl", {"schema": 1})
    assert (tmp_path / "x.jsonl").read_text() == "hello\n"
    with pytest.raises(DataError, match="no evaluation here"):
        read_evaluation(tmp_path)


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_survives_the_results_file(tmp_path_factory, text, value):
    """Also line separators, NUL and what no encoding likes."""
    path = tmp_path_factory.mktemp("text") / "x.jsonl"
    result = ItemResult("a", value, text, None, text + "\ud800\u2028\x00\r\n", why=text)
    with TaskFile(path, {"schema": 1}) as file:
        file.add([result])
    assert list(read_items(path)) == [result]


# What cannot run


def test_a_task_that_cannot_run_does_not_stop_the_others(tmp_path):
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    (tmp_path / "data" / "piqa" / "validation.jsonl").write_bytes(
        (Data().folder / "piqa" / "validation.jsonl").read_bytes()
    )
    evaluation = evaluate(
        Fake(), [make_task("boolq"), make_task("piqa")], Data(tmp_path / "data"), tmp_path / "out"
    )
    missing, there = evaluation.tasks
    assert (missing.status, there.status) == ("failed", "done")
    assert "no boolq/validation.jsonl in" in missing.reason
    assert "\n" not in missing.reason
    assert missing.score is None
    assert there.score.n == 10


def test_summary_keeps_earlier_tasks(tmp_path):
    evaluate(Fake(), [make_task("boolq")], Data(), tmp_path)
    second = evaluate(Fake(), [make_task("piqa")], Data(), tmp_path)
    assert [row.task for row in second.tasks] == ["piqa"]
    assert [row.task for row in read_evaluation(tmp_path).tasks] == ["boolq", "piqa"]
    assert len(read_evaluation(tmp_path).items(second.tasks[0])) == 10
