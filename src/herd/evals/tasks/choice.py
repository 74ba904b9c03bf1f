"""Multiple choice: the likeliest continuation (base models), or the letter written down (instruct models).

base: shots and question as text, then each choice as its continuation; the likeliest wins, by log-likelihood
(``acc``) or by log-likelihood per character (``acc_norm``), which does not favour short choices. The prompts follow
EleutherAI's lm-eval, and the headline is ``acc_norm`` where it has one. instruct: a dialog, choices under letters,
exact match of the letter.
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
from .primer import PRIMERS
from .task import Answer, Generate, Item, Judgement, Rank, Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASK = "Answer with the letter of the right choice only."


@dataclass(frozen=True)
class Doc:
    """A question in the common form. ``text`` is what a base model reads before a choice, ``asked`` what an instruct
    model is asked; ``tail`` follows the choice, where the choice is the *context* and the tail is scored."""

    id: str
    text: str
    choices: tuple[str, ...]
    gold: int
    asked: str = ""
    group: str = ""
    tail: str = ""
    shown: Sequence[str] = ()
    """The choices as an instruct model sees them under letters, where they are not ``choices``."""

    def with_choice(self, number: int) -> tuple[str, str]:
        """(before, scored) of one choice."""
        if self.tail:
            return self.text + self.choices[number], f" {self.tail}"
        return self.text, f" {self.choices[number]}"


@dataclass(frozen=True)
class ChoiceTask(Task):
    """Base of the choice tasks: a subclass names its files and turns a row into a `Doc`."""

    files: ClassVar[tuple[str, ...]] = ()
    train: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    normalized: ClassVar[bool] = False
    shots_from: ClassVar[str] = "first of the training file, else first other items"

    @abstractmethod
    def doc(self, row: Row, number: int) -> Doc:
        """One row of the file in the common form."""

    def docs(self, data: Data) -> list[Doc]:
        """All questions."""
        return self._read(data, self.files)

    def examples(self, data: Data, doc: Doc) -> Sequence[Doc]:
        """Where the shots of ``doc`` are taken from, in order; may hold ``doc`` itself."""
        return self._read(data, self.train) if data.find(*self.train) else self.docs(data)

    def items(self, data: Data) -> list[Item]:
        pools: dict[str, Sequence[Doc]] = {}
        items = []
        for doc in self.docs(data):
            if doc.group not in pools:
                pools[doc.group] = self.examples(data, doc) if self.shots else ()
            # compared by content: the same question in train and test must not answer itself
            shots = [other for other in pools[doc.group][: 2 * self.shots + 1] if not _same(other, doc)][
                : self.shots
            ]
            items.append(self._item(doc, shots))
        return items

    def note(self, data: Data) -> str:
        docs = self.docs(data)
        pool = self.examples(data, docs[0]) if self.shots else ()
        own = any(_same(other, docs[0]) for other in pool)
        return f"{len(pool) - own} shots: the data has no more" if len(pool) - own < self.shots else ""

    def judge(self, item: Item, answer: Answer) -> Judgement:
        if isinstance(item.request, Rank):
            return self._ranked(item, answer)
        letters = LETTERS[: len(item.doc["choices"])]
        letter = chosen_letter(answer.text, letters, item.doc["choices"])
        return Judgement(float(letter == item.gold), letter, why="" if letter else "no letter")

    def head(self, shots: Sequence[Doc], doc: Doc) -> str:
        """What stands before a base model's question."""
        return "".join("".join(doc.with_choice(doc.gold)) + "\n\n" for doc in shots)

    def order(self, doc: Doc) -> list[int]:
        """The order in which choices stand under their letters."""
        return list(range(len(doc.choices)))

    def _ranked(self, item: Item, answer: Answer) -> Judgement:
        nats = [likelihood.nats for likelihood in answer.likelihoods]
        plain = max(range(len(nats)), key=nats.__getitem__)  # the first of equals, as numpy's argmax
        lengths = [len(choice) for choice in item.doc["choices"]]
        per_char = max(range(len(nats)), key=lambda i: nats[i] / lengths[i])
        best, other = (per_char, plain) if self.normalized else (plain, per_char)
        return Judgement(
            float(best == item.gold),
            best,
            {"acc" if self.normalized else "acc_norm": float(other == item.gold)},
        )

    def _item(self, doc: Doc, shots: Sequence[Doc]) -> Item:
        if self.mode == "instruct":
            order = self.order(doc)
            turns = [turn for shot in shots for turn in self._turns(shot)]
            question, answer = self._turns(doc)
            return Item(
                doc.id,
                Generate((*turns, question), max_tokens=16),
                answer["content"],
                doc.group,
                {"choices": [(doc.shown or doc.choices)[i] for i in order]},
            )
        head = self.head(shots, doc)
        pairs = [doc.with_choice(i) for i in range(len(doc.choices))]
        request = Rank(tuple((head + before, scored) for before, scored in pairs))
        return Item(doc.id, request, doc.gold, doc.group, {"choices": list(doc.choices)})

    def _turns(self, doc: Doc) -> list[dict[str, str]]:
        order = self.order(doc)
        lines = [
            f"{letter}. {(doc.shown or doc.choices)[i]}" for letter, i in zip(LETTERS, order, strict=False)
        ]
        question = "\n".join((doc.asked or doc.text, *lines, ASK))
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": LETTERS[order.index(doc.gold)]},
        ]

    def _read(self, data: Data, files: Sequence[str]) -> list[Doc]:
        return [self.doc(row, number) for number, row in enumerate(data.rows(*files, needs=self.needs))]


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
    normalized = True
    files, train = ("hellaswag/validation.jsonl",), ("hellaswag/train.jsonl",)
    needs = ("activity_label", "ctx_a", "ctx_b", "endings", "label")

    def docs(self, data: Data) -> list[Doc]:
        if data.find(*self.files):
            return super().docs(data)
        # a plain form with six lines an item: context, gold, four endings, all cleaned already
        lines = data.text(self.files[0], "hellaswag/hellaswag_val_full.txt").splitlines()
        return [
            self._doc(n, lines[i], tuple(lines[i + 2 : i + 6]), int(lines[i + 1]))
            for n, i in enumerate(range(0, len(lines) - 5, 6))
        ]

    def doc(self, row: Row, number: int) -> Doc:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return self._doc(number, _clean(context), tuple(map(_clean, row["endings"])), int(row["label"]))

    def _doc(self, number: int, text: str, endings: tuple[str, ...], gold: int) -> Doc:
        return Doc(str(number), text, endings, gold, f"How does this go on?\n{text}")


class OpenBookQA(ChoiceTask):
    source = "Mihaylov et al., arXiv 1809.02789; lm-eval openbookqa"
    licence = "Apache-2.0"
    metric = "acc_norm"
    normalized = True
    files = ("openbookqa/test.jsonl", "openbookqa/validation.jsonl")
    train = ("openbookqa/train.jsonl",)
    needs = ("question_stem", "choices", "answerKey")

    def doc(self, row: Row, number: int) -> Doc:
        return _labelled(row, row["question_stem"], row["question_stem"], number)


class Arc(ChoiceTask):
    source = "Clark et al., arXiv 1803.05457; lm-eval arc_challenge, arc_easy"
    licence = "CC BY-SA 4.0"
    metric = "acc_norm"
    normalized = True

    def docs(self, data: Data) -> list[Doc]:
        level = self.name.removeprefix("arc_")
        if data.find(f"arc/{level}_test.jsonl"):
            return self._read(data, (f"arc/{level}_test.jsonl",))
        return self._read(data, (f"arc/arc_{level}.jsonl", f"arc/{level}_validation.jsonl"))

    def examples(self, data: Data, doc: Doc) -> Sequence[Doc]:
        level = self.name.removeprefix("arc_")
        files = (f"arc/{level}_train.jsonl", f"arc/{level}_validation.jsonl")
        return self._read(data, files) if data.find(*files) else self.docs(data)

    def doc(self, row: Row, number: int) -> Doc:
        if "query" in row:  # a flat form, without the prompt's last line
            asked = row["query"].removeprefix("Question: ")
            return Doc(str(number), f"Question: {asked}\nAnswer:", tuple(row["choices"]), row["gold"], asked)
        return _labelled(row, f"Question: {row['question']}\nAnswer:", row["question"], number)


class Piqa(ChoiceTask):
    source = "Bisk et al., arXiv 1911.11641; lm-eval piqa"
    licence = "AFL-3.0"
    metric = "acc_norm"
    normalized = True
    files = ("piqa/validation.jsonl", "piqa/valid.jsonl")
    train = ("piqa/train.jsonl",)
    needs = ("goal", "sol1", "sol2")

    def docs(self, data: Data) -> list[Doc]:
        rows = data.rows(*self.files, needs=self.needs)
        if "label" not in rows[0]:  # the authors' own form keeps the labels beside the questions
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
    """Partial evaluation: which filling makes the *rest* of the sentence likelier."""

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
    """The one true answer among popular wrong ones, after six questions and answers that are the same for all."""

    source = "Lin et al., arXiv 2109.07958; lm-eval truthfulqa_mc1"
    licence = "Apache-2.0"
    shots_from = "the primer: lm-eval's where it is installed, else the project's own"
    files = ("truthfulqa/validation.jsonl",)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"primer": PRIMERS.kind}

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
        return [Doc(f"primer-{n}", f"Q: {q}\nA:", (a,), 0, q) for n, (q, a) in enumerate(PRIMERS.pairs)]

    def order(self, doc: Doc) -> list[int]:
        """Shuffled, since the true answer stands first in the file."""
        order = list(range(len(doc.choices)))
        random.Random(doc.text).shuffle(order)
        return order

    def _doc(self, number: int, question: str, choices: tuple[str, ...], gold: int) -> Doc:
        return Doc(str(number), f"Q: {question}\nA:", choices, gold, question)


def _same(a: Doc, b: Doc) -> bool:
    return (a.text, a.choices, a.tail) == (b.text, b.choices, b.tail)


def _labelled(row: Row, text: str, asked: str, number: int) -> Doc:
    """Choices as the Allen Institute's sets have them: texts beside labels."""
    labels = row["choices"]["label"]
    return Doc(
        str(number), text, tuple(row["choices"]["text"]), labels.index(row["answerKey"].strip()), asked
    )


def _answers(row: Row) -> tuple[str, ...]:
    wrong = [answer.strip() for answer in row["Incorrect Answers"].split(";")]
    return (row["Best Answer"].strip(), *(answer for answer in wrong if answer))


def _clean(text: str) -> str:
    """HellaSwag's texts without the marks of the WikiHow pages some came from."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
