"""Arithmetic word problems: GSM8K, and MGSM in eleven languages. The number must be exact.

base: worked examples as text that the model continues (lm-eval's prompts and judge). instruct: a dialog that
asks for the steps and then the number, in any notation (`numbers`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from .data import Data, Row
from .numbers import final_number
from .task import Answer, Generate, Item, Judgement, Task, too_few_examples

_NUMBER = re.compile(r"-?[$]?[0-9][0-9.,]*")
_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_CALCULATION = re.compile(r"<<.*?>>")
ASK = 'Work it out step by step, and end with "The final answer is N", where N is the number alone.'


class Gsm8k(Task):
    version = "4"
    source = "Cobbe et al., arXiv 2110.14168; lm-eval gsm8k (base, strict-match)"
    licence = "MIT"
    shots_from = "the first of the training file, else first other items"
    metric = "exact_match"

    def items(self, data: Data) -> list[Item]:
        rows = data.rows("gsm8k/test.jsonl", needs=("question", "answer"))
        pool = self._examples(data, rows)[: self.shots + 1]
        items = []
        for number, row in enumerate(rows):
            shots = [shot for shot in pool if shot != row][: self.shots]
            gold = plain_number(row["answer"].rpartition("#### ")[2].strip())
            items.append(Item(str(number), self._request(row, shots), gold, doc={"worked": row["answer"]}))
        return items

    def note(self, data: Data) -> str:
        rows = data.rows("gsm8k/test.jsonl")
        pool = self._examples(data, rows)
        return too_few_examples(len(pool) - (pool is rows), self.shots)

    def judge(self, item: Item, answer: Answer) -> Judgement:
        """Judge the number after ``####`` (base, as in lm-eval) or the answer's final number (instruct)."""
        metrics = {"flexible_match": float(last_number(answer.text) == item.gold)}
        if self.mode == "instruct":
            return _judge_final(item, answer, "en", metrics)
        marked = _MARKED.search(answer.text)
        found = plain_number(marked[1]) if marked else None
        return Judgement(float(found == item.gold), found, metrics, "" if found else "no number")

    def _examples(self, data: Data, rows: list[Row]) -> list[Row]:
        train = ("gsm8k/train.jsonl", "gsm8k/train.head1500.jsonl")
        return data.rows(*train, needs=("question", "answer")) if data.find(*train) else rows

    def _request(self, row: Row, shots: Sequence[Row]) -> Generate:
        if self.mode == "base":
            text = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
            text += f"Question: {row['question']}\nAnswer:"
            return Generate(text, max_tokens=256, stop=("Question:", "</s>", "<|im_end|>"))
        turns = [
            turn
            for shot in shots
            for turn in (
                _user(shot["question"]),
                {"role": "assistant", "content": worked_solution(shot["answer"])},
            )
        ]
        return Generate((*turns, _user(row["question"])), max_tokens=1024)


# The word before a problem in each language's prompts, and the word before its answer if that is not
# "Answer:".
QUESTION = {
    "bn": "প্রশ্ন: ", "de": "Frage: ", "en": "Question: ", "es": "Pregunta: ", "fr": "Question : ",
    "ja": "問題: ", "ru": "Задача: ", "sw": "Swali: ", "te": "ప్రశ్న: ", "th": "โจทย์: ", "zh": "问题： ",
}  # fmt: skip
ANSWER = {"de": "Antwort:", "es": "Respuesta:", "fr": "Réponse :"}


class Mgsm(Task):
    """One score over all languages, with a breakdown.

    base: the number directly (lm-eval's mgsm_direct). instruct: with steps, in the language of the problem.
    """

    version = "4"
    source = "Shi et al., arXiv 2210.03057; lm-eval mgsm_direct (base)"
    licence = "CC BY 4.0"
    shots_from = "first other items of the language"
    metric = "exact_match"

    def items(self, data: Data) -> list[Item]:
        # en: DataError if missing
        by_language = {lang: _problems(data, lang) for lang in _languages(data) or ["en"]}
        numbers = range(max(map(len, by_language.values())))
        places = [(lang, n) for n in numbers for lang, problems in by_language.items() if n < len(problems)]
        return [
            Item(f"{lang}-{n}", self._request(lang, problems, n), plain_number(problems[n][1]), lang)
            for lang, n in places
            for problems in [by_language[lang]]
        ]

    def note(self, data: Data) -> str:
        there = _languages(data)
        missing = [lang for lang in QUESTION if lang not in there]
        fewest = min(len(_problems(data, lang)) for lang in there) - 1
        notes = (
            f"no data for {', '.join(missing)}" if missing else "",
            too_few_examples(fewest, self.shots) if self.mode == "base" else "",
        )
        return "; ".join(filter(None, notes))

    def judge(self, item: Item, answer: Answer) -> Judgement:
        if self.mode == "instruct":
            return _judge_final(item, answer, item.group, {})
        found = last_number(answer.text)  # written as in the shots: 1,234 in every language
        return Judgement(float(found == item.gold), found, why="" if found else "no number")

    def _request(self, lang: str, problems: Sequence[tuple[str, str]], number: int) -> Generate:
        question, _ = problems[number]
        if self.mode == "instruct":
            return Generate((_user(question),), max_tokens=1024)
        others = [problem for problem in problems[: self.shots + 1] if problem != problems[number]]
        asked, answered = QUESTION[lang], ANSWER.get(lang, "Answer:")
        text = "".join(f"{asked}{q}\n{answered}{a}\n\n" for q, a in others[: self.shots])
        return Generate(f"{text}{asked}{question}\n{answered}", 64, (asked.strip(), "</s>", "<|im_end|>"))


def plain_number(text: str) -> str:
    """Return a number without currency, commas between thousands, a final point and a fraction of zeros."""
    text = text.replace(",", "").replace("$", "").rstrip(".")
    whole, point, fraction = text.partition(".")
    return whole if point and not fraction.strip("0") else text


def last_number(text: str) -> str | None:
    """Return the last number of a text as `plain_number`, by lm-eval's rule."""
    found = _NUMBER.findall(text)
    return plain_number(found[-1]) if found else None


def _judge_final(item: Item, answer: Answer, language: str, metrics: dict[str, float]) -> Judgement:
    found = final_number(answer.text, language)
    right = found is not None and found == Fraction(item.gold)
    return Judgement(
        float(right), None if found is None else str(found), metrics, "no number" * (found is None)
    )


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": f"{question}\n\n{ASK}"}


def worked_solution(answer: str) -> str:
    """Return a solution in plain text: without calculator marks, with the number in a sentence."""
    steps, _, number = _CALCULATION.sub("", answer).rpartition("\n#### ")
    return f"{steps}\nThe final answer is {number}"


def _languages(data: Data) -> list[str]:
    return [lang for lang in QUESTION if data.find(f"mgsm/mgsm_{lang}.tsv")]


def _problems(data: Data, lang: str) -> list[tuple[str, str]]:
    lines = data.text(f"mgsm/mgsm_{lang}.tsv").split("\n")
    return [(question, answer) for question, tab, answer in (line.rpartition("\t") for line in lines) if tab]
