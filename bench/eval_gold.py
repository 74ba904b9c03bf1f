"""Check that every benchmark reads all its items, and that every judge distinguishes right and wrong answers.

    HERD_TEST_DATA=../shared/data python bench/eval_gold.py      # two minutes

No model is needed: each task reads its whole data set, for base and instruct models. Gold answers given as a
model's output must score 100 %, wrong ones 0 %. Programs run in the sandbox: the 164 reference
solutions of HumanEval, the 500 of MBPP. Five of IFEval's 541 prompts contradict themselves: they must be
repeated word for word, but contain what they forbid (a comma or a word), so no text can satisfy both
(`ifeval.contradictions`). The bar is every item that can be satisfied. The receipt names the others.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common import DATA, bench_parser, exactly, save_receipt
from herd.evals.tasks import SUITES, Data, make_task
from herd.report.receipt import Value

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "evals"))
from gold import gold_answer

SUITES_OF_SETS = ("llama31", "base", "instruct", "tools")


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--tasks", help="Only these; no receipt.")
    args = parser.parse_args()
    data = Data(DATA)
    entries = [entry.task for suite in SUITES_OF_SETS for entry in SUITES.get(suite, ())]
    names = args.tasks.split(",") if args.tasks else list(dict.fromkeys(entries))
    values: dict[str, Value | tuple[Any, str]] = {}
    impossible: dict[str, str] = {}
    for name in names:
        for mode in ("base", "instruct"):
            n, without, right, wrong = counts(name, mode, data)
            impossible |= {f"{name} {item}": why for item, why in without.items()}
            print(
                f"{name} {mode}: {n} items, gold {right} right, wrong ones {wrong} right",
                *without,
                flush=True,
            )
            key, possible = f"{name}_{mode}", n - len(without)
            bar = f"{possible} of {n}" + (f", {len(without)} contradict themselves" if without else "")
            values[f"{key}_gold"] = exactly(possible, right, "items", shown=bar)
            values[f"{key}_wrong"] = exactly(0, wrong, "items")
    if args.tasks is None:
        save_receipt(
            "eval_gold",
            what="judges on all real items: gold answers accepted, wrong answers accepted",
            values=values,
            notes="no answer can be right: "
            + "; ".join(f"{item} ({why})" for item, why in impossible.items()),
        )


def counts(name: str, mode: Any, data: Data) -> tuple[int, dict[str, str], int, int]:
    """Return (items, impossible items and why, gold answers judged right, wrong answers judged right)."""
    task = make_task(name, mode=mode)
    items = task.items(data)
    right, wrong = (
        sum(j.value == 1 for j in task.judge_all([(item, gold_answer(task, item, good)) for item in items]))
        for good in (True, False)
    )
    return len(items), {item.id: why for item in items if (why := task.contradiction(item))}, right, wrong


if __name__ == "__main__":
    main()
