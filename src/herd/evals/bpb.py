"""Bits per byte on held-out text, a measure of how well a model predicts text that it has never seen.

Unlike loss per token, bits per byte can be compared between tokenizers (The Pile, arXiv 2101.00027, section
3.1). Sums are stored for every document, so that intervals and comparisons can resample documents.

Shapes: B rows, T tokens, N scored tokens, C tokens of a chunk, D model dim, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..kernels.softmax import cross_entropy_
from ..llama.model import LlamaLM
from .bootstrap import paired_difference, ratio_interval
from .score import Score, from_interval, part
from .windows import HeldOut, windows

CHUNK_BYTES = 64 << 20  # of logits in memory at a time


@dataclass(frozen=True)
class Compression:
    """The ``bits`` that a model needs for each document, with the document's ``n_bytes`` and ``n_tokens``."""

    bits: NDArray[np.float64]
    n_bytes: NDArray[np.float64]
    n_tokens: NDArray[np.float64]
    lang: list[str]
    kind: list[str]

    def score(self, seed: int = 0) -> Score:
        """Return bits per byte over all documents, with breakdowns by language and kind if known."""
        detail: dict[str, Any] = {
            "nats_per_token": float(self.bits.sum() * math.log(2) / self.n_tokens.sum())
        }
        for name, labels in (("by_lang", self.lang), ("by_kind", self.kind)):
            if any(labels):
                detail[name] = {
                    label: self._part(labels, label, seed) for label in dict.fromkeys(labels) if label
                }
        interval = ratio_interval(self.bits, self.n_bytes, seed=seed)
        return from_interval("bpb", interval, "bits/byte", len(self.bits), detail)

    def _part(self, labels: list[str], label: str, seed: int) -> dict[str, Any]:
        chosen = np.array([other == label for other in labels])
        return part(ratio_interval(self.bits[chosen], self.n_bytes[chosen], seed=seed), int(chosen.sum()))


@torch.inference_mode()
def compression(model: LlamaLM, documents: Sequence[HeldOut], context: int | None = None) -> Compression:
    """Score every document.

    ``context`` defaults to the model's. Raises `DataError` if there is nothing to score.
    """
    if not any(len(document.ids) > 1 for document in documents):
        raise DataError("no held-out document has a token to predict")
    nats = torch.zeros(len(documents), dtype=torch.float64)
    counts = torch.zeros(len(documents), dtype=torch.float64)
    for batch in windows(documents, context or model.config.max_context, model.device):
        hidden_BTD = model(batch.tokens_BT)
        scored_BT = batch.targets_BT != -100
        nll_N = token_nll(model, hidden_BTD[scored_BT], batch.targets_BT[scored_BT]).double().cpu()
        owner_N = batch.document_B[:, None].expand(scored_BT.shape)[scored_BT.cpu()]
        nats.index_add_(0, owner_N, nll_N)
        counts.index_add_(0, owner_N, torch.ones_like(nll_N))
    return Compression(
        (nats / math.log(2)).numpy(),
        np.array([document.n_bytes for document in documents], dtype=np.float64),
        counts.numpy(),
        [document.lang for document in documents],
        [document.kind for document in documents],
    )


def compare_compression(name: str, a: Compression, b: Compression, seed: int = 0) -> Score:
    """Return bits per byte of ``a`` minus ``b`` on the same documents. If it is negative, ``a`` is better."""
    if not np.array_equal(a.n_bytes, b.n_bytes):
        raise DataError("two models can only be compared on the same held-out documents")
    interval = paired_difference(a.bits, b.bits, a.n_bytes, seed=seed)
    return from_interval(name, interval, "bits/byte", len(a.bits))


def token_nll(model: LlamaLM, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return -log p of each target in nats: (N,) fp32. Logits are computed for one chunk at a time."""
    chunks = zip(hidden_ND.split(chunk_tokens(model)), targets_N.split(chunk_tokens(model)), strict=True)
    losses = [cross_entropy_(model.lm_head(h_CD).float(), t_C, with_gradient=False) for h_CD, t_C in chunks]
    return torch.cat(losses) if losses else hidden_ND.new_zeros(0, dtype=torch.float32)


def chunk_tokens(model: LlamaLM) -> int:
    """Return the number of tokens whose fp32 logits take `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
