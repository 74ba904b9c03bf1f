"""Labelling against float64: what is drawn, its probability and entropy. Resuming changes no bit."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from test_vocab import make_cut

from herd.data.batch import IGNORE, Batch
from herd.data.targets import Targets, TargetsSpec
from herd.distill import label as module
from herd.distill.label import draw, label, sample
from herd.distill.vocab import VocabCut, fold
from herd.distill.whole_rows import read_whole
from herd.errors import DataError
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM

CONFIG = ModelConfig(vocab_size=576, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24)
SPEC = TargetsSpec(
    "t", "d", "m", vocab_size=576, context=9, n_rows=10, n_draws=40, block_rows=2, shard_rows=4
)


class Rows:
    """Random rows: the second half of each is a document of its own, and some targets are masked."""

    context, packed = 9, True

    def __init__(self, vocab: int = 576, n_rows: int = 10) -> None:
        self.vocab, self.n_rows = vocab, n_rows

    def batch(self, position: int, count: int) -> Batch:
        rows = [
            torch.randint(0, self.vocab, (10,), generator=torch.Generator().manual_seed(position + b))
            for b in range(count)
        ]
        tokens = torch.stack(rows)
        targets = tokens[:, 1:].clone()
        targets[:, ::4] = IGNORE
        positions = torch.cat((torch.arange(4), torch.arange(5))).expand(count, 9)
        documents = (torch.arange(9) >= 4).long().expand(count, 9)
        return Batch(tokens[:, :-1], targets, positions, documents)


def teacher() -> LlamaLM:
    return LlamaLM(CONFIG).init_weights(0, std=0.4).eval()


def exact(batch: Batch, cut: VocabCut | None) -> torch.Tensor:
    model = teacher().double()
    whole = read_whole(batch, cut)
    with torch.no_grad():
        p = model.lm_head(model(whole.batch.tokens_BT, whole.batch.positions_BT, whole.batch.attend)).softmax(
            -1
        )
    places = torch.cartesian_prod(*map(torch.arange, batch.tokens_BT.shape))
    p = p[places[:, 0], whole.source_BT.flatten()]
    return p if cut is None else fold(p, cut, whole.begun_at(places))


@pytest.mark.parametrize("trimmed", [False, True])
def test_probabilities_and_entropy_are_the_teachers_and_the_counts_add_up(trimmed):
    cut = make_cut() if trimmed else None
    spec = TargetsSpec(**{**vars(SPEC), "vocab_size": 530 if trimmed else 576})
    batch = Rows(spec.vocab_size).batch(0, 3)
    block = draw(teacher(), batch, 0, spec, cut)
    p = exact(batch, cut)
    at = 0
    for n, words in enumerate(block.n_words.flatten()):
        masked = batch.targets_BT.flatten()[n] == IGNORE
        assert (words == 0) == masked
        entries = slice(at, at + int(words))
        at += int(words)
        if masked:
            continue
        assert block.counts[entries].sum() == 40
        assert len(set(block.ids[entries].tolist())) == words
        np.testing.assert_allclose(block.log_p[entries], p[n, block.ids[entries]].log(), atol=1e-4)
        entropy = -(p[n] * p[n].log()).sum()
        assert block.entropy.flatten()[n] == pytest.approx(float(entropy), abs=1e-4)
    assert at == len(block.ids)


def test_draws_follow_the_distribution():
    """Pearson's chi-squared statistic of a million draws, against its 99.99 % quantile."""
    p = torch.softmax(torch.randn(1, 30, generator=torch.Generator().manual_seed(5)), -1)
    p[0, 3] = 0
    p /= p.sum()
    draws = 1_000_000
    ids, counts, log_p, n_words = sample(
        p, torch.rand(1, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    assert counts.sum() == draws
    assert int(n_words) == len(ids) == 29
    assert 3 not in ids
    expected = p[0, ids].double() * draws
    assert ((counts - expected) ** 2 / expected).sum() < 63.2  # scipy.stats.chi2(28).ppf(0.9999)
    torch.testing.assert_close(log_p, p[0, ids].log())


def test_any_number_of_interruptions_gives_the_same_bytes(tmp_path):
    label(teacher(), Rows(), tmp_path / "whole", SPEC)
    seen = 0

    def stop(n: int) -> None:
        nonlocal seen
        seen += n
        if seen in (2, 6, 10):
            seen += 1
            raise KeyboardInterrupt

    for _ in range(10):
        try:
            label(teacher(), Rows(), tmp_path / "cut", SPEC, on_rows=stop)
            break
        except KeyboardInterrupt:
            pass
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert Targets(tmp_path / "cut").spec == SPEC


KILLED = """
import sys, time
sys.path.insert(0, {folder!r})
from test_label import *
spec = TargetsSpec(**{{**vars(SPEC), "n_rows": 4000}})
label(teacher(), Rows(n_rows=4000), __import__("pathlib").Path({out!r}), spec)
"""


def test_kill_9_while_labelling(tmp_path):
    from pathlib import Path

    out = tmp_path / "killed"
    script = KILLED.format(folder=str(Path(__file__).parent), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script])
    while not any(out.glob("shard-0000[1-9].part")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    spec = TargetsSpec(**{**vars(SPEC), "n_rows": 40})
    finished = sorted(path.name for path in out.glob("*.bin"))
    assert finished
    label(teacher(), Rows(n_rows=40), tmp_path / "whole", spec)
    for name in finished[:5]:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_share_the_shards_and_both_wait_for_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.05)
    folder = tmp_path / "shared"
    counts = [0, 0]

    def work(n: int) -> None:
        def add(rows: int) -> None:
            counts[n] += rows

        label(teacher(), Rows(n_rows=40), folder, TargetsSpec(**{**vars(SPEC), "n_rows": 40}), on_rows=add)
        Targets(folder)  # finished for both

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 40
    label(teacher(), Rows(n_rows=40), tmp_path / "one", TargetsSpec(**{**vars(SPEC), "n_rows": 40}))
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()


def test_too_little_text_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="9 rows"):
        label(teacher(), Rows(n_rows=9), tmp_path / "t", SPEC)
    assert not (tmp_path / "t").exists()
