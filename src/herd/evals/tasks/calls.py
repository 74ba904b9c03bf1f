"""BFCL: function calls compared with the expected ones, without running them (`herd.evals.bfcl`)."""

from __future__ import annotations

import json
from itertools import chain, zip_longest
from typing import Any

from ...text.llama3_chat import TOOL_PROMPTS
from ...text.toolcall import parse
from ..bfcl import tool_schema, why_wrong
from .data import Data, Row
from .task import Answer, Generate, Item, Judgement, Task

CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance", "live_simple",
    "live_relevance",
)  # fmt: skip


class Bfcl(Task):
    """The task to call the right function with the right arguments, in the JSON format, grouped by category.

    It has the categories that need no execution: the Python ones, questions that no function fits (any call
    is wrong), and questions that some function fits (any call is right).
    """

    source = "Patil et al., Berkeley Function-Calling Leaderboard v4; ShishirPatil/gorilla"
    licence = "Apache-2.0"
    metric = "ast_accuracy"

    def items(self, data: Data) -> list[Item]:
        there = [category for category in CATEGORIES if data.find(f"bfcl/BFCL_v4_{category}.json")]
        parts = [self._category(data, category) for category in there or CATEGORIES[:1]]
        # so that the first items have all categories
        return [item for item in chain(*zip_longest(*parts)) if item]

    def note(self, data: Data) -> str:
        missing = [category for category in CATEGORIES if not data.find(f"bfcl/BFCL_v4_{category}.json")]
        return f"no data for {', '.join(missing)}" if missing else ""

    def judge(self, item: Item, answer: Answer) -> Judgement:
        parsed = parse(answer.text)
        calls = [[call.name, call.arguments] for call in parsed.calls]
        if item.group == "live_relevance":
            why = "" if calls else "no call"
        else:
            why = why_wrong(parsed.calls, item.doc["functions"], item.gold)
        return Judgement(float(not why), calls, why="; ".join([why, *parsed.errors])[:500] if why else "")

    def _category(self, data: Data, category: str) -> list[Item]:
        rows = data.rows(f"bfcl/BFCL_v4_{category}.json", needs=("id", "question", "function"))
        if category in ("irrelevance", "live_relevance"):
            return [self._item(row, category, []) for row in rows]
        answers = data.rows(f"bfcl/possible_answer/BFCL_v4_{category}.json", needs=("id", "ground_truth"))
        expected = {row["id"]: row["ground_truth"] for row in answers}
        return [self._item(row, category, expected[row["id"]]) for row in rows]

    def _item(self, row: Row, category: str, expected: list[dict[str, Any]]) -> Item:
        tools = tuple(tool_schema(function) for function in row["function"])
        messages = tuple(row["question"][0])
        prompt: Any = messages
        if self.mode == "base":
            listed = "\n\n".join(json.dumps(tool) for tool in tools)
            asked = "\n".join(message["content"] for message in messages)
            introduction, request_ = TOOL_PROMPTS["json_introduction"], TOOL_PROMPTS["json_request"]
            prompt, tools = f"{introduction}{listed}\n\n{request_}\n\n{asked}\n", ()
        stop = ("\n\n",) if self.mode == "base" else ()
        request = Generate(prompt, max_tokens=512, stop=stop, tools=tools)
        return Item(row["id"], request, expected, category, {"functions": row["function"]})
