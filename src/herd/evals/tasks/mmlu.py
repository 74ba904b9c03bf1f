"""MMLU: 57 subjects in four groups, five worked examples of the same subject before each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ...errors import DataError
from ...package_yaml import package_yaml
from .choice import ChoiceTask, Doc
from .data import Data, Row
from .task import Mode

SUBJECTS: dict[str, tuple[str, ...]] = {
    group: tuple(names.split()) for group, names in package_yaml(__package__, "mmlu_subjects.yaml").items()
}
"""Subjects of each group."""


@dataclass(frozen=True)
class Mmlu(ChoiceTask):
    """A group of subjects, or a single subject. All questions have the same weight in the score."""

    subjects: tuple[str, ...] = ()

    source = "Hendrycks et al., arXiv 2009.03300; lm-eval mmlu"
    licence = "MIT"
    shots_from = "the first of the subject's dev file, else first other items"
    files, train = ("mmlu/test.jsonl",), ("mmlu/dev.jsonl",)
    needs = ("question", "subject", "choices", "answer")

    @classmethod
    def of(cls, name: str, shots: int, mode: Mode) -> Mmlu:
        """Return the task ``mmlu_<group>`` or ``mmlu_<subject>``."""
        part = name.removeprefix("mmlu_")
        return cls(name, shots, mode, SUBJECTS.get(part, (part,)))

    def docs(self, data: Data) -> list[Doc]:
        """Return questions of all subjects in turn, so that the first questions have all subjects."""
        of_subject: dict[str, list[Doc]] = {subject: [] for subject in self.subjects}
        for doc in super().docs(data):
            of_subject.get(doc.group, []).append(doc)
        if not any(of_subject.values()):
            raise DataError(f"{data.find(*self.files)} has no questions of {', '.join(self.subjects)}")
        return [doc for together in zip_longest(*of_subject.values()) for doc in together if doc is not None]

    def examples(self, data: Data, doc: Doc) -> Sequence[Doc]:
        files = self.train if data.find(*self.train) else self.files
        return [other for other in self._read(data, files) if other.group == doc.group]

    def head(self, shots: Sequence[Doc], doc: Doc) -> str:
        subject = doc.group.replace("_", " ")
        title = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        return title + super().head(shots, doc)

    def doc(self, row: Row, number: int) -> Doc:
        question = row["question"].strip()
        letters = ("A", "B", "C", "D")
        lettered = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)]
        text, id_ = "\n".join((question, *lettered, "Answer:")), f"{row['subject']}-{number}"
        return Doc(id_, text, letters, int(row["answer"]), question, row["subject"], shown=row["choices"])
