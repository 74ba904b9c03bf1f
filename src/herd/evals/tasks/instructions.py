"""IFEval: instructions that a program can check (`herd.evals.ifeval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import ifeval
from ..bootstrap import ratio_interval
from ..score import Score, from_interval
from .data import Data, Row
from .task import Answer, Generate, Item, Judgement, Task, by_group, mean

if TYPE_CHECKING:
    from ..results import ItemResult


class IfEval(Task):
    """The fraction of prompts with every instruction followed strictly. Also loosely, and by instruction.

    The task is meant for instruct models. A base model gets the prompt as text to continue, so its score
    means little.
    """

    source = "Zhou et al., arXiv 2311.07911"
    licence = "Apache-2.0"
    metric = "prompt_strict"

    def items(self, data: Data) -> list[Item]:
        needs = ("key", "prompt", "instruction_id_list", "kwargs")
        rows = data.rows("ifeval/en_input_data.jsonl", "ifeval/input_data.jsonl", needs=needs)
        return [self._item(row) for row in rows]

    def _item(self, row: Row) -> Item:
        prompt = row["prompt"]
        asked = ({"role": "user", "content": prompt},) if self.mode == "instruct" else prompt
        request = Generate(asked, max_tokens=1280)
        return Item(str(row["key"]), request, row["instruction_id_list"], doc={"kwargs": row["kwargs"]})

    def judge(self, item: Item, answer: Answer) -> Judgement:
        given = item.doc["kwargs"]
        strict, loose = (check(item.gold, answer.text, given) for check in (ifeval.strict, ifeval.loose))
        extracted = [[name, *both] for name, *both in zip(item.gold, strict, loose, strict=True)]
        broken = [name for name, kept in zip(item.gold, strict, strict=True) if not kept]
        metrics = {"prompt_loose": float(all(loose))}
        why = f"not followed: {', '.join(broken)}" if broken else ""
        return Judgement(float(all(strict)), extracted, metrics, why)

    def contradiction(self, item: Item) -> str:
        broken = ifeval.contradictions(item.gold, item.doc["kwargs"])
        return f"the prompt to be repeated word for word breaks {' and '.join(broken)}" if broken else ""

    def note(self, data: Data) -> str:
        impossible = [item.id for item in self.items(data) if self.contradiction(item)]
        said = f"no answer to {', '.join(impossible)} can be right, because they contradict themselves"
        return said if impossible else ""

    def scores(self, results: Sequence[ItemResult]) -> list[Score]:
        out = super().scores(results)
        for name, at in (("instruction_strict", 1), ("instruction_loose", 2)):
            kept = [float(sum(one[at] for one in result.extracted)) for result in results]
            asked = [float(len(result.extracted)) for result in results]
            out.append(from_interval(name, ratio_interval(kept, asked), "fraction", len(results)))
            if len(results) == 1:
                out[-1] = mean(name, [kept[0] / asked[0]])
        every = [one for result in results for one in result.extracted]
        out[0].detail["by_instruction"] = by_group(
            [one[0] for one in every], [float(one[1]) for one in every]
        )
        return out
