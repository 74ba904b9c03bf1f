"""How near a model stayed to its parent, as a row of its evaluation: KL, same first choice, same distribution.

The texts are those of the task ``bpb_sentences`` (parallel sentences), so languages can be told apart. Which items of
other tasks flipped against the parent is what `compare` counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bootstrap import Interval, ratio_interval
from .fidelity import fidelity
from .local import LocalModel
from .results import ItemResult, TaskFile, TaskResult, digest, read_evaluation, write_summary
from .score import Score, from_interval, part
from .tasks import Data, make_task
from .windows import HeldOut

TASK, VERSION = "fidelity", "1"
PARTS = (("kl", "nats", "nats/token"), ("top1", "agree", "fraction"), ("overlap", "overlap", "fraction"))
"""(score, what is summed of every text, unit)."""


def measure_fidelity(
    parent: LocalModel, child: LocalModel, data: Data, out: Path, limit: int | None = None
) -> TaskResult:
    """Adds the row to the child's folder ``out``; texts measured before are not read again."""
    began = time.monotonic()
    items = make_task("bpb_sentences").items(data)
    chosen = items[:limit]
    settings = {"parent": parent.name, "parent_hash": parent.hash, "parent_precision": parent.precision}
    head: dict[str, Any] = {"schema": 1, "model": child.hash, "precision": child.precision, "task": TASK,
                            "version": VERSION, "settings": settings}  # fmt: skip
    path = out / f"{TASK}-{digest(head)[:8]}.jsonl"
    with TaskFile(path, head) as file:
        known = dict(file.done)
        waiting = [i for i in chosen if i.id not in known or known[i.id].digest != digest(i.request)]
        if waiting:
            texts = [item.doc["text"] for item in waiting]
            documents = [
                HeldOut(child.tokenizer.encode(text, bos=True), len(text.encode())) for text in texts
            ]
            found = fidelity(parent.model, child.model, documents)
            sums = zip(found.kl, found.agree, found.overlap, found.n_tokens, strict=True)
            file.add(
                [
                    ItemResult(
                        item.id,
                        float(kl / n),
                        None,
                        None,
                        None,
                        item.group,
                        {
                            "nats": float(kl),
                            "agree": float(agree),
                            "overlap": float(overlap),
                            "tokens": float(n),
                        },
                        digest=digest(item.request),
                    )
                    for item, (kl, agree, overlap, n) in zip(waiting, sums, strict=True)
                ]
            )
        results = [file.done[item.id] for item in chosen]
    row = TaskResult(
        TASK, "done", VERSION, settings, [score.record() for score in _scores(results)], note=f"against {parent.name}",
        n_items=len(chosen), n_total=len(items), seconds=time.monotonic() - began, file=path.name,
        ids=[item.id for item in chosen], data=data.label, source="Herd", licence=make_task("bpb_sentences").licence,
    )  # fmt: skip
    _add(out, child, row, data, limit)
    return row


def _scores(results: Sequence[ItemResult]) -> list[Score]:
    groups = {
        group: [r for r in results if r.group == group] for group in dict.fromkeys(r.group for r in results)
    }
    out = []
    for name, top, unit in PARTS:
        parts = {group: part(_ratio(some, top), len(some)) for group, some in groups.items()}
        out.append(from_interval(name, _ratio(results, top), unit, len(results), {"by_group": parts}))
    return out


def _ratio(results: Sequence[ItemResult], top: str) -> Interval:
    return ratio_interval([r.metrics[top] for r in results], [r.metrics["tokens"] for r in results])


def _add(out: Path, child: LocalModel, row: TaskResult, data: Data, limit: int | None) -> None:
    """The row in summary.json, in place of an earlier one against the same parent."""
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
        about = {
            k: v for k, v in evaluation.summary.items() if k not in ("schema", "model", "model_hash", "tasks")
        }
    write_summary(out, child.name, child.hash, [*rows, row], **about)
