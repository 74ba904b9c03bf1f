"""Synthesis with a teacher that plants wrong answers: what is removed, what is kept, resuming, budgets."""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest

from herd.cli import run
from herd.data.near_duplicates import NearDuplicates
from herd.data.read_dialogs import read_dialogs
from herd.data.sources import Document
from herd.distill.synth import SeedPrompt, prompts_from_documents, read_prompts, synthesize
from herd.distill.teachers import SynthOptions, open_teacher
from herd.distill.verify import verify
from herd.errors import ContextError, DataError, EngineError, StorageError
from herd.tools import Sandbox

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer", "minimum": 0}},
    "required": ["city", "people"],
}


def question(kind: str, rng: Random) -> tuple[SeedPrompt, str, str]:
    """A prompt of a kind with a right and a wrong answer, in some of the ways in which models write them."""
    a, b = rng.randrange(10, 999), rng.randrange(10, 999)
    off = rng.choice([-100, -10, -1, 1, 10, 100])
    if kind == "execution":
        name = f"f{a}_{b}"
        text = f"Write {name}(x) that returns {a} * x + {b}."
        tests = f"assert {name}(0) == {b}\nassert {name}(3) == {3 * a + b}"
        body = "def {}(x):\n    return {} * x + {}"
        right = f"Here it is:\n```python\n{body.format(name, a, b)}\n```\nIt is linear."
        wrong = rng.choice([
            f"```python\n{body.format(name, a, b + off)}\n```", f"```python\n{body.format(name + 'x', a, b)}\n```",
            f"```python\ndef {name}(x):\n    return {a} * x + {b}\n    ]\n```", "I cannot do that.",
            f"```python\nimport sys\ndef {name}(x): sys.exit(0)\n```",
        ])  # fmt: skip
        return SeedPrompt(f"p{a}-{b}", [{"role": "user", "content": text}], {"tests": tests}), right, wrong
    if kind == "solver":
        text, value = f"What is {a} + {b}?", a + b
        forms = ("The answer is {}.", "{} and {} make this:\n{}".replace("{} and {}", f"{a} and {b}"), "{}")
        form = rng.choice(forms)
        prompt = SeedPrompt(f"s{a}-{b}", [{"role": "user", "content": text}], {"expression": f"{a} + {b}"})
        return prompt, form.format(value), form.format(value + off)
    if kind == "schema":
        right = json.dumps({"city": f"C{a}", "people": b})
        wrong = rng.choice([
            json.dumps({"city": f"C{a}"}), json.dumps({"city": a, "people": b}), right[:-1],
            json.dumps({"city": f"C{a}", "people": -b}), f"The city is C{a}.",
        ])  # fmt: skip
        content = f"Describe city C{a} with {b} people as JSON."
        return (
            SeedPrompt(f"j{a}-{b}", [{"role": "user", "content": content}], {"schema": SCHEMA}),
            right,
            wrong,
        )
    text = f"Tom has {a} apples and buys {b} boxes of 3. How many has he?"
    value = a + 3 * b
    form = rng.choice(("Let me count. So the answer is {}.", "He has {} apples.", "{}"))
    wrong = form.format(
        "{}"
    )  # a teacher that makes the same mistake every time cannot be caught by agreement
    return SeedPrompt(f"a{a}-{b}", [{"role": "user", "content": text}], {}), form.format(value), wrong


class Planted:
    """A teacher that answers wrongly with a probability, and remembers which of its answers are wrong."""

    name, hash = "planted", "0" * 64

    def __init__(self, answers: dict[str, tuple[str, str]], share: float, seed: int) -> None:
        self._known, self._share, self._rng = answers, share, Random(seed)
        self.asked: list[tuple[str, bool]] = []  # (answer, whether it is right), in order
        self.fail_after: int | None = None

    def answers(self, prompts, options):
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        told = []
        for messages in prompts:
            right, wrong = self._known[messages[0]["content"]]
            some = []
            for _ in range(options.samples):
                good = self._rng.random() >= self._share
                told_wrong = wrong.replace("{}", str(self._rng.randrange(1000, 5000)))
                self.asked.append((right if good else told_wrong, good))
                some.append((self.asked[-1][0], 10))
            told.append(some)
        return told

    def most_tokens(self, messages, options):
        return 25 * options.samples


def planted(kind: str, n: int, share: float, seed: int = 0):
    rng = Random(f"{kind} {seed}")
    made = {
        prompt.where: (prompt, right, wrong)
        for prompt, right, wrong in (question(kind, rng) for _ in range(n))
    }
    prompts = [prompt for prompt, _, _ in made.values()]
    known = {prompt.messages[0]["content"]: (right, wrong) for prompt, right, wrong in made.values()}
    return prompts, Planted(known, share, seed)


@pytest.mark.parametrize(("kind", "samples", "n"), [
    ("execution", 1, 120), ("solver", 1, 600), ("schema", 1, 600), ("agreement", 5, 300),
])  # fmt: skip
def test_planted_wrong_answers_are_removed_and_right_ones_kept(tmp_path, kind, samples, n):
    prompts, teacher = planted(kind, n, share=0.3)
    options = SynthOptions(samples=samples, similarity=1.0)
    synthesize(prompts, teacher, tmp_path, options)
    judged = [
        a
        for line in (tmp_path / "journal.jsonl").read_text().splitlines()
        for a in json.loads(line)["answers"]
    ]
    assert [text for text, *_ in judged] == [text for text, _ in teacher.asked]
    pairs = [(accepted, good) for (_, accepted, _, _), (_, good) in zip(judged, teacher.asked, strict=True)]
    wrong, right = ([accepted for accepted, good in pairs if good is kind_] for kind_ in (False, True))
    assert len(wrong) > 20
    assert sum(wrong) / len(wrong) <= 0.01
    assert 1 - sum(right) / len(right) <= 0.03


def test_shards_are_dialogs_with_their_provenance(tmp_path):
    prompts, teacher = planted("solver", 30, share=0.0)
    prompts[0] = replace(prompts[0], where="caf\udce9.jsonl:1")  # a file whose name is not UTF-8
    found = synthesize(prompts, teacher, tmp_path, SynthOptions(similarity=1.0))
    assert found.finished
    dialogs = list(read_dialogs(found.shards[0]))
    assert len(dialogs) == found.n_lines == len(prompts)
    line = json.loads(found.shards[0].read_text().splitlines()[0])
    assert line["provenance"]["verified"] == "solver"
    assert line["provenance"]["prompt"] == prompts[0].where
    assert line["provenance"]["teacher_hash"] == teacher.hash
    assert line["messages"][0] == prompts[0].messages[0]


def test_an_interrupted_run_continues_and_asks_nothing_twice(tmp_path):
    prompts, teacher = planted("solver", 100, share=0.2)
    whole = synthesize(prompts, teacher, tmp_path / "whole", SynthOptions())
    prompts, teacher = planted("solver", 100, share=0.2)
    teacher.fail_after = 64
    with pytest.raises(KeyboardInterrupt):
        synthesize(prompts, teacher, tmp_path / "parts", SynthOptions())
    journal = tmp_path / "parts" / "journal.jsonl"
    with journal.open("a") as file:
        file.write('{"prompt": 64, "tok')  # what a kill leaves behind
    teacher.fail_after = None
    parts = synthesize(prompts, teacher, tmp_path / "parts", SynthOptions())
    assert len(teacher.asked) == len(prompts)
    assert [p.read_bytes() for p in parts.shards] == [p.read_bytes() for p in whole.shards]


def test_a_budget_stops_and_a_larger_one_continues(tmp_path):
    prompts, teacher = planted("solver", 200, share=0.0)
    with pytest.raises(DataError, match="may take 25 tokens, more than the budget"):
        synthesize(prompts, teacher, tmp_path, SynthOptions(budget_tokens=24))
    found = synthesize(prompts, teacher, tmp_path, SynthOptions(budget_tokens=500))
    assert not found.finished
    assert 475 < found.tokens <= 500  # it takes 10 for a prompt, and might take 25
    by_price = SynthOptions(budget_usd=0.001, usd_per_mtok=1.0)
    assert 975 < synthesize(prompts, teacher, tmp_path, by_price).tokens <= 1000
    done = synthesize(prompts, teacher, tmp_path, SynthOptions(budget_tokens=10**6))
    assert done.finished
    assert len(teacher.asked) == len(prompts)


def test_other_prompts_or_options_are_refused(tmp_path):
    prompts, teacher = planted("solver", 10, share=0.0)
    synthesize(prompts, teacher, tmp_path, SynthOptions())
    with pytest.raises(DataError, match=r"temperature=0\.7, not 0\.1"):
        synthesize(prompts, teacher, tmp_path, SynthOptions(temperature=0.1))
    with pytest.raises(DataError, match="prompts"):
        synthesize(prompts[1:], teacher, tmp_path, SynthOptions())


def test_other_options_are_free_while_nothing_was_answered(tmp_path):
    prompts, teacher = planted("solver", 10, share=0.0)
    teacher.fail_after = 0
    with pytest.raises(KeyboardInterrupt):
        synthesize(prompts, teacher, tmp_path, SynthOptions())
    teacher.fail_after = None
    assert synthesize(prompts, teacher, tmp_path, SynthOptions(temperature=0.1)).finished


def test_near_duplicates_are_found_and_others_are_not():
    rng = Random(0)
    words = [f"w{n}" for n in range(2000)]
    seen = NearDuplicates()
    texts = [rng.choices(words, k=60) for _ in range(200)]
    assert not any(seen.add(" ".join(text)) for text in texts)
    close = [
        [*text[:58], "changed", "end"] for text in texts
    ]  # 54 of 58 shingles are common: similarity 0.93
    assert sum(seen.add(" ".join(text)) for text in close) >= 195
    far = [text[:30] + rng.choices(words, k=30) for text in texts]  # about 0.3
    assert sum(seen.add(" ".join(text)) for text in far) == 0


def test_passages_become_questions_with_the_passage_as_the_answer(tmp_path):
    text = "The moon circles the earth in a month. " * 60

    class Asker:
        name, hash = "asker", "1"

        def answers(self, prompts, options):
            return [
                [("What circles the earth?" if n % 2 else "Here are questions:\n1. a?", 9)]
                for n, _ in enumerate(prompts)
            ]

    prompts = prompts_from_documents([Document(text, "moon.txt")])
    found = synthesize(prompts, Asker(), tmp_path, SynthOptions(similarity=1.0))
    assert found.rejected["back-translation"] == 1
    (dialog,) = read_dialogs(found.shards[0])
    assert dialog.messages[0]["content"] == "What circles the earth?"
    assert text.startswith(dialog.messages[1]["content"][:20]) or dialog.messages[1]["content"] in text


def test_an_answer_with_any_line_end_is_kept_and_a_failing_teacher_loses_no_finished_prompt(tmp_path):
    """U+2028 and U+0085 end lines for `str.splitlines`, and not in JSON lines."""
    prompts = [
        SeedPrompt(f"p{n}", [{"role": "user", "content": f"{n}?"}], {"answer": str(n)}) for n in range(9)
    ]
    asked: list[str] = []

    class Teacher:
        name, hash = "teacher", "1"

        def answers(self, prompts, options):
            for messages in prompts:
                if len(asked) == 4:
                    raise EngineError("the server has gone")
                asked.append(messages[0]["content"])
                yield [(f"It is \u2028 \x85 {asked[-1][:-1]}", 10)]

    with pytest.raises(EngineError, match="has gone"):
        synthesize(prompts, Teacher(), tmp_path, SynthOptions(similarity=1.0))
    asked.append("")
    found = synthesize(prompts, Teacher(), tmp_path, SynthOptions(similarity=1.0))
    assert found.finished
    assert found.n_lines == 9
    assert len(asked) == 10
    assert len(list(read_dialogs(found.shards[0]))) == 9


def test_a_refused_prompt_is_left_out_and_the_others_are_answered(tmp_path, capsys):
    prompts, teacher = planted("solver", 10, share=0.0)

    class Short:
        name, hash = "short", "1"
        refuse = (3,)

        def answers(self, asked, options):
            told = teacher.answers(asked, options)
            return [ContextError("too long") if n in self.refuse else each for n, each in enumerate(told)]

    found = synthesize(prompts, Short(), tmp_path / "one", SynthOptions(similarity=1.0))
    assert found.finished
    assert found.n_lines == 9
    assert found.refused == [f"{prompts[3].where}: too long"]
    every = Short()
    every.refuse = tuple(range(10))
    with pytest.raises(DataError, match="too long"):
        synthesize(prompts, every, tmp_path / "all", SynthOptions(similarity=1.0))


def test_a_full_disk_is_named_with_the_journal(tmp_path, monkeypatch):
    prompts, teacher = planted("solver", 3, share=0.0)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Teacher:
        name, hash = "teacher", "1"

        def answers(self, asked, options):
            monkeypatch.setattr(os, "fsync", full)
            return teacher.answers(asked, options)

    with pytest.raises(StorageError, match=r"journal\.jsonl: cannot be written \(No space.* continues"):
        synthesize(prompts, Teacher(), tmp_path, SynthOptions())


def test_the_work_of_others_is_not_replaced(tmp_path):
    prompts, teacher = planted("solver", 3, share=0.0)
    (tmp_path / "a" / "shards").mkdir(parents=True)
    with pytest.raises(StorageError, match="is there already"):
        synthesize(prompts, teacher, tmp_path / "a", SynthOptions())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "options.json").write_text('{"model": "smollm2"}')
    with pytest.raises(DataError, match="is not from herd synth"):
        synthesize(prompts, teacher, tmp_path / "b", SynthOptions())


class Stub(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply({"data": [{"id": "stub"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        numbers = [int(word) for word in body["messages"][0]["content"].split() if word.isdigit()]
        choice = {"message": {"content": f"It is {sum(numbers)}."}, "finish_reason": "stop"}
        self.reply({"choices": [choice], "usage": {"total_tokens": 12}})


def test_what_a_prompt_may_take_at_most_is_known_before_it_is_sent(real_data):
    messages = [{"role": "user", "content": "Name a city. ウィーン " * 20}]
    options = SynthOptions(samples=3, max_tokens=4, temperature=1.0)
    local = open_teacher(str(real_data("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    ((taken,),) = ([sum(n for _, n in answers)] for answers in local.answers([messages], options))
    most = local.most_tokens(messages, options)
    assert taken <= most <= taken + 3 * 4
    assert local.most_tokens([{"role": "user", "content": "a " * 9000}], options) == 0  # refused: too long
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = open_teacher(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert most <= endpoint.most_tokens(messages, options)


def test_the_verb_asks_an_endpoint_and_says_what_it_did(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Add {n} and {2 * n}", "expression": f"{n} + {2 * n}"} for n in range(5, 15)]
    rows.append({"prompt": "Add 1 and 1", "answer": "3"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        words = ["synth", str(file), "--teacher", url, "--out", str(tmp_path / "out"), "--similarity", "1"]
        assert run(words) == 0
        said, shown = capsys.readouterr()
        server.shutdown()
    assert "11 of 11 prompts" in shown
    assert "11 of 11 prompts answered, 132 tokens" in said
    assert "solver: 10 answers accepted, 1 rejected" in said
    assert Path(tmp_path / "out" / "shards" / "00000.jsonl").exists()


class Liar(Stub):
    """A server that answers in the way that the first part of its path names."""

    def do_POST(self):
        way = self.path.split("/")[1]
        self.rfile.read(int(self.headers["Content-Length"]))
        content = {"int": 4, "parts": [{"type": "text", "text": "4"}], "half": "It is 4. \ud800"}.get(
            way, "It is 4."
        )
        usage = {"nousage": None, "negative": {"total_tokens": -9}, "list": [1]}.get(
            way, {"total_tokens": 12}
        )
        self.reply({"choices": [{"message": {"content": content}}], "usage": usage})


@pytest.mark.parametrize(("way", "code", "said"), [
    ("honest", 0, "12 tokens"), ("list", 0, "0 tokens"), ("half", 0, "1 answers accepted"),
    ("int", 1, "an answer without text"), ("parts", 1, "an answer without text"),
    ("nousage", 1, "does not count tokens"), ("negative", 1, "does not count tokens"),
])  # fmt: skip
def test_what_a_lying_server_says_is_one_line(tmp_path, capsys, way, code, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "What is 2 + 2?", "answer": 4}) + "\n")
    budget = ["--budget-tokens", "5000"] if way in ("nousage", "negative") else []
    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{way}"
        words = [
            "synth",
            str(file),
            "--teacher",
            url,
            "--model",
            "m",
            "--out",
            str(tmp_path / "out"),
            *budget,
        ]
        assert run(words) == code
        shown = capsys.readouterr()
        assert said in shown.out + shown.err
        if code == 0:
            assert run([*words, "--json"]) == 0
            record = json.loads(capsys.readouterr().out)
            assert record["accepted"] == {"solver": 1}
            assert record["finished"]
        server.shutdown()


@pytest.mark.parametrize(("row", "said"), [
    ({"prompt": "a", "schema": {"type": "nonsense"}}, "prompts.jsonl:1: schema"), ({"question": "a"}, "no prompt"),
    ({"prompt": "a", "expression": "1 +* 2"}, "prompts.jsonl:1: expression"), ({"prompt": "a", "tests": 5}, "asserts"),
    ({"prompt": "\ud800"}, "surrogate"), ({"messages": ["a"]}, "role and content"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "ends with an answer"),
])  # fmt: skip
def test_a_bad_prompt_is_refused_before_anything_is_asked(tmp_path, row, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=said):
        read_prompts(file)


def test_an_answer_of_zero_and_a_list_of_tests_verify(tmp_path):
    """Zero is an answer. A list of asserts would run as a list of texts, which every program passes."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "1 - 1?", "answer": 0}, {"prompt": "Write f.", "tests": ["assert f(1) == 2"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    zero, program = (prompt.check for prompt in read_prompts(file))
    with Sandbox() as sandbox:
        said = ["It is 0.", "It is 7."]
        assert [each.accepted for each in verify(zero, said, sandbox, 0.4)] == [True, False]
        said = ["def f(x): return x + 1", "def f(x): return x"]
        assert [each.accepted for each in verify(program, said, sandbox, 0.4)] == [True, False]


def test_one_sample_of_unverified_answers_is_refused(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert run(["synth", str(tmp_path / "prompts.jsonl"), "--samples", "1"]) == 1
    assert "give at least --samples 3" in capsys.readouterr().err


def test_the_verb_needs_prompts_or_documents(capsys):
    assert run(["synth"]) == 1
    assert "either a file of prompts or --documents" in capsys.readouterr().err
