"""Open one checkpoint in Herd and in EleutherAI's lm-eval, and compare what both decide on the same items."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from common import DATA, ROOT
from herd import checkpoint
from herd.evals.local import CheckpointModel
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.report.receipt import package_version
from herd.text.tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "tests" / "evals"))
import lmeval_oracle as oracle

__all__ = ["RIVALS", "TIE", "compare_likelihoods", "judged_alike", "open_both", "oracle", "random_folder"]

RIVALS = {name: package_version(name) or "" for name in ("lm-eval", "transformers")}
TIE = 1e-4
"""Two choices whose log-likelihoods differ by less are a tie that rounding decides, in nats."""


def random_folder(folder: Path, config: ModelConfig, std: float | None = None) -> Path:
    """Return the folder of a random model with Meta's tokenizer, making it if it is missing."""
    if not folder.exists():
        model = LlamaLM(config).init_weights(0, **({} if std is None else {"std": std}))
        tokenizer = Tokenizer.from_file(DATA / "llama3_tokenizer" / "tokenizer.model")
        lineage = checkpoint.Lineage(name=folder.name, stage="lm")
        checkpoint.save_model(folder, model, tokenizer, lineage=lineage)
    return folder


def open_both(folder: Path, batch: int = 1) -> tuple[CheckpointModel, Any]:
    """Open the same files in fp32 in Herd and in lm-eval's transformers model."""
    from lm_eval.models.huggingface import HFLM

    model = checkpoint.load_model(folder, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = checkpoint.load_tokenizer(folder)
    assert tokenizer is not None
    ours = CheckpointModel(
        model, tokenizer, name=folder.name, hash=checkpoint.checkpoint_hash(folder), max_batch=8
    )
    return ours, HFLM(
        pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch, max_length=8192
    )


def judged_alike(task: Any, herd: Any, item: Any, answer: Any, doc: Any, said: Sequence[Any]) -> bool:
    """Return whether Herd's judge gives every metric of lm-eval's task the same value."""
    judged = herd.judge(item, answer)
    found = {herd.metric: judged.value, **judged.metrics}
    return all(found[metric] == value for metric, value in task.process_results(doc, said).items())


def compare_likelihoods(
    result: dict[str, Any], task: Any, herd: Any, items: list, ours: CheckpointModel, theirs: Any
) -> None:
    """Add the items of a task of choices to ``result``: how many are decided alike, and how far apart."""
    said: dict[int, list[tuple[float, bool]]] = {}
    answers = theirs.loglikelihood(task.instances, disable_tqdm=True)
    for instance, answer in zip(task.instances, answers, strict=True):
        said.setdefault(instance.doc_id, []).append(answer)
    docs = task.test_docs()
    for number, answer in ours.answer([item.request for item in items]):
        item, mine = items[number], answer.likelihoods
        same = judged_alike(task, herd, item, answer, docs[number], said[number])
        nats = [nats for nats, _ in said[number]]
        first, second = sorted(nats, reverse=True)[:2]
        result["items"] += 1
        result["same"] += same
        result["ties"] += not same and first - second < TIE
        result["nats"] = max(result["nats"], *(abs(a.nats - b) for a, b in zip(mine, nats, strict=True)))
        result["greedy"] += sum(a.greedy != bool(b) for a, (_, b) in zip(mine, said[number], strict=True))
        if not same:
            result["examples"].append({"id": item.id, "ours": [a.nats for a in mine], "theirs": nats})
