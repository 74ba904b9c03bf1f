"""The harness: no answer is lost or asked for twice, and a task that cannot run does not stop the others."""

from __future__ import annotations

import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.cli import run as herd
from herd.errors import DataError, EngineError
from herd.evals import endpoint, harness, results
from herd.evals.harness import evaluate, run_task
from herd.evals.local import CheckpointModel
from herd.evals.results import ItemResult, TaskFile, digest, read_evaluation, read_items
from herd.evals.tasks import Answer, Data, Generate, Likelihood, Rank, Read, make_task
from herd.text import ToolCall, parse

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


# A checkpoint


@pytest.fixture(scope="module")
def local(make_model, tokenizer):
    model = make_model(3, max_context=2048)
    return CheckpointModel(model, tokenizer, name="small", hash="ab" * 32, max_batch=4)


@given(
    st.lists(
        st.sampled_from(["a", "!", "\n", "\n\n", " ", "\t", "Brown fox", "7", "\r\n", "é", "'s", "。"])
    ).map("".join)
)
def test_encoding_by_paragraphs_gives_the_ids_of_the_whole_text(local, tokenizer, text):
    assert local.encode(text) == tokenizer.encode(text)


def test_pairs_are_cut_as_lm_eval_does(local, tokenizer):
    pair = local.pair("The quick ", "brown")
    whole = tokenizer.encode("The quick brown", bos=True)
    assert [*pair.context, *pair.continuation] == whole
    assert pair.context == tokenizer.encode("The quick", bos=True)
    assert local.pair("", "brown").context == [tokenizer.bos_id]


def test_a_checkpoint_answers_all_three_kinds(local):
    asked = [
        Generate("The dog", max_tokens=4),
        Rank((("The dog", " sleeps"), ("The dog", " jumps on"))),
        Read("The lazy dog."),
        Generate(({"role": "user", "content": "Hello"},), max_tokens=3),
    ]
    answers = dict(local.answer(asked))
    assert sorted(answers) == [0, 1, 2, 3]
    assert answers[0].finish_reason in ("stop", "length")
    assert all(x.nats < 0 and x.n_tokens > 0 for x in answers[1].likelihoods)
    [text] = answers[2].likelihoods
    [parts] = dict(local.answer([Rank((("", "The lazy dog."),))]))[0].likelihoods
    assert text.nats == pytest.approx(parts.nats, abs=1e-3)


def test_a_checkpoint_runs_tasks_of_several_kinds(local, tmp_path):
    rows = evaluate(
        local,
        [make_task(name, shots=0) for name in ("piqa", "winogrande", "gsm8k")],
        Data(),
        tmp_path,
        limit=3,
    ).tasks
    assert [row.status for row in rows] == ["done"] * 3
    assert [row.score.n for row in rows] == [3] * 3


@pytest.mark.parametrize(
    ("name", "shots", "cure"), [("boolq", 0, ""), ("gsm8k", 8, " or fewer than 8 shots"), ("gsm8k", 0, "")]
)
def test_a_context_too_short_names_the_cure(make_model, tokenizer, tmp_path, name, shots, cure):
    model = CheckpointModel(make_model(3), tokenizer, name="short", hash="cd" * 32)
    row = run_task(model, make_task(name, shots=shots), Data(), tmp_path)
    assert row.status == "failed"
    assert row.reason.endswith("the context has 64: use a model with a longer context" + cure)


# An endpoint


class Stub(BaseHTTPRequestHandler):
    """As much of an OpenAI server as is asked. Words are tokens. ``server.seen`` keeps the bodies."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        if self.server.failures:
            code = self.server.failures.pop()
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"busy")
            return
        if self.path.endswith("/chat/completions"):
            call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
            message = {"content": "The answer is B.", "tool_calls": [call] if "tools" in body else None}
            self.reply({"choices": [{"message": message, "finish_reason": "stop"}]})
        elif body.get("echo") and self.server.logprobs:
            text = body["prompt"]
            offsets = [0, *(i for i, c in enumerate(text) if c == " "), len(text)]
            nats = [None, *(-float(len(text) - at) for at in offsets[1:])]
            tops = [None, *({"x": value} for value in nats[1:])]
            logprobs = {"text_offset": offsets, "token_logprobs": nats, "top_logprobs": tops}
            self.reply({"choices": [{"text": text, "logprobs": logprobs}]})
        else:
            self.reply({"choices": [{"text": " 18\n#### 18 Question: more", "finish_reason": "length"}]})

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS_S", (0.0, 0.0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as httpd:
        httpd.models, httpd.seen, httpd.logprobs, httpd.failures = ["stub"], [], True, []
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        yield httpd
        httpd.shutdown()


def test_an_endpoint_answers_all_kinds_of_requests(server, monkeypatch):
    monkeypatch.setenv("HERD_API_KEY", "secret")
    model = endpoint.EndpointModel(server.url)
    assert model.name == "stub"
    tool = {"name": "f", "parameters": {}}
    asked = [
        Rank((("one two", " three four"), ("one two", " three"))),
        Generate("Question: 9 + 9?", stop=("Question:",)),
        Generate(({"role": "user", "content": "hi"},)),
        Generate(({"role": "user", "content": "hi"},), tools=(tool,)),
    ]
    answers = dict(model.answer(asked))
    assert [x.nats for x in answers[0].likelihoods] == [-11 - 5, -6]
    assert [x.n_tokens for x in answers[0].likelihoods] == [2, 1]
    assert all(x.greedy for x in answers[0].likelihoods)
    assert answers[1] == Answer(" 18\n#### 18 ", "length")
    assert answers[2].text == "The answer is B."
    assert parse(answers[3].text).calls == [ToolCall("f", {"a": 1}, "json")]
    assert {key for _, _, key in server.seen} == {"Bearer secret"}
    assert all(body["model"] == "stub" and body["temperature"] == 0 for _, body, _ in server.seen)


def test_an_endpoint_without_logprobs_fails_only_those_tasks(server, tmp_path):
    server.logprobs = False
    model = endpoint.EndpointModel(server.url, mode="base")
    rows = evaluate(model, [make_task("boolq"), make_task("gsm8k")], Data(), tmp_path).tasks
    assert [row.status for row in rows] == ["failed", "done"]
    assert "gives no logprobs of the prompt" in rows[0].reason
    assert "--mode instruct" in rows[0].reason
    assert sum(body.get("echo", False) for _, body, _ in server.seen) == 1  # it was not asked in vain again
    assert rows[1].score.n == 10


def test_a_busy_endpoint_is_asked_again_and_a_broken_one_given_up(server):
    model = endpoint.EndpointModel(server.url)
    asked = [Generate("hello")]
    server.failures = [503, 429]
    assert dict(model.answer(asked))
    server.failures = [503] * 9
    with pytest.raises(EngineError, match="503"):
        dict(model.answer(asked))
    server.failures = [400]
    with pytest.raises(EngineError, match=r"400 .*: busy"):
        dict(model.answer(asked))


def test_the_model_of_an_endpoint_is_found_or_must_be_named(server):
    server.models = ["a", "b"]
    with pytest.raises(EngineError, match="serves a, b; name one with --model"):
        endpoint.EndpointModel(server.url)
    assert endpoint.EndpointModel(server.url, "b").name == "b"
    with pytest.raises(EngineError, match="is the server running"):
        endpoint.EndpointModel("http://127.0.0.1:9")


# The command


def test_herd_eval_prints_results_and_names_unknown_tasks(server, tmp_path, capsys):
    args = ["eval", server.url, "--tasks", "boolq,gsm8k,bolq", "--out", str(tmp_path), "--limit", "2"]
    assert herd(args) == 1
    said = capsys.readouterr()
    assert "unknown task 'bolq': did you mean boolq" in said.out
    assert "not run" in said.out
    assert "too few for a score" in said.out
    assert herd([*args, "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in record["tasks"]] == ["done", "done", "failed"]
    assert record["tasks"][0]["scores"][0]["n"] == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--mode", "chat"], "--mode chat is unknown"),
        (["--suite", "leek"], "did you mean leak"),
        (["--suite", "leak", "--tasks", "boolq"], "give one of the two"),
        (["--data", "/nowhere"], "no such folder"),
    ],
)
def test_wrong_options_are_refused_in_one_line(server, tmp_path, capsys, args, said):
    assert herd(["eval", server.url, "--out", str(tmp_path / "out"), *args]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_herd_eval_list_prints_suites_and_licences(capsys):
    assert herd(["eval", "list"]) == 0
    said = capsys.readouterr().out
    assert "leak: boolq, gsm8k, hellaswag, human_eval, mmlu_humanities" in said
    assert "CC BY-SA 3.0" in said
