"""HumanEval and MBPP: functions judged by running asserts in the sandbox (`herd.tools.sandbox`).

A model's program is untrusted, so it runs in a process without network, files or child processes, and with a
time limit. The program must also reach a line after the asserts that prints a random word, so that exiting
early with status 0 is not a success. base: the model continues the code (lm-eval's prompts and stops).
instruct: a dialog that asks for the function in a code block (`herd.text.fenced`).
"""

from __future__ import annotations

import re
import secrets
import textwrap
from abc import abstractmethod
from collections.abc import Sequence

from ...text.fenced import defined_functions, future_imports_first, python_program
from ...tools.sandbox import Sandbox
from .data import Data, Row
from .task import Answer, Generate, Item, Judgement, Task

TIMEOUT_S = 10.0
CODE_CHARS = 1 << 20  # longer answers are not run


class ProgramTask(Task):
    """Base of both tasks. `code` is the program in an answer, and ``doc["tests"]`` runs after it."""

    version = "2"
    metric = "pass@1"

    @abstractmethod
    def code(self, item: Item, text: str) -> str:
        """Return the program in an answer, without tests."""

    def judge(self, item: Item, answer: Answer) -> Judgement:
        return self.judge_all([(item, answer)])[0]

    def judge_all(self, answered: Sequence[tuple[Item, Answer]]) -> list[Judgement]:
        with Sandbox() as sandbox:
            return [
                run_tests(sandbox, self.code(item, answer.text), item.doc["tests"])
                for item, answer in answered
            ]


def called_function(tests: str) -> str:
    """Return the name of the function that the first assert calls, or "" if it calls none."""
    called = re.search(r"assert\s+\(*(?:\w+\()?\s*(\w+)\(", tests)
    return called[1] if called else ""


def run_tests(sandbox: Sandbox, code: str, tests: str) -> Judgement:
    """Run a program and then its tests. It passes if the end of the tests is reached."""
    if len(code) > CODE_CHARS:
        return Judgement(0.0, why=f"{len(code):,} characters are too long for a program")
    word = secrets.token_hex(8)
    result = sandbox.run(f"{code}\n\n{tests}\nprint('\\n{word}')\n", timeout_s=TIMEOUT_S)
    if result.ok and result.stdout.endswith(f"\n{word}\n"):
        return Judgement(1.0, "passed")
    error = result.stderr.strip().splitlines()[-1:]
    why = "; ".join([*filter(None, [result.reason]), *error])[:500]
    return Judgement(0.0, "failed", why=why or "ended early")


class HumanEval(ProgramTask):
    """Write the body of a function from its head and docstring, without worked examples."""

    source = "Chen et al., arXiv 2107.03374; lm-eval humaneval (base)"
    licence = "MIT"

    def items(self, data: Data) -> list[Item]:
        needs = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
        rows = data.rows("humaneval/HumanEval.jsonl", "humaneval/test.jsonl", needs=needs)
        return [self._item(row) for row in rows]

    def code(self, item: Item, text: str) -> str:
        prompt = item.doc["prompt"]
        if self.mode == "base":
            return prompt + text
        code = python_program(text, item.gold)
        if item.gold in defined_functions(code):  # the whole function, which may use the prompt's imports
            return future_imports_first(f"{prompt}    pass\n\n{code}")
        return prompt + textwrap.indent(textwrap.dedent(code.strip("\n")), "    ")  # only its body

    def _item(self, row: Row) -> Item:
        prompt = row["prompt"]
        solution = row["canonical_solution"] if self.mode == "base" else prompt + row["canonical_solution"]
        tests = f"{row['test']}\ncheck({row['entry_point']})"
        doc = {"prompt": prompt, "tests": tests, "solution": solution}
        if self.mode == "base":
            stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
            request = Generate(prompt, max_tokens=1024, stop=stop)
        else:
            task = "Complete this function. Answer with the whole function in one code block."
            asked = f"{task}\n\n```python\n{prompt}```"
            request = Generate(({"role": "user", "content": asked},), max_tokens=1024)
        return Item(row["task_id"], request, row["entry_point"], doc=doc)


class Mbpp(ProgramTask):
    """Write a function from a sentence and three asserts. Tasks 11 to 510 are the test, 2 to 4 the shots."""

    source = "Austin et al., arXiv 2108.07732; lm-eval mbpp (base)"
    licence = "CC BY 4.0"
    shots_from = "tasks 2, 3, 4, else first other items"

    def items(self, data: Data) -> list[Item]:
        rows = data.rows("mbpp/mbpp.jsonl", needs=("task_id", "text", "code", "test_list"))
        tests = [row for row in rows if 11 <= row["task_id"] <= 510] or rows
        pool = [row for row in rows if row["task_id"] in (2, 3, 4)] or tests
        return [self._item(row, [shot for shot in pool if shot is not row][: self.shots]) for row in tests]

    def code(self, item: Item, text: str) -> str:
        return text if self.mode == "base" else python_program(text, item.doc["name"])

    def _item(self, row: Row, shots: Sequence[Row]) -> Item:
        tests = "\n".join([row.get("test_setup_code", ""), *row["test_list"]])
        doc = {"tests": tests, "solution": row["code"], "name": called_function(row["test_list"][0])}
        if self.mode == "base":
            text = "".join(f"{_task(shot)}\n[BEGIN]\n{shot['code']}\n[DONE]\n\n" for shot in shots)
            request = Generate(f"{text}{_task(row)}\n[BEGIN]\n", max_tokens=512, stop=("[DONE]",))
        else:
            turns = [turn for shot in shots for turn in (_ask(shot), _write(shot))]
            request = Generate((*turns, _ask(row)), max_tokens=512)
        return Item(str(row["task_id"]), request, "passes", doc=doc)


def _task(row: Row) -> str:
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}"
    )


def _ask(row: Row) -> Row:
    return {"role": "user", "content": f"{_task(row)}\n\nAnswer with one code block."}


def _write(row: Row) -> Row:
    return {"role": "assistant", "content": f"```python\n{row['code']}\n```"}
