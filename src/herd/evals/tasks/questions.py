"""A user's own questions: ``herd eval MODEL questions.jsonl``, one question per line.

A line is a JSON object with a question (``question``, or ``messages``) and a criterion for the answer:
``answer`` (the same text or number), ``choices`` and ``answer``, a regular expression (``pattern``), a JSON
schema (``schema``) or Python ``tests``. See docs/how-to/evaluate-your-own-questions.md. Errors name the file
and the line.

instruct: the question is a user's message. base: the model continues the question's text, and choices are
ranked by likelihood.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...data.rows import DataRow, read_rows
from ...errors import DataError
from ...text.fenced import fenced_blocks, python_program
from ...tools.sandbox import Sandbox
from ..results import digest
from .choice import ASK, LETTERS, judge_choice
from .data import Data
from .json_schema import check_schema, same_json, violation
from .numbers import final_number
from .patterns import check_pattern, find
from .programs import called_function, run_tests
from .task import Answer, Generate, GenerateJson, Item, Judgement, Mode, Rank, Request, Task

JUDGED_BY = {
    "choice": "choices",
    "regex": "pattern",
    "json_schema": "schema",
    "code": "tests",
    "exact": "answer",
}
"""The field that each judge needs. If a question has several of them, the first one decides."""
MAX_TOKENS = {"choice": 16, "regex": 256, "json_schema": 512, "code": 1024, "exact": 256}
_NUMBER = re.compile(r"[-+]?(?!0\d)[\d,]*\.?\d+")
_STATED = re.compile(r"\banswer(?: is|:)\s*(.+)", re.IGNORECASE)


class OwnMessage(BaseModel):
    """A turn of a dialog."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str


class OwnQuestion(BaseModel):
    """A line of the file. `judge` is inferred from the other fields if it is not given."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    id: str | int | None = None
    group: str = ""
    question: str = ""
    messages: tuple[OwnMessage, ...] = Field(default=(), strict=False)
    system: str = ""
    answer: Any = None
    choices: Annotated[list[str | int | float], Field(min_length=2, max_length=len(LETTERS))] | None = None
    pattern: str | None = None
    match: Literal["search", "fullmatch"] = "search"
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    constrained: bool = False
    tests: str | None = None
    judge: Literal["exact", "choice", "regex", "json_schema", "code"] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class OwnQuestions(Task):
    """The questions of a file. The score is the fraction of right answers."""

    path: Path = Path()

    shots_from = "none"
    source = "own questions"

    @classmethod
    def of(cls, name: str, shots: int | None, mode: Mode) -> OwnQuestions:
        """Return the task of a file.

        Raises `DataError` if ``shots`` are given: they belong into ``messages``.
        """
        path = Path(name).expanduser()
        if shots:
            raise DataError(f"{name}: --shots has no meaning here; put worked examples into messages")
        return cls(path.name, 0, mode, path)

    def data_label(self, data: Data) -> str:
        return str(self.path)

    def fingerprint(self, item: Item) -> str:
        """Return a hash that includes the criterion, so that a corrected answer counts at the next call."""
        return digest([digest(item.request), item.gold, dict(item.doc)])

    def items(self, data: Data) -> list[Item]:
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; a name without ending is a task of `herd eval list`")
        items: list[Item] = []
        seen: dict[str, str] = {}
        for row in read_rows(self.path, str(self.path)):
            try:
                item = self._item(_parsed(row.value), row)
            except DataError as error:
                raise DataError(f"{row.where}: {error}") from None
            if item.id in seen:
                raise DataError(f"{row.where}: the id {item.id!r} is also the id of {seen[item.id]}")
            seen[item.id] = row.where
            items.append(item)
        if not items:
            raise DataError(f"{self.path} has no questions; give one JSON object per line")
        return items

    def judge(self, item: Item, answer: Answer) -> Judgement:
        return self.judge_all([(item, answer)])[0]

    def judge_all(self, answered: Sequence[tuple[Item, Answer]]) -> list[Judgement]:
        if not any(item.doc["judge"] == "code" for item, _ in answered):
            return [_judge(item, answer) for item, answer in answered]
        with Sandbox() as sandbox:
            return [_judge(item, answer, sandbox) for item, answer in answered]

    def _item(self, question: OwnQuestion, row: DataRow) -> Item:
        judge = _judge_of(question)
        doc: dict[str, Any] = {"judge": judge}
        gold: Any = question.answer
        if judge == "choice":
            choices = [str(choice) for choice in question.choices or ()]
            number = _right_choice(question.answer, choices)
            gold = number if self.mode == "base" else LETTERS[number]
            doc["choices"] = choices
        elif judge == "regex":
            gold = question.pattern
            doc["match"] = question.match
            check_pattern(question.pattern or "")
        elif judge == "json_schema":
            check_schema(question.json_schema)
            doc["schema"] = question.json_schema
        elif judge == "code":
            gold, doc["tests"] = "passes", question.tests
        else:
            gold = _acceptable(question.answer)
        id_ = str(row.number if question.id is None else question.id)
        return Item(id_, self._request(question, judge, doc), gold, question.group, doc)

    def _request(self, question: OwnQuestion, judge: str, doc: Mapping[str, Any]) -> Request:
        if bool(question.question) == bool(question.messages):
            raise DataError("give either question or messages")
        max_tokens = question.max_tokens or MAX_TOKENS[judge]
        prompt: str | tuple[dict[str, str], ...]
        if self.mode == "base":
            if question.messages or question.system:
                raise DataError("messages and system need an instruct model (--mode instruct)")
            prompt = question.question
            if judge == "choice":
                return Rank(tuple((prompt, f" {choice}") for choice in doc["choices"]))
        else:
            prompt = _dialog(question, doc.get("choices", ()))
        stop = ("\n",) if self.mode == "base" and judge == "exact" else ()
        if judge == "json_schema" and question.constrained:
            return GenerateJson(prompt, max_tokens, stop, schema=json.dumps(doc["schema"]))
        return Generate(prompt, max_tokens, stop)


def _parsed(value: Any) -> OwnQuestion:
    if not isinstance(value, dict):
        raise DataError(f"a question is a JSON object, not {type(value).__name__}")
    names = [field.alias or name for name, field in OwnQuestion.model_fields.items()]
    for name in value:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise DataError(f"unknown field {name!r}: {hint}")
    try:
        return OwnQuestion.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(
            str(part) for part in first["loc"] if not str(part).startswith(("constrained", "lax"))
        )
        raise DataError(f"{place}: {first['msg']}") from None


def _judge_of(question: OwnQuestion) -> str:
    """Return the named or inferred judge. Raises `DataError` if the fields contradict each other."""
    fields = question.model_dump(by_alias=True)
    there = [judge for judge, field in JUDGED_BY.items() if fields[field] is not None and judge != "exact"]
    if len(there) > 1:
        raise DataError(f"has {' and '.join(JUDGED_BY[judge] for judge in there)}: give one of them")
    found = there[0] if there else "exact"
    wanted = question.judge or found
    if wanted != found:
        extra = f", and no {JUDGED_BY[found]}" if found != "exact" else ""
        raise DataError(f"judge {wanted!r} needs the field {JUDGED_BY[wanted]!r}{extra}")
    if wanted in ("exact", "choice") and question.answer is None:
        raise DataError("no criterion: give answer, choices with an answer, pattern, schema or tests")
    if wanted in ("regex", "code") and question.answer is not None:
        raise DataError(f"answer is not used by the judge {wanted!r}; remove it")
    return wanted


def _right_choice(answer: Any, choices: Sequence[str]) -> int:
    """Return the index of the choice that ``answer`` names by its text or its letter."""
    text = str(answer).strip()
    if len(set(choices)) < len(choices):
        raise DataError("a choice is given twice")
    by_text = [n for n, choice in enumerate(choices) if choice.strip() == text]
    by_letter = [n for n, letter in enumerate(LETTERS[: len(choices)]) if letter == text]
    found = set(by_text + by_letter)
    if not found:
        last = LETTERS[len(choices) - 1]
        raise DataError(f"answer {answer!r} is neither a choice nor the letter of one (A to {last})")
    if len(found) > 1:
        raise DataError(f"answer {answer!r} is the text of one choice and the letter of another")
    return found.pop()


def _acceptable(answer: Any) -> list[str]:
    """Return the answers that count as right."""
    several = answer if isinstance(answer, list) else [answer]
    if not several or any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in several):
        raise DataError(f"answer {answer!r} must be text, a number, or a list of them")
    return [format(Decimal(str(one)), "f") if isinstance(one, float) else str(one) for one in several]


def _dialog(question: OwnQuestion, choices: Sequence[str]) -> tuple[dict[str, str], ...]:
    turns = [message.model_dump() for message in question.messages]
    turns = turns or [{"role": "user", "content": question.question}]
    if turns[-1]["role"] != "user":
        raise DataError("the last of the messages must be the user's")
    if choices:
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        turns[-1] = {"role": "user", "content": "\n".join((turns[-1]["content"], *lines, ASK))}
    if question.system:
        if turns[0]["role"] == "system":
            raise DataError("has a system message in messages and in system: give one of them")
        turns.insert(0, {"role": "system", "content": question.system})
    return tuple(turns)


def _judge(item: Item, answer: Answer, sandbox: Sandbox | None = None) -> Judgement:
    judge, text = item.doc["judge"], answer.text
    if judge == "choice":
        return judge_choice(item, answer, "acc")
    if judge == "regex":
        try:
            found = find(item.gold, text.strip(), item.doc["match"])
        except TimeoutError as error:
            return Judgement(0.0, why=str(error))
        return Judgement(float(bool(found)), found and found[0], why="" if found else "no match")
    if judge == "json_schema":
        return _judge_json(item, text)
    if judge == "code" and sandbox is not None:
        tests = item.doc["tests"]
        return run_tests(sandbox, python_program(text, called_function(tests)), tests)
    return _judge_exact(item.gold, text)


def _judge_exact(accepted: Sequence[str], text: str) -> Judgement:
    """Compare as numbers if the answer is one, else as texts without case, markup and final punctuation."""
    number = final_number(text)
    said = _final_texts(text)
    for one in accepted:
        if _bare(one) in map(_bare, said):
            return Judgement(1.0, one)
        if _NUMBER.fullmatch(one) and number == Fraction(one.replace(",", "")):
            return Judgement(1.0, str(number))
    numeric = number is not None and all(map(_NUMBER.fullmatch, accepted))
    return Judgement(0.0, str(number) if numeric else said[-1].strip()[:200], why="another answer")


def _final_texts(text: str) -> list[str]:
    """Return the whole text, and the part that it states as its answer."""
    return [text, *_STATED.findall(text)[-1:], *re.findall(r"\\boxed\{([^{}]*)\}", text)[-1:]]


def _bare(text: str) -> str:
    text = re.sub(r"\*\*|__|[`$]", "", unicodedata.normalize("NFKC", text)).casefold()
    return re.sub(r"\s+", " ", text).strip(" \"'“”‘’«».,;:!?")


def _judge_json(item: Item, text: str) -> Judgement:
    fenced = [block.code for block in fenced_blocks(text)]
    try:
        value = json.loads(
            fenced[0] if len(fenced) == 1 else text, parse_constant=_refuse, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        return Judgement(0.0, why=f"not JSON: {error}"[:200])
    why = violation(value, item.doc["schema"])
    if not why and item.gold is not None and not same_json(value, item.gold):
        why = "valid JSON, but another value"
    return Judgement(float(not why), value, why=why)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:40]} is too large")
    return value
