"""Measure students against their teacher on held-out text: bits per byte, KL divergence, next-token accuracy.

A student with a trimmed vocabulary is compared in its own tokens. The teacher reads the text in its tokens,
and its predictions are divided among the student's (`vocab.py`). Bits per byte do not depend on the tokens.
Each model has them in its own, so they decide between students of different vocabularies.

The teacher runs once per vocabulary. Its final hidden states are kept on disk, in fp16, and only its head is
applied again for each student. An interrupted run continues with the batch it was at.

Shapes: B rows, T time, D model dim, N scored tokens, C tokens of a chunk, V the teacher's vocabulary, W the
student's.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import IGNORE, Batch
from ..errors import DataError, TrainingError
from ..evals.bootstrap import Interval, paired_difference, ratio_interval
from ..evals.windows import HeldOut, WindowScore, windows
from ..files import write_atomically
from ..llama.model import LlamaLM
from .vocab import TINY, VocabCut, fold
from .whole_rows import WholeRows, read_whole

CHUNK = 256
"""Tokens whose logits of both models are in memory at a time."""

Estimate = dict[str, float | None]
"""``value``, ``lo`` and ``hi`` of a 95 % interval. The last two are None if there is none."""


@dataclass(frozen=True)
class Quality:
    """Sums over the scored tokens of each document, as lists of one number per document.

    ``bits`` and ``n_bytes`` give bits per byte. ``kl`` is KL(teacher || student) in nats. ``agree`` counts
    equal first choices. ``hits`` and ``teacher_hits`` count first choices that are the next token.
    """

    bits: list[float]
    n_bytes: list[float]
    n_tokens: list[float]
    kl: list[float]
    agree: list[float]
    hits: list[float]
    teacher_hits: list[float]

    def summary(self) -> dict[str, Estimate]:
        """Return each measure with its 95 % interval over documents."""
        kept = Interval(sum(self.hits) / max(1.0, sum(self.teacher_hits)), math.nan, math.nan)
        if sum(self.teacher_hits) and len(self.hits) > 1:
            kept = ratio_interval(self.hits, self.teacher_hits)
        return {
            "bits_per_byte": estimate(ratio_interval(self.bits, self.n_bytes)),
            "kl": estimate(ratio_interval(self.kl, self.n_tokens)),
            "accuracy": estimate(ratio_interval(self.hits, self.n_tokens)),
            "accuracy_kept": estimate(kept),
            "same_choice": estimate(ratio_interval(self.agree, self.n_tokens)),
        }

    def record(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return asdict(self)


def difference(a: Quality, b: Quality) -> Estimate:
    """Return bits per byte of ``a`` minus ``b`` on the same documents: negative if ``a`` is better."""
    if a.n_bytes != b.n_bytes:
        raise DataError("two students can only be compared on the same held-out documents")
    return estimate(paired_difference(a.bits, b.bits, a.n_bytes))


class StudentEvaluator:
    """A teacher's predictions of held-out text in one vocabulary, to measure students with.

    ``documents`` are in that vocabulary. Without ``cut`` it is the teacher's own. ``compute`` is the dtype of
    the matmuls of students and teacher. ``folder`` keeps the teacher's hidden states of these documents.
    ``on_batch`` is called with the number of batches that a model has read, and of all.
    """

    def __init__(
        self,
        teacher: LlamaLM,
        documents: Sequence[HeldOut],
        cut: VocabCut | None,
        context: int,
        compute: torch.dtype,
        folder: Path,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.teacher, self.cut, self.context, self.compute = teacher, cut, context, compute
        self.documents = documents
        self.on_batch = on_batch
        self._files = [folder / f"teacher-{number:04d}.npy" for number, _ in enumerate(self._batches())]
        self._read_by_teacher()

    def measure(self, student: LlamaLM | None) -> Quality:
        """Return the quality of a student, or with None of the teacher itself."""
        sums = torch.zeros(6, len(self.documents), dtype=torch.float64)
        for number, batch in enumerate(self._batches()):
            theirs_ND = torch.from_numpy(np.load(self._files[number])).to(self.teacher.device)
            ours_ND = (
                theirs_ND if student is None else self._hidden(student, batch, read_whole(rows(batch), None))
            )
            self.on_batch(number + 1, len(self._files))
            scored_BT = batch.targets_BT != IGNORE
            begun = (
                () if self.cut is None else read_whole(rows(batch), self.cut).begun_at(scored_BT.nonzero())
            )
            owner_N = batch.document_B[:, None].expand(scored_BT.shape)[scored_BT]
            targets_N = batch.targets_BT[scored_BT]
            for chunk in torch.arange(len(owner_N)).split(CHUNK):
                log_p_CW = self._teacher_log_probabilities(theirs_ND[chunk], begun[chunk[0] : chunk[-1] + 1])
                values = self._compare(log_p_CW, ours_ND[chunk], student, targets_N[chunk])
                sums.index_add_(1, owner_N[chunk], values.double().cpu())
        if not bool(sums.isfinite().all()):
            raise TrainingError(
                "the student's predictions of held-out text are not finite: start again with a lower --lr "
                "and another --out"
            )
        bits, kl, agree, hits, teacher_hits, n_tokens = sums.tolist()
        n_bytes = [float(document.n_bytes) for document in self.documents]
        return Quality(bits, n_bytes, n_tokens, kl, agree, hits, teacher_hits)

    def _batches(self) -> Iterator[WindowScore]:
        return windows(self.documents, self.context)

    def _read_by_teacher(self) -> None:
        """Write the teacher's hidden states of the batches that are not on disk."""
        for number, (batch, path) in enumerate(zip(self._batches(), self._files, strict=True)):
            if not path.exists():
                found_ND = self._hidden(self.teacher, batch, read_whole(rows(batch), self.cut))
                file = io.BytesIO()
                np.save(file, found_ND.half().cpu().numpy())
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, file.getvalue())
            self.on_batch(number + 1, len(self._files))

    @torch.inference_mode()
    def _hidden(self, model: LlamaLM, batch: WindowScore, read: WholeRows) -> Tensor:
        """Return the hidden states (N, D) that predict the scored tokens of a batch."""
        b_N, t_N = (batch.targets_BT != IGNORE).nonzero().T
        with autocast(model, self.compute):
            hidden_BTD = model(read.batch.tokens_BT.to(model.device))
        return hidden_BTD[b_N, read.source_BT[b_N, t_N]]

    @torch.inference_mode()
    def _teacher_log_probabilities(self, hidden_CD: Tensor, begun: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the teacher's log-probabilities in the student's vocabulary, (C, W)."""
        log_p_CV = self._logits(self.teacher, hidden_CD).log_softmax(-1)
        if self.cut is None:
            return log_p_CV
        return fold(log_p_CV.exp(), self.cut, begun).clamp(min=TINY).log()

    @torch.inference_mode()
    def _compare(
        self, log_p_CW: Tensor, ours_CD: Tensor, student: LlamaLM | None, targets_C: Tensor
    ) -> Tensor:
        """Return (6, C): bits, KL, equal choice, right choice, teacher's right choice and 1 per token."""
        targets_C = targets_C.to(log_p_CW.device)
        log_q_CW = log_p_CW if student is None else self._logits(student, ours_CD).log_softmax(-1)
        nll_C = -log_q_CW.gather(1, targets_C[:, None])[:, 0]
        kl_C = (log_p_CW.exp() * (log_p_CW - log_q_CW)).sum(-1).clamp(min=0)
        first_C, teachers_C = log_q_CW.argmax(-1), log_p_CW.argmax(-1)
        values = (
            nll_C / math.log(2),
            kl_C,
            first_C == teachers_C,
            first_C == targets_C,
            teachers_C == targets_C,
        )
        return torch.stack([*(value.float() for value in values), torch.ones_like(nll_C)])

    def _logits(self, model: LlamaLM, hidden_CD: Tensor) -> Tensor:
        with autocast(model, self.compute):
            return model.lm_head(hidden_CD.to(model.dtype)).float()


def rows(batch: WindowScore) -> Batch:
    """Return the rows of a batch of windows, their padding as a document of its own."""
    scored_BT = batch.targets_BT != IGNORE
    padding_BT = scored_BT.flip(1).cumsum(1).flip(1) == 0
    return Batch(batch.tokens_BT, batch.targets_BT, documents_BT=padding_BT.long())


def autocast(model: LlamaLM, compute: torch.dtype) -> Any:
    """Compute matmuls in ``compute`` if the weights have another dtype."""
    if compute == torch.float32 or model.dtype == compute:
        return nullcontext()
    return torch.autocast(model.device.type, compute)


def estimate(interval: Interval) -> Estimate:
    """Return a value with its interval as JSON values."""
    bounds = [None if math.isnan(bound) else bound for bound in interval[1:]]
    return {"value": interval.value, "lo": bounds[0], "hi": bounds[1]}
