"""The fidelity of a model to its parent, as a row of its evaluation.

The texts are the parallel sentences of the task ``bpb_sentences``, so that there is a result per language.
`compare` counts the items of other tasks that changed from right to wrong, or back, compared with the parent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .fidelity import fidelity
from .local import CheckpointModel
from .results import ItemResult, TaskFile, TaskResult, digest, read_evaluation, results_file, write_summary
from .tasks import Data, Item, make_task
from .tasks.task import grouped_ratio
from .windows import HeldOut

TASK, VERSION = "fidelity", "1"
PARTS = (("kl", "nats", "nats/token"), ("top1", "agree", "fraction"), ("overlap", "overlap", "fraction"))
"""Triples (name of the score, metric of the texts that is summed, unit)."""


def measure_fidelity(
    parent: CheckpointModel, child: CheckpointModel, data: Data, out: Path, limit: int | None = None
) -> TaskResult:
    """Add the row to the child's folder ``out`` and return it.

    Texts with stored results are not scored again.
    """
    began = time.monotonic()
    task = make_task("bpb_sentences")
    items = task.items(data)
    chosen = items[:limit]
    settings = {"parent": parent.name, "parent_hash": parent.hash, "parent_precision": parent.precision}
    head: dict[str, Any] = {"schema": 1, "model": child.hash, "precision": child.precision, "task": TASK,
                            "version": VERSION, "settings": settings}  # fmt: skip
    path = results_file(out, TASK, head)
    with TaskFile(path, head) as file:
        known = dict(file.done)
        waiting = [i for i in chosen if i.id not in known or known[i.id].digest != digest(i.request)]
        if waiting:
            file.add(_measure(parent, child, waiting))
        results = [file.done[item.id] for item in chosen]
    scores = [grouped_ratio(name, unit, results, top, "tokens").record() for name, top, unit in PARTS]
    row = TaskResult(
        TASK, "done", VERSION, settings, scores, note=f"against {parent.name}", n_items=len(chosen),
        n_total=len(items), seconds=time.monotonic() - began, file=path.name,
        ids=[item.id for item in chosen], data=data.label, source="Herd", licence=task.licence,
    )  # fmt: skip
    _add(out, child, row, data, limit)
    return row


def _measure(parent: CheckpointModel, child: CheckpointModel, items: Sequence[Item]) -> list[ItemResult]:
    texts = [item.doc["text"] for item in items]
    documents = [HeldOut(child.tokenizer.encode(text, bos=True), len(text.encode())) for text in texts]
    found = fidelity(parent.model, child.model, documents)
    sums = np.stack((found.kl, found.agree, found.overlap, found.n_tokens), axis=1).tolist()
    metrics = [dict(zip(("nats", "agree", "overlap", "tokens"), row, strict=True)) for row in sums]
    return [
        ItemResult(i.id, m["nats"] / m["tokens"], None, None, None, i.group, m, digest=digest(i.request))
        for i, m in zip(items, metrics, strict=True)
    ]


def _add(out: Path, child: CheckpointModel, row: TaskResult, data: Data, limit: int | None) -> None:
    """Write the row into summary.json, in place of an earlier row for the same parent."""
    about: dict[str, Any] = {
        "mode": child.mode,
        "data": data.label,
        "limit": limit,
        "precision": child.precision,
    }
    rows: list[TaskResult] = []
    if (out / "summary.json").is_file():
        evaluation = read_evaluation(out)
        rows = [r for r in evaluation.tasks if (r.task, r.settings) != (row.task, row.settings)]
        own = ("schema", "model", "model_hash", "tasks")
        about = {name: value for name, value in evaluation.summary.items() if name not in own}
    write_summary(out, child.name, child.hash, [*rows, row], **about)
