"""WrittenProgram programs: what counts as one, what parses, what passes."""

import pytest

from herd.engine import Completion, Engine
from herd.evals import code
from herd.evals.code import (
    code_items,
    function_body,
    program_scores,
    run_programs,
    written_as_text,
    written_in_chat,
)


@pytest.fixture(scope="module")
def items():
    return code_items(12, seed=1)


@pytest.fixture
def scripted(monkeypatch):
    def install(texts):
        seen = []

        def run(self, requests):
            seen.extend(requests)
            return [Completion([], text, "stop") for text in texts]

        monkeypatch.setattr(Engine, "run", run)
        return seen

    return install


def solution(dialog):
    return dialog.messages[-1]["content"]


def test_own_solutions_pass_and_others_do_not(items):
    assert all(w.parses and w.passes for w in run_programs([(d, solution(d)) for d in items]))
    name = [solution(d).partition("(")[0] for d in items]
    wrong = run_programs([(d, f"{n}(*_):\n    return 'herd'\n") for d, n in zip(items, name, strict=True)])
    assert all(w.parses and not w.passes for w in wrong)


@pytest.mark.parametrize(
    ("program", "parses"),
    [
        ("def f(:", False),
        ("x = 1", False),
        ("", False),
        ("def f():\n\x00", False),
        ("(" * 5000, False),
        ("def f(): 1", True),
    ],
)
def test_what_parses(items, program, parses):
    [written] = run_programs([(items[0], program)])
    assert (written.parses, written.passes) == (parses, False)


def test_endless_programs_fail(items, monkeypatch):
    monkeypatch.setattr(code, "TIMEOUT_S", 0.3)
    [written] = run_programs([(items[0], "def f():\n    pass\nwhile True: pass")])
    assert (written.parses, written.passes) == (True, False)


def test_body_ends_at_the_first_unindented_line():
    assert function_body(" return a\n\n    # more\nprint(1)\n") == " return a\n\n    # more"
    assert function_body(" return a") == " return a"


def test_in_a_dialog(scripted, items, tokenizer, make_model):
    seen = scripted([f"```python\n{solution(d)}\n```" for d in items[:-1]] + ["I cannot."])
    written = written_in_chat(make_model(0), tokenizer, items)
    parse, passed = program_scores(written)
    assert (parse.name, passed.name) == ("code_parse", "code_pass")
    assert parse.value == passed.value == pytest.approx(11 / 12)
    assert passed.detail["by_lang"]["en"]["n"] == 12
    assert len(seen) == 12
    assert seen[0].sampling.greedy


def test_as_text(scripted, items, tokenizer, make_model):
    """The def line is given. What a base model writes after its function is cut off."""
    seen = scripted([solution(d).split("\n   ", 1)[1] + "\n\nprint('more')\n" for d in items])
    written = written_as_text(make_model(0), tokenizer, items)
    assert all(w.passes for w in written)
    prompt = tokenizer.decode(seen[0].prompt_ids)
    assert prompt.startswith("<|begin_of_text|># ")
    assert prompt.endswith(":\n   ")


def test_random_weights(items, tokenizer, make_model):
    parse, passed = program_scores(written_as_text(make_model(0, max_context=512), tokenizer, items[:3]))
    assert passed.value == 0
    assert parse.n == 3
