"""Held-out documents as batches of windows. Every token is scored once, with as much context as possible.

A document longer than the context is read in windows that overlap by a quarter, and a window scores only its
new tokens. Windows of similar length share a batch. Padding is at the end, so causal attention never sees it.

Shapes: B rows, T tokens, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.shards import Shards
from ..errors import DataError
from ..text.tokenizer import Tokenizer

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class HeldOut:
    """A document to score: its ids with beginning-of-text, without end-of-text, and its length in bytes."""

    ids: Sequence[int] | NDArray[np.int64]
    n_bytes: int
    lang: str = ""
    kind: str = ""


@dataclass(frozen=True)
class WindowScore:
    """A batch of windows to score.

    Targets of -100 are not scored. ``document_B`` is each row's document number.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    document_B: Tensor


def from_texts(documents: Iterable[Any], tokenizer: Tokenizer, max_bytes: int | None = None) -> list[HeldOut]:
    """Return held-out documents from strings, or from objects with ``text`` (and ``lang``, ``kind``).

    Stops after the document that reaches ``max_bytes`` of text. Empty texts are left out.
    """
    out: list[HeldOut] = []
    total = 0
    for document in documents:
        text = document if isinstance(document, str) else document.text
        n_bytes = len(text.encode())
        if not n_bytes:
            continue
        kind = {name: str(getattr(document, name, "") or "") for name in ("lang", "kind")}
        out.append(HeldOut([*tokenizer.prefix_ids, *tokenizer.encode(text)], n_bytes, **kind))
        total += n_bytes
        if max_bytes is not None and total >= max_bytes:
            break
    if not out:
        raise DataError("there is no held-out text to measure")
    return out


def from_shards(shards: Shards, tokenizer: Tokenizer, *, excerpt: int | None = None) -> list[HeldOut]:
    """Return the documents of held-out shards in a shuffled order.

    ``excerpt`` is the most tokens to take of each document, so that a few long ones do not dominate.
    """
    out: list[HeldOut] = []
    for number in np.random.default_rng(0).permutation(shards.n_documents).tolist():
        ids = shards.document(number)[:-1]  # without end-of-text
        n_bytes = int(shards.documents_D["n_bytes"][number])
        if excerpt is not None and len(ids) > excerpt + 1:
            ids = ids[: excerpt + 1]
            n_bytes = len(tokenizer.decode_bytes(ids[1:].tolist()))
        if not n_bytes:
            continue
        kind, _, lang = shards.label(number).partition("/")
        out.append(HeldOut(ids, n_bytes, lang, kind))
    if not out:
        raise DataError(f"{shards.folder}: there is no held-out text to measure")
    return out


def windows(
    documents: Sequence[HeldOut], context: int, device: torch.device | str = "cpu"
) -> Iterator[WindowScore]:
    """Yield batches of at most `BATCH_TOKENS` tokens (or one row), longest first, so memory peaks early."""
    cuts = [(d, *cut) for d, document in enumerate(documents) for cut in _cuts(len(document.ids), context)]
    cuts.sort(key=lambda cut: cut[2] - cut[1], reverse=True)
    while cuts:
        T = cuts[0][2] - cuts[0][1]
        batch, cuts = cuts[: max(1, BATCH_TOKENS // T)], cuts[max(1, BATCH_TOKENS // T) :]
        tokens_BT = torch.zeros(len(batch), T, dtype=torch.int64)
        targets_BT = torch.full((len(batch), T), -100)
        for b, (d, start, stop, first) in enumerate(batch):
            ids = torch.as_tensor(documents[d].ids[start : stop + 1])
            tokens_BT[b, : stop - start] = ids[:-1]
            targets_BT[b, first - start : stop - start] = ids[1 + first - start :]
        document_B = torch.tensor([cut[0] for cut in batch])
        yield WindowScore(tokens_BT.to(device), targets_BT.to(device), document_B)


def _cuts(n_ids: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, first): inputs start..stop-1 of a document, which are new from ``first`` on."""
    n, first = n_ids - 1, 0  # the last id is only a target
    while first < n:
        start = 0 if first == 0 else first - context // 4
        stop = min(start + context, n)
        yield start, stop, first
        first = stop
