"""Multiple choice: the most likely continuation (base models), or the letter in the answer (instruct models).

base: worked examples and the question as text, then each choice as the continuation. The most likely choice
wins, by log-likelihood (``acc``) or by log-likelihood per character (``acc_norm``, which does not favour
short choices). Prompts and the choice between the two metrics follow EleutherAI's lm-eval. instruct: a dialog
that lists the choices by letter. The answer is right if it names the right one (`letters`).
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .data import Data, Row
from .letters import chosen_letter
from .primer import truthfulqa_primer
from .task import Answer, Generate, Item, Judgement, Rank, Task, too_few_examples

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASK = "Answer with the letter of the right choice only."


@dataclass(frozen=True)
class Doc:
    """A question in the common form of all choice tasks.

    ``text`` is a base model's prompt before a choice, ``asked`` is the question for an instruct model. If
    there is a ``tail``, it follows the choice, only the tail is scored, and the choice belongs to the
    context. ``shown`` are the choices for an instruct model if they differ from ``choices``.
    """

    id: str
    text: str
    choices: tuple[str, ...]
    gold: int
    asked: str = ""
    group: str = ""
    tail: str = ""
    shown: Sequence[str] = ()

    def with_choice(self, number: int) -> tuple[str, str]:
        """Return (context, text to score) for one choice."""
        if self.tail:
            return self.text + self.choices[number], f" {self.tail}"
        return self.text, f" {self.choices[number]}"

    def same_question(self, other: Doc) -> bool:
        return (self.text, self.choices, self.tail) == (other.text, other.choices, other.tail)


@dataclass(frozen=True)
class ChoiceTask(Task):
    """Base of the choice tasks. A subclass names its files and converts their rows to `Doc`s."""

    version: ClassVar[str] = "4"
    files: ClassVar[tuple[str, ...]] = ()
    train: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    shots_from: ClassVar[str] = "first of the training file, else first other items"

    @abstractmethod
    def doc(self, row: Row, number: int) -> Doc:
        """Return one row of the file as a `Doc`."""

    def docs(self, data: Data) -> list[Doc]:
        """Return all questions."""
        return self._read(data, self.files)

    def examples(self, data: Data, doc: Doc) -> Sequence[Doc]:
        """Return the questions that can be worked examples for ``doc``. They may include ``doc``."""
        return self._read(data, self.train) if data.find(*self.train) else self.docs(data)

    def items(self, data: Data) -> list[Item]:
        pools: dict[str, Sequence[Doc]] = {}
        items = []
        for doc in self.docs(data):
            if doc.group not in pools:
                pools[doc.group] = self.examples(data, doc)[: 2 * self.shots + 1] if self.shots else ()
            # compared by content, because a question may be both in the training and in the test file
            shots = [other for other in pools[doc.group] if not other.same_question(doc)][: self.shots]
            items.append(self._item(doc, shots))
        return items

    def note(self, data: Data) -> str:
        first = self.docs(data)[0]
        pool = self.examples(data, first) if self.shots else ()
        return too_few_examples(len(pool) - any(other.same_question(first) for other in pool), self.shots)

    def judge(self, item: Item, answer: Answer) -> Judgement:
        return judge_choice(item, answer, self.metric)

    def head(self, shots: Sequence[Doc], doc: Doc) -> str:
        """Return the text before a base model's question."""
        return "".join("".join(shot.with_choice(shot.gold)) + "\n\n" for shot in shots)

    def order(self, doc: Doc) -> list[int]:
        """Return the order of the choices in the list of letters."""
        return list(range(len(doc.choices)))

    def _item(self, doc: Doc, shots: Sequence[Doc]) -> Item:
        if self.mode == "base":
            head = self.head(shots, doc)
            pairs = [doc.with_choice(i) for i in range(len(doc.choices))]
            request = Rank(tuple((head + before, scored) for before, scored in pairs))
            return Item(doc.id, request, doc.gold, doc.group, {"choices": list(doc.choices)})
        turns = [turn for shot in (*shots, doc) for turn in self._turns(shot)]
        choices = [(doc.shown or doc.choices)[i] for i in self.order(doc)]
        gold = turns.pop()["content"]
        return Item(doc.id, Generate(tuple(turns), max_tokens=16), gold, doc.group, {"choices": choices})

    def _turns(self, doc: Doc) -> list[dict[str, str]]:
        order, shown = self.order(doc), doc.shown or doc.choices
        lines = [f"{letter}. {shown[i]}" for letter, i in zip(LETTERS, order, strict=False)]
        question = "\n".join((doc.asked or doc.text, *lines, ASK))
        answer = LETTERS[order.index(doc.gold)]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _read(self, data: Data, files: Sequence[str]) -> list[Doc]:
        return [self.doc(row, number) for number, row in enumerate(data.rows(*files, needs=self.needs))]


def judge_choice(item: Item, answer: Answer, metric: str) -> Judgement:
    """Judge the letter in the answer, or the most likely choice by ``metric`` (``acc`` or ``acc_norm``)."""
    choices = item.doc["choices"]
    if isinstance(item.request, Generate):
        letter = chosen_letter(answer.text, LETTERS[: len(choices)], choices)
        return Judgement(float(letter == item.gold), letter, why="" if letter else "no letter")
    nats = [likelihood.nats for likelihood in answer.likelihoods]
    per_char = [value / len(choice) for value, choice in zip(nats, choices, strict=True)]
    best = {name: values.index(max(values)) for name, values in (("acc", nats), ("acc_norm", per_char))}
    right = {name: float(number == item.gold) for name, number in best.items()}
    return Judgement(right.pop(metric), best[metric], right)


class BoolQ(ChoiceTask):
    source = "Clark et al., arXiv 1905.10044; lm-eval boolq"
    licence = "CC BY-SA 3.0"
    files, train = ("boolq/validation.jsonl",), ("boolq/train.jsonl",)
    needs = ("passage", "question", "answer")

    def doc(self, row: Row, number: int) -> Doc:
        text = f"{row['passage']}\nQuestion: {row['question']}?"
        return Doc(str(number), f"{text}\nAnswer:", ("no", "yes"), int(row["answer"]), text)


class HellaSwag(ChoiceTask):
    source = "Zellers et al., arXiv 1905.07830; lm-eval hellaswag"
    licence = "MIT"
    metric = "acc_norm"
    files, train = ("hellaswag/validation.jsonl",), ("hellaswag/train.jsonl",)
    needs = ("activity_label", "ctx_a", "ctx_b", "endings", "label")

    def docs(self, data: Data) -> list[Doc]:
        if data.find(*self.files):
            return super().docs(data)
        # a text format with six lines per item: context, gold and four endings, cleaned already
        lines = data.text(self.files[0], "hellaswag/hellaswag_val_full.txt").splitlines()
        blocks = [lines[i : i + 6] for i in range(0, len(lines) - 5, 6)]
        return [self._doc(n, text, tuple(ends), int(gold)) for n, (text, gold, *ends) in enumerate(blocks)]

    def doc(self, row: Row, number: int) -> Doc:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return self._doc(number, _clean(context), tuple(map(_clean, row["endings"])), int(row["label"]))

    def _doc(self, number: int, text: str, endings: tuple[str, ...], gold: int) -> Doc:
        return Doc(str(number), text, endings, gold, f"How does this go on?\n{text}")


class OpenBookQA(ChoiceTask):
    source = "Mihaylov et al., arXiv 1809.02789; lm-eval openbookqa"
    licence = "Apache-2.0"
    metric = "acc_norm"
    files = ("openbookqa/test.jsonl", "openbookqa/validation.jsonl")
    train = ("openbookqa/train.jsonl",)
    needs = ("question_stem", "choices", "answerKey")

    def doc(self, row: Row, number: int) -> Doc:
        return _labelled(row, row["question_stem"], row["question_stem"], number)


class Arc(ChoiceTask):
    source = "Clark et al., arXiv 1803.05457; lm-eval arc_challenge, arc_easy"
    licence = "CC BY-SA 4.0"
    metric = "acc_norm"

    def docs(self, data: Data) -> list[Doc]:
        level = self.name.removeprefix("arc_")
        names = (f"{level}_test", f"arc_{level}", f"{level}_validation")
        return self._read(data, [f"arc/{name}.jsonl" for name in names])

    def examples(self, data: Data, doc: Doc) -> Sequence[Doc]:
        level = self.name.removeprefix("arc_")
        files = (f"arc/{level}_train.jsonl", f"arc/{level}_validation.jsonl")
        return self._read(data, files) if data.find(*files) else self.docs(data)

    def doc(self, row: Row, number: int) -> Doc:
        if "query" in row:  # a flat format without the last line of the prompt
            asked = row["query"].removeprefix("Question: ")
            return Doc(str(number), f"Question: {asked}\nAnswer:", tuple(row["choices"]), row["gold"], asked)
        return _labelled(row, f"Question: {row['question']}\nAnswer:", row["question"], number)


class Piqa(ChoiceTask):
    source = "Bisk et al., arXiv 1911.11641; lm-eval piqa"
    licence = "AFL-3.0"
    metric = "acc_norm"
    files = ("piqa/validation.jsonl", "piqa/valid.jsonl")
    train = ("piqa/train.jsonl",)
    needs = ("goal", "sol1", "sol2")

    def docs(self, data: Data) -> list[Doc]:
        rows = data.rows(*self.files, needs=self.needs)
        if "label" not in rows[0]:  # the authors' format has the labels in another file
            labels = data.text("piqa/valid-labels.lst").split()
            rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
        return [self.doc(row, number) for number, row in enumerate(rows)]

    def doc(self, row: Row, number: int) -> Doc:
        text = f"Question: {row['goal']}\nAnswer:"
        return Doc(str(number), text, (row["sol1"], row["sol2"]), int(row["label"]), row["goal"])


class SocialIqa(ChoiceTask):
    source = "Sap et al., arXiv 1904.09728; lm-eval social_iqa"
    licence = "CC BY 4.0"
    files, train = ("social_iqa/validation.jsonl",), ("social_iqa/train.jsonl",)
    needs = ("context", "question", "answerA", "answerB", "answerC", "label")

    def doc(self, row: Row, number: int) -> Doc:
        asked = f"{row['context']} {row['question']}"
        choices = (row["answerA"], row["answerB"], row["answerC"])
        return Doc(str(number), f"Q: {asked}\nA:", choices, int(row["label"]) - 1, asked)


class Winogrande(ChoiceTask):
    """Winogrande with partial evaluation: the *rest* of the sentence after each choice is scored."""

    source = "Sakaguchi et al., arXiv 1907.10641; lm-eval winogrande"
    licence = "CC BY"
    files, train = ("winogrande/validation.jsonl",), ("winogrande/train.jsonl",)
    needs = ("sentence", "option1", "option2", "answer")

    def doc(self, row: Row, number: int) -> Doc:
        before, _, after = row["sentence"].partition("_")
        asked = f"What belongs in the place of the _?\n{row['sentence']}"
        options = (row["option1"], row["option2"])
        return Doc(str(number), before, options, int(row["answer"]) - 1, asked, tail=after.strip())


class TruthfulQaMc1(ChoiceTask):
    """The true answer among popular wrong ones, after six fixed questions and answers."""

    source = "Lin et al., arXiv 2109.07958; lm-eval truthfulqa_mc1"
    licence = "Apache-2.0"
    shots_from = "the primer: lm-eval's if it is installed, else Herd's own"
    files = ("truthfulqa/validation.jsonl",)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"primer": truthfulqa_primer()[0]}

    def docs(self, data: Data) -> list[Doc]:
        if data.find(*self.files):
            return self._read(data, self.files)
        data.text(self.files[0], "truthfulqa/TruthfulQA.csv")
        rows = data.table("truthfulqa/TruthfulQA.csv")
        return [self._doc(n, row["Question"], _answers(row), 0) for n, row in enumerate(rows)]

    def doc(self, row: Row, number: int) -> Doc:
        targets = row["mc1_targets"]
        return self._doc(number, row["question"], tuple(targets["choices"]), list(targets["labels"]).index(1))

    def examples(self, data: Data, doc: Doc) -> Sequence[Doc]:
        return [
            Doc(f"primer-{n}", f"Q: {q}\nA:", (a,), 0, q) for n, (q, a) in enumerate(truthfulqa_primer()[1])
        ]

    def order(self, doc: Doc) -> list[int]:
        """Shuffle the choices, because the true answer comes first in the file."""
        order = list(range(len(doc.choices)))
        random.Random(doc.text).shuffle(order)
        return order

    def _doc(self, number: int, question: str, choices: tuple[str, ...], gold: int) -> Doc:
        return Doc(str(number), f"Q: {question}\nA:", choices, gold, question)


def _labelled(row: Row, text: str, asked: str, number: int) -> Doc:
    """Return the `Doc` of a row of the Allen Institute's sets. They list choices as texts and labels."""
    gold = row["choices"]["label"].index(row["answerKey"].strip())
    return Doc(str(number), text, tuple(row["choices"]["text"]), gold, asked)


def _answers(row: Row) -> tuple[str, ...]:
    wrong = [answer.strip() for answer in row["Incorrect Answers"].split(";")]
    return (row["Best Answer"].strip(), *(answer for answer in wrong if answer))


def _clean(text: str) -> str:
    """Remove WikiHow's markup from HellaSwag's texts."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
