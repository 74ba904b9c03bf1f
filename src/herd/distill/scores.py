"""Scores of the main models of a run, beside their loss: copying, looking up, and tasks of `herd eval`.

Distillation can cost a model its ability to look back (arXiv 2509.01649) while its loss improves, so copying
and looking up are measured on random tokens, of which no model knows anything. Tasks are zero-shot:
continuations are ranked as for base models, and questions that need a written answer are asked in the chat
format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.batch import IGNORE, Batch
from ..data.copying import CopyStream
from ..data.lookup import LookupStream
from ..errors import DataError
from ..evals.bootstrap import ratio_interval
from ..evals.harness import evaluate
from ..evals.local import CheckpointModel
from ..evals.tasks import Data, Mode, make_task
from ..evals.tasks.choice import ChoiceTask
from ..llama.model import LlamaLM
from ..text import Tokenizer
from .measure import Estimate, estimate

PROBE_ROWS = 24
PROBE_CONTEXT = 256
PROBE_SEED = 1 << 20
"""The rows are not those of a training that has copy rows with the seeds that people use."""


def probes(model: LlamaLM, tokenizer: Tokenizer) -> dict[str, Estimate]:
    """Return the fraction of tokens that a model copies and looks up rightly, with intervals over rows."""
    context = min(PROBE_CONTEXT, model.config.max_context)
    copies = CopyStream(tokenizer.n_ordinary, context, PROBE_SEED)
    facts = LookupStream(tokenizer, context, PROBE_SEED, levels=("pairs", "apart", "names"))
    return {
        "copying": _accuracy(model, [copies.batch(row, 1) for row in range(PROBE_ROWS)]),
        "look-up": _accuracy(model, [facts.batch(row, 1) for row in range(PROBE_ROWS)]),
    }


@torch.inference_mode()
def _accuracy(model: LlamaLM, batches: Sequence[Batch]) -> Estimate:
    hits, counts = [], []
    for batch in (batch.to(model.device) for batch in batches):
        trained_BT = batch.targets_BT != IGNORE
        first_N = model.lm_head(model(batch.tokens_BT)[trained_BT]).argmax(-1)
        hits.append(float((first_N == batch.targets_BT[trained_BT]).sum()))
        counts.append(float(trained_BT.sum()))
    return estimate(ratio_interval(hits, counts))


def task_scores(
    model: LlamaLM,
    tokenizer: Tokenizer,
    name: str,
    hash: str,
    tasks: Sequence[str],
    data: str | None,
    limit: int | None,
    out: Path,
) -> dict[str, Estimate]:
    """Return each task's score with its interval. ``out`` stores answers, so that none is asked twice."""
    found: dict[str, Estimate] = {}
    for task_name in tasks:
        ranked = isinstance(make_task(task_name), ChoiceTask)
        mode: Mode = "base" if ranked or tokenizer.chat is None else "instruct"
        task = make_task(task_name, 0, mode)
        opened = CheckpointModel(model, tokenizer, name=name, hash=hash, mode=mode)
        row = evaluate(opened, [task], open_data(data), out, limit=limit).tasks[0]
        if row.status != "done":
            raise DataError(f"--task {task_name}: {row.reason}")
        score = next((one for one in row.scores if one["name"] == task.metric), row.scores[0])
        found[task_name] = {key: score[key] for key in ("value", "lo", "hi")}
    return found


def open_data(folder: str | None) -> Data:
    """Return the items in a folder, or the built-in ones. Raises `DataError` if there is no such folder."""
    return Data() if folder is None else Data(Path(folder))
