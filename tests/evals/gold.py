"""Answers that a judge must take for right, and for wrong: they prove the tasks' judges without a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from ifeval_answers import satisfying

from herd.evals.tasks import Answer, Generate, Item, Likelihood, Rank, Task
from herd.evals.tasks.calls import Bfcl
from herd.evals.tasks.choice import LETTERS, ChoiceTask
from herd.evals.tasks.dialogs import ToolDialogs
from herd.evals.tasks.instructions import IfEval
from herd.evals.tasks.lm_eval import LmEvalTask
from herd.evals.tasks.long import LongText
from herd.evals.tasks.parallel_text import ParallelText
from herd.evals.tasks.programs import ProgramTask
from herd.evals.tasks.word_problems import Gsm8k, Mgsm, worked_solution
from herd.text.llama3_chat import call_text
from herd.text.messages import CODE_INTERPRETER
from herd.text.toolcall_grammar import ToolCall


def gold_answer(task: Task, item: Item, right: bool) -> Answer:
    """Return an answer that must be judged right, or wrong (bits per byte: one bit per byte, or none)."""
    if isinstance(item.request, Rank):
        best = (
            item.gold
            if isinstance(task, ChoiceTask)
            else task.inner.doc_to_target(item.doc["instances"][0].doc)
        )
        n = len(item.request.pairs)
        best = best if isinstance(best, int) else 0
        best = best if right else (best + 1) % n
        return Answer(likelihoods=tuple(Likelihood(-1e-3 if i == best else -1e3) for i in range(n)))
    match task:
        case ParallelText():
            nats = -0.6931471805599453 * len(item.doc["text"].encode()) * right
            return Answer(likelihoods=(Likelihood(nats, n_tokens=len(item.doc["text"].split())),))
        case LmEvalTask():
            target = task.inner.doc_to_target(item.doc["instances"][0].doc)
            target = target[0] if isinstance(target, list) else target
            text = str(target) if right else "herd"
        case ChoiceTask():
            letters = LETTERS[: len(item.doc["choices"])]
            text = next(letter for letter in letters if (letter == item.gold) == right)
        case Gsm8k(mode="base"):
            text = f" {item.doc['worked']}" if right else f"#### {item.gold}1"
        case Gsm8k():
            text = worked_solution(item.doc["worked"]) if right else f"The final answer is {item.gold}1"
        case Mgsm():
            text = f" {item.gold}" if right else f" {item.gold}1"
        case ProgramTask():
            text = item.doc["solution"] if right else _wrong_program(task, item)
            if task.mode == "instruct":
                text = f"Here it is:\n```python\n{text}\n```"
        case Bfcl():
            text = _calls(item, right) or "None of the functions can be used."
        case ToolDialogs(name="tool_answers"):
            text = item.doc["dialog"].answer if right else "?"
        case ToolDialogs():
            call = item.doc["dialog"].call
            code = call["name"] == CODE_INTERPRETER
            text = (
                f"<|python_tag|>{call['arguments']['code']}"
                if code
                else call_text(call["name"], call["arguments"])
            )
            text = text if right else "I do not know."
        case IfEval():
            text = (
                satisfying(item.gold, item.doc["kwargs"]) if right else ""
            )  # silence follows no instruction
        case LongText():
            text = " " + ", ".join(item.gold) if right else " It does not say."
        case _:
            raise TypeError(f"no gold answers for {task.name}: add a case for {type(task).__name__}")
    assert isinstance(item.request, Generate)
    return Answer(text, "stop")


def judged(task: Task, items: Sequence[Item], right: bool) -> list[Any]:
    """Return the judgements of the gold answers, or of the wrong ones."""
    return task.judge_all([(item, gold_answer(task, item, right)) for item in items])


def _wrong_program(task: Task, item: Item) -> str:
    if task.name == "mbpp":
        return f"def {item.doc['name'] or 'herd'}(*_, **__):\n    return 'herd'\n"
    return "    return 'herd'\n" if task.mode == "base" else f"{item.doc['prompt']}    return 'herd'\n"


def _calls(item: Item, right: bool) -> str:
    functions = item.doc["functions"]
    calls = expected_calls(item.gold, functions)
    some = [ToolCall(functions[0]["name"], {}, "json")] if functions else []
    if item.group == "live_relevance":
        calls = some if right else []
    elif not right:  # no call where some are expected, and the other way round
        calls = [] if calls else some
    return "\n".join(call_text(call.name, call.arguments) for call in calls)


def expected_calls(
    expected: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]]
) -> list[ToolCall]:
    """Return calls that BFCL's rules accept: the first possible value of every argument."""
    by_name = {function["name"]: function["parameters"] for function in functions}
    calls = []
    for one in expected:
        for name, values in one.items():
            known, required = by_name[name]["properties"], by_name[name]["required"]
            given = [
                key
                for key in values
                if key in known and (key in required or set(map(str, values[key])) != {""})
            ]
            calls.append(ToolCall(name, {key: _first(values[key], known[key]) for key in given}, "json"))
    return calls


def _first(values: Sequence[Any], schema: Mapping[str, Any]) -> Any:
    """Return the first value listed that is not "". Within dictionaries each key again has a list of values."""
    empty = {"string": "", "array": [], "dict": {}, "integer": 0, "float": 0.0, "boolean": False, "any": ""}
    value = next((one for one in values if one != ""), "" if values else empty[schema["type"]])
    if isinstance(value, dict):
        return _plain_dict(value)
    if isinstance(value, list) and schema.get("items", {}).get("type") == "dict":
        return [_plain_dict(item) for item in value]
    return value


def _plain_dict(possible: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    firsts = {key: next((one for one in values if one != ""), None) for key, values in possible.items()}
    return {key: value for key, value in firsts.items() if value is not None}
