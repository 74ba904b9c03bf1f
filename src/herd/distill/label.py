"""Let a teacher label rows of text: draw words from its prediction after every token, and store them.

The draws for a row depend only on the row, the teacher and the seed, so several processes can label different
shards, and a process that was killed continues with the same bits.

Shapes: B rows, T time, N trained tokens, V the student's vocabulary, S draws, E distinct draws of all tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.batch import IGNORE, Batch
from ..data.stream import Stream
from ..data.targets import TargetBlock, TargetsSpec, append_block, shard_path, unfinished_shard, write_spec
from ..errors import DataError
from ..llama.model import LlamaLM
from .vocab import VocabCut, fold
from .whole_rows import read_whole

CHUNK_BYTES = 128 << 20
"""Bytes of the float64 cumulative probabilities of the tokens that are drawn for at a time."""
SMALLEST = 1e-30
"""Probabilities below it are raised to it before their logarithm is taken."""
WAIT = 2.0
"""Seconds between looks at the shards that other processes are writing."""


def label(
    teacher: LlamaLM,
    stream: Stream,
    folder: Path,
    spec: TargetsSpec,
    cut: VocabCut | None = None,
    on_rows: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the targets of rows 0 to ``spec.n_rows`` of ``stream`` to ``folder``, or continue to.

    With ``cut``, the rows are in the trimmed vocabulary. ``on_rows`` is called with the number of rows that
    were finished. Shards that another process is writing are left to it, and waited for at the end. Raises
    `DataError` if the folder has other targets, and for a stream that does not have the rows.
    """
    if stream.n_rows < spec.n_rows:
        raise DataError(
            f"{folder}: the text has {stream.n_rows:,} rows of {spec.context} tokens, {spec.n_rows:,} are "
            "needed: give more text or fewer tokens"
        )
    write_spec(folder, spec)
    left = list(range(spec.n_shards))
    while left:
        for number in left:
            _label_shard(teacher, stream, folder, spec, number, cut, on_rows)
        left = [number for number in left if not shard_path(folder, number).exists()]
        if left:  # others write them, or have been killed meanwhile
            time.sleep(WAIT)


def _label_shard(
    teacher: LlamaLM,
    stream: Stream,
    folder: Path,
    spec: TargetsSpec,
    number: int,
    cut: VocabCut | None,
    on_rows: Callable[[int], None],
) -> None:
    """Write one shard, unless it is finished or in the hands of another process."""
    with unfinished_shard(folder, spec, number) as found:
        if found is None:
            return
        file, first = found
        rows = spec.rows_of_shard(number)
        on_rows(first - rows.start)
        for start in range(first, rows.stop, spec.block_rows):
            batch = stream.batch(start, min(spec.block_rows, rows.stop - start))
            append_block(file, spec, start, draw(teacher, batch, start, spec, cut))
            file.flush()
            on_rows(len(batch))


@torch.inference_mode()
def draw(
    teacher: LlamaLM, batch: Batch, first_row: int, spec: TargetsSpec, cut: VocabCut | None
) -> TargetBlock:
    """Return the teacher's draws for a batch of rows, the first of which has the number ``first_row``."""
    whole = read_whole(batch, cut)
    read = whole.batch.to(teacher.device)
    hidden_BTD = teacher(read.tokens_BT, read.positions_BT, read.attend)
    B, T = batch.tokens_BT.shape
    entropy_BT, n_words_BT = np.zeros((B, T), np.float32), np.zeros((B, T), np.int64)
    entries: list[tuple[Tensor, Tensor, Tensor]] = []
    for b in range(B):
        at_N = (batch.targets_BT[b] != IGNORE).nonzero().flatten()
        uniform_NS = torch.rand(
            len(at_N), spec.n_draws, dtype=torch.float64,
            generator=torch.Generator().manual_seed((spec.seed * 1_000_003 + first_row + b) % (1 << 63)),
        )  # fmt: skip
        chunk = max(1, CHUNK_BYTES // (8 * teacher.config.vocab_size))
        for at_n, uniform_nS in zip(at_N.split(chunk), uniform_NS.split(chunk), strict=True):
            source_n = whole.source_BT[b, at_n].to(teacher.device)
            p_nV = teacher.lm_head(hidden_BTD[b, source_n]).float().softmax(-1)
            if cut is not None:
                p_nV = fold(p_nV, cut, whole.begun_at(torch.stack((torch.full_like(at_n, b), at_n), 1)))
            # three times as fast as xlogy, which torch has not vectorized for CPUs
            entropy_n = -torch.linalg.vecdot(p_nV, p_nV.clamp(min=SMALLEST).log())
            ids, counts, log_p, n_words_n = sample(p_nV, uniform_nS.to(p_nV.device))
            entries.append((ids.cpu(), counts.cpu(), log_p.cpu()))
            entropy_BT[b, at_n], n_words_BT[b, at_n] = entropy_n.cpu(), n_words_n.cpu()
    ids_E, counts_E, log_p_E = (torch.cat(parts).numpy() for parts in zip(*entries, strict=True))
    documents_BT = torch.zeros_like(batch.tokens_BT) if batch.documents_BT is None else batch.documents_BT
    tokens, targets, documents = (x.numpy() for x in (batch.tokens_BT, batch.targets_BT, documents_BT))
    return TargetBlock(tokens, targets, documents, entropy_BT, n_words_BT, ids_E, counts_E, log_p_E)


def sample(p_nV: Tensor, uniform_nS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw from each distribution by inverting its cumulative sum.

    Return the distinct words that were drawn (ascending), the number of draws of each, its log-probability,
    and the number of distinct words of each token. The first three are (E,), for all tokens in order, and
    the last is (n,).
    """
    cumulative_nV = p_nV.double().cumsum(-1)
    drawn_nS = torch.searchsorted(cumulative_nV, uniform_nS * cumulative_nV[:, -1:], right=True)
    drawn_nS = drawn_nS.clamp_(max=p_nV.shape[1] - 1).sort(dim=1).values
    first_nS = torch.ones_like(drawn_nS, dtype=torch.bool)
    first_nS[:, 1:] = drawn_nS[:, 1:] != drawn_nS[:, :-1]
    starts_E = first_nS.flatten().nonzero().flatten()
    ends_E = torch.cat((starts_E[1:], starts_E.new_tensor([first_nS.numel()])))
    ids_E = drawn_nS.flatten()[starts_E]
    p_E = p_nV[starts_E // drawn_nS.shape[1], ids_E]
    return ids_E, ends_E - starts_E, p_E.clamp(min=SMALLEST).log(), first_nS.sum(1)
