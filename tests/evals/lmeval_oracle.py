"""EleutherAI's lm-eval with its own task files on local data: the same prompts, requests and judgements, offline.

Only where the rows come from is replaced, and the shots are drawn by lm-eval's ``first_n`` sampler, as Herd does.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from herd.evals.tasks import Data, Item, Task, make_task
from herd.evals.tasks.mmlu import SUBJECTS

FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "human_eval": "humaneval/humaneval.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "mbpp": "mbpp/mbpp.yaml",
}
LEAK = (
    "boolq", "gsm8k", "hellaswag", "human_eval", "mmlu_humanities", "mmlu_other", "mmlu_social_sciences", "mmlu_stem",
    "openbookqa", "piqa", "social_iqa", "truthfulqa_mc1", "winogrande",
)  # fmt: skip


def pairs(
    name: str, folder: Path, limit: int, shots: int | None = None
) -> Iterator[tuple[ConfigurableTask, Task, list[Item]]]:
    """(lm-eval's task, Herd's, Herd's items in lm-eval's order), one for each subject of a group of MMLU."""
    data = Data(folder)
    herd = make_task(name, shots)
    items = herd.items(data)[:limit]
    if name.removeprefix("mmlu_") not in SUBJECTS:
        yield oracle(name, folder, len(items), shots), herd, items
        return
    for subject in SUBJECTS[name.removeprefix("mmlu_")]:
        of_subject = [item for item in items if item.group == subject]
        if of_subject:
            herd = make_task(f"mmlu_{subject}", shots)
            yield oracle(f"mmlu_{subject}", folder, len(of_subject), shots), herd, of_subject


def oracle(name: str, folder: Path, limit: int, shots: int | None = None) -> ConfigurableTask:
    """lm-eval's task with its prompts, on the first ``limit`` rows of local data."""
    root = Path(lm_eval_tasks.__file__).parent
    file = FILES.get(name, f"mmlu/default/{name}.yaml")
    code = name in ("human_eval", "mbpp")  # their functions fetch from the network when they are imported
    config = load_yaml(root / file, resolve_func=not code)
    tests, examples = rows(name, folder)
    shots = make_task(name).shots if shots is None else shots
    config |= {
        "custom_dataset": lambda **_: DatasetDict(
            {"test": Dataset.from_list(tests), "dev": Dataset.from_list(examples or tests[: shots + 1])}
        ),
        "dataset_path": None,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "dev" if examples else "test",
        "fewshot_config": {"sampler": "first_n"},
        "process_docs": None,  # hellaswag's local rows are processed already
        "num_fewshot": 0 if name == "truthfulqa_mc1" else shots,
        "metadata": {},
    }
    if code:
        config |= {"metric_list": [{"metric": "bypass"}], "filter_list": None, "unsafe_code": False}
    task = ConfigurableTask(config=config)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task


def rows(name: str, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(test rows, training rows or none) in the form of the Hub's data set."""
    data = Data(folder)
    if name == "boolq":
        return [row | {"label": int(row["answer"])} for row in data.rows("boolq/validation.jsonl")], []
    if name == "gsm8k":
        return data.rows("gsm8k/test.jsonl"), data.rows("gsm8k/train.head1500.jsonl")
    if name == "hellaswag":
        lines = data.text("hellaswag/hellaswag_val_full.txt").splitlines()
        blocks = [lines[i : i + 6] for i in range(0, len(lines) - 5, 6)]
        return [{"query": block[0], "label": int(block[1]), "choices": block[2:]} for block in blocks], []
    if name == "human_eval":
        return data.rows("humaneval/HumanEval.jsonl"), []
    if name == "mbpp":
        every = data.rows("mbpp/mbpp.jsonl")
        for row in every:
            row["challenge_test_list"] = [str(test) for test in row.get("challenge_test_list", [])]
        shots = [row | {"is_fewshot": True} for row in every if row["task_id"] in (2, 3, 4)]
        return [row for row in every if 11 <= row["task_id"] <= 510], shots
    if name == "openbookqa":
        return data.rows("openbookqa/test.jsonl", "openbookqa/validation.jsonl"), []
    if name == "piqa":
        labels = data.text("piqa/valid-labels.lst").split()
        return [
            row | {"label": int(l)} for row, l in zip(data.rows("piqa/valid.jsonl"), labels, strict=True)
        ], []
    if name == "social_iqa":
        return data.rows("social_iqa/validation.jsonl"), []
    if name == "truthfulqa_mc1":
        out = []
        for row in data.table("truthfulqa/TruthfulQA.csv"):
            wrong = [answer.strip() for answer in row["Incorrect Answers"].split(";") if answer.strip()]
            choices = [row["Best Answer"].strip(), *wrong]
            out.append(
                {
                    "question": row["Question"],
                    "mc1_targets": {"choices": choices, "labels": [1, *[0] * len(wrong)]},
                }
            )
        return out, []
    if name == "winogrande":
        return data.rows("winogrande/validation.jsonl"), []
    if name.startswith("arc_"):
        level = name.removeprefix("arc_")
        flat = data.rows(f"arc/arc_{level}.jsonl")
        labels = [[*"ABCDE"][: len(row["choices"])] for row in flat]
        tests = [
            {
                "question": row["query"].removeprefix("Question: "),
                "choices": {"text": row["choices"], "label": label},
                "answerKey": label[row["gold"]],
            }
            for row, label in zip(flat, labels, strict=True)
        ]
        return tests, data.rows(f"arc/{level}_validation.jsonl")
    subject = name.removeprefix("mmlu_")
    test, dev = (_mmlu(folder, split) for split in ("test", "dev"))
    return test[subject], dev[subject]


@lru_cache
def _mmlu(folder: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a file by subject."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in Data(folder).rows(f"mmlu/{split}.jsonl"):
        out.setdefault(row["subject"], []).append(row)
    return out


def instances(task: ConfigurableTask) -> dict[int, list[Any]]:
    """lm-eval's requests by document."""
    out: dict[int, list[Any]] = {}
    for instance in task.instances:
        out.setdefault(instance.doc_id, []).append(instance)
    return out
