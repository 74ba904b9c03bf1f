"""Benchmarks as tasks: every item parses, gold answers score 100 %, wrong ones 0 %."""

import json
import os
import socket
import textwrap
from dataclasses import replace
from pathlib import Path

import hostile
import pytest
from gold import gold_answer, judged

from herd.errors import DataError
from herd.evals.tasks import (
    SUITES,
    TASKS,
    Answer,
    Data,
    Generate,
    Item,
    Likelihood,
    Rank,
    make_task,
    programs,
    suite_entries,
)
from herd.evals.tasks.choice import LETTERS
from herd.evals.tasks.word_problems import last_number, plain_number

OF_SUITES = sorted({entry.task for name in ("llama31", "base", "instruct") for entry in SUITES[name]})
N_REAL = {
    "boolq": 3270, "gsm8k": 1319, "hellaswag": 10042, "human_eval": 164, "mmlu_humanities": 4705, "mmlu_other": 3107,
    "mmlu_social_sciences": 3077, "mmlu_stem": 3153, "openbookqa": 500, "piqa": 1838, "social_iqa": 1954,
    "truthfulqa_mc1": 817, "winogrande": 1267, "arc_challenge": 1172, "mbpp": 500, "mgsm": 2750,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["base", "instruct"])
@pytest.mark.parametrize("name", OF_SUITES)
def test_built_in_items(name, mode):
    task = make_task(name, mode=mode)
    items = task.items(Data())
    assert len(items) >= 10
    assert_judged(task, items)


def assert_judged(task, items):
    """Gold answers are right, and wrong ones are wrong."""
    assert [j.value for j in judged(task, items, right=True)] == [1] * len(items)
    assert [j.value for j in judged(task, items, right=False)] == [0] * len(items)


VENDORED = Data(Path(__file__).parent / "data")
OF_VENDORED = (
    "bfcl", "gsm8k", "hellaswag", "human_eval", "ifeval", "mbpp", "mgsm", "mmlu_astronomy", "openbookqa",
    "truthfulqa_mc1", "winogrande",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["base", "instruct"])
@pytest.mark.parametrize("name", OF_VENDORED)
def test_the_first_real_items_are_read_and_judged(name, mode):
    """Items of the real data sets that are part of the repository."""
    task = make_task(name, mode=mode)
    items = task.items(VENDORED)
    assert len(items) == 10
    assert_judged(task, items)


@pytest.mark.parametrize("name", sorted(N_REAL))
def test_real_items(real_data, name):
    """All parse. A sample of programs really runs (all of them: bench/eval_gold.py)."""
    task = make_task(name, mode="instruct")
    items = task.items(Data(real_data("README.md").parent))
    assert len(items) == len({item.id for item in items}) == N_REAL[name]
    assert_judged(task, items[::30] if name in ("human_eval", "mbpp") else items)


@pytest.mark.parametrize("name", OF_SUITES)
def test_no_item_is_its_own_example(name):
    """The question asked does not stand among the shots with its answer."""
    for item in make_task(name).items(Data()):
        if isinstance(item.request, Rank):
            context, continuation = item.request.pairs[item.gold]
            assert context + continuation not in context
        elif isinstance(item.request.prompt, str):
            last = item.request.prompt.rpartition("\n\n")[2]
            assert item.request.prompt.count(last) == 1 or name == "human_eval"


def test_shots_share_one_head():
    items = make_task("boolq", shots=3).items(Data())
    heads = {item.request.pairs[0][0].rpartition("\n\n")[0] for item in items[4:]}
    assert len(heads) == 1
    assert heads.pop().count("Question:") == 3


def test_too_few_examples_are_told():
    assert make_task("openbookqa", shots=10).note(Data()) == "9 shots: the data has no more"
    assert make_task("openbookqa", shots=9).note(Data()) == ""


def test_answers_by_likelihood_and_per_character():
    task = make_task("hellaswag")
    item = replace(task.items(Data())[0], gold=1, doc={"choices": ["ab", "abcdefgh", "c", "d"]})
    answer = Answer(likelihoods=tuple(Likelihood(x) for x in (-4.0, -8.0, -9.0, -9.0)))
    judged = task.judge(item, answer)
    assert (judged.value, dict(judged.metrics)) == (1.0, {"acc": 0.0})  # -1 a character against -2
    ties = Answer(likelihoods=(Likelihood(-2.0),) * 4)
    assert make_task("boolq").judge(replace(item, gold=0), ties).value == 1  # the first of equals


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is $1,234.00.", "1234"),
        ("-7 then 12", "12"),
        ("no", None),
        ("3.50", "3.50"),
        ("5 - 3 = 2", "2"),
        ("٣", None),
    ],
)
def test_numbers(text, number):
    assert last_number(text) == number


def test_number_forms():
    assert [plain_number(x) for x in ("1,000", "$5.", "4.00", "4.05", "-3")] == "1000 5 4 4.05 -3".split()


def test_collected_answers_get_the_right_judgement():
    """Answers from outside of the project, where they are at hand."""
    file = Path(os.environ.get("HERD_TEST_CASES", "../shared/cases")) / "judges.jsonl"
    if not file.exists():
        pytest.skip(f"needs {file}: set HERD_TEST_CASES")
    languages = {"Die": "de", "La respuesta": "es", "La réponse": "fr", "答": "ja", "คำตอบ": "th"}
    for case in map(json.loads, file.read_text().splitlines()):
        answer = Answer(case.get("output", ""))
        if "letter" in case:
            item = Item("1", Generate(""), case["letter"], doc={"choices": case["choices"]})
            assert make_task("boolq", mode="instruct").judge(item, answer).extracted == case["letter"], case
        elif "gold" in case:
            language = next(
                (code for begin, code in languages.items() if answer.text.startswith(begin)), "en"
            )
            task = make_task(case["judge"].split()[0], mode="instruct")
            judged = task.judge(Item("1", Generate(""), case["gold"], language), answer)
            assert judged.value == case["right"], (case, judged)


def test_gsm8k_base_wants_the_mark_and_instruct_the_final_answer():
    for mode, text in (("base", "so 18\n#### 18"), ("instruct", "3 + 15.\nThe final answer is $18.")):
        task = make_task("gsm8k", mode=mode)
        item = replace(task.items(Data())[0], gold="18")
        assert task.judge(item, Answer(text)).value == 1
        assert task.judge(item, Answer("18 it is")).value == (mode == "instruct")
        assert task.judge(item, Answer("18 it is")).metrics["flexible_match"] == 1


VARIANTS = {
    "python3": lambda code: f"```python3\n{code}```",
    "in a list": lambda code: "1. So:\n\n" + textwrap.indent(f"```python\n{code}```", "   "),
    "helper first": lambda code: f"```python\ndef helper():\n    return 1\n```\nThen:\n```python\n{code}```",
    "draft first": lambda code: (
        f"```python\n{code.split(chr(10) + '    ')[0]}\n    return None\n```\nNo:\n```python\n{code}```"
    ),
    "future": lambda code: f"```python\nfrom __future__ import annotations\n{code}```",
    "main": lambda code: f'```python\n{code}\nif __name__ == "__main__":\n    input()\n```',
    "no fence": lambda code: f"Here's the function:\n\n{code}\n\nIt isn't hard.",
    "unclosed": lambda code: f"```python\n{code}",
    "only the body": lambda code: "```python\n" + code.rpartition('"""\n')[2] + "```",
    "only the body, dedented": lambda code: (
        "```python\n" + textwrap.dedent(code.rpartition('"""\n')[2]) + "```"
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_right_function_passes_however_it_is_presented(variant):
    task = make_task("human_eval", mode="instruct")
    items = task.items(Data())
    answers = [(item, Answer(VARIANTS[variant](item.doc["solution"]))) for item in items]
    assert [judged.why for judged in task.judge_all(answers)] == [""] * len(items)


def test_true_answers_do_not_always_stand_under_a():
    golds = {item.gold for item in make_task("truthfulqa_mc1", mode="instruct").items(Data())}
    assert len(golds) > 1
    assert all(len(gold) == 1 and gold in LETTERS for gold in golds)


def test_mmlu_takes_subjects_in_turn_with_their_own_examples(real_data):
    items = make_task("mmlu_stem", shots=2).items(Data(real_data("mmlu").parent))
    assert len({item.group for item in items[:19]}) == 19
    for item in items[:50]:
        title = f"The following are multiple choice questions (with answers) about {item.group.replace('_', ' ')}."
        assert item.request.pairs[0][0].startswith(title)


# What is wrong says so


def test_unknown_names_give_the_nearest():
    with pytest.raises(DataError, match="unknown task 'hellaswg': did you mean hellaswag"):
        make_task("hellaswg")
    with pytest.raises(DataError, match="unknown suite 'llama3': did you mean llama31"):
        suite_entries("llama3")


@pytest.mark.parametrize("name", OF_SUITES)
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(DataError, match=r"put it there, or leave out --data"):
        make_task(name).items(Data(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no items"),
        ("[1]\n", "not a JSON object|no field"),
        ("{\n", "line 1: not a JSON object"),
        ("{}\n", "no field"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, said):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "validation.jsonl").write_text(content)
    with pytest.raises(DataError, match=said):
        make_task("boolq").items(Data(tmp_path))


def test_packed_files_are_read(tmp_path):
    import gzip

    (tmp_path / "boolq").mkdir()
    original = (Data().folder / "boolq" / "validation.jsonl").read_bytes()
    (tmp_path / "boolq" / "validation.jsonl.gz").write_bytes(gzip.compress(original))
    assert make_task("boolq").items(Data(tmp_path)) == make_task("boolq").items(Data())
    (tmp_path / "boolq" / "validation.jsonl.gz").write_bytes(gzip.compress(original)[:100])
    with pytest.raises(DataError, match="cannot be read"):
        make_task("boolq").items(Data(tmp_path))


def test_every_task_says_where_it_comes_from():
    for name in TASKS:
        task = make_task(name)
        assert task.name == name
        assert task.version
        assert task.source
        assert task.licence
        assert task.shots_from


# Programs nobody has read


@pytest.mark.parametrize("mode", ["base", "instruct"])
@pytest.mark.parametrize("name", ["human_eval", "mbpp"])
def test_hostile_programs_are_contained_and_fail(tmp_path, monkeypatch, name, mode):
    monkeypatch.setattr(programs, "TIMEOUT_S", 1.0)
    target, victim = tmp_path / "made", tmp_path / "kept"
    victim.write_text("here")
    task = make_task(name, mode=mode)
    [item, *_] = task.items(Data())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        answers = hostile.answers(task, target, victim, server.getsockname()[1])
        judged = task.judge_all([(item, answer) for answer in answers.values()])
        with pytest.raises(TimeoutError):
            server.accept()
    for program, judgement in zip(answers, judged, strict=True):
        assert judgement.value == 0, program
        assert judgement.why, program
    assert victim.read_text() == "here"
    assert not target.exists()
    good = gold_answer(task, item, True)
    assert task.judge(item, good).value == 1


def test_a_program_that_passes_its_asserts_only_by_leaving_is_wrong():
    task = make_task("human_eval")
    item = task.items(Data())[0]
    assert task.judge(item, Answer("    return 1\n\nprint('all is well')\nraise SystemExit(0)\n")).value == 0


def test_requests_of_instruct_models_are_dialogs():
    for name in OF_SUITES:
        for item in make_task(name, mode="instruct").items(Data()):
            assert isinstance(item.request, Generate)
            roles = [message["role"] for message in item.request.prompt]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
