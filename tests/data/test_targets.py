"""Targets on disk: what was drawn is what is read, whatever happened to the writer."""

import numpy as np
import pytest
import torch

from herd.data import targets as module
from herd.data.batch import IGNORE, Batch
from herd.data.targets import (
    Targets,
    TargetsSpec,
    TargetStream,
    append_block,
    shard_path,
    unfinished_shard,
    write_spec,
)
from herd.errors import DataError

SPEC = TargetsSpec(tokenizer="t", data="d", teacher="m", vocab_size=97, context=7, n_rows=11, n_draws=5,
                   block_rows=2, shard_rows=6)  # fmt: skip


def random_block(first: int, rows: int) -> module.TargetBlock:
    rng = np.random.default_rng(first)
    targets = rng.integers(0, 97, (rows, 7))
    targets[rng.random((rows, 7)) < 0.3] = IGNORE
    n_words = np.where(targets == IGNORE, 0, rng.integers(1, 6, (rows, 7)))
    E = int(n_words.sum())
    documents = np.sort(rng.integers(0, 3, (rows, 7)), axis=1)
    return module.TargetBlock(
        rng.integers(0, 97, (rows, 7)), targets, documents, rng.random((rows, 7)).astype(np.float16), n_words,
        rng.integers(0, 97, E), rng.integers(1, 6, E), -rng.random(E).astype(np.float16),
    )  # fmt: skip


def write(folder, spec=SPEC, upto=None):
    write_spec(folder, spec)
    written = 0
    for number in range(spec.n_shards):
        with unfinished_shard(folder, spec, number) as found:
            if found is None:
                continue
            file, first = found
            for start in range(first, spec.rows_of_shard(number).stop, spec.block_rows):
                if upto is not None and start >= upto:
                    raise KeyboardInterrupt
                stop = min(start + spec.block_rows, spec.rows_of_shard(number).stop)
                append_block(file, spec, start, random_block(start, stop - start))
                file.flush()
                written += 1
    return written


def test_rows_come_back_with_their_draws(tmp_path):
    write(tmp_path / "t")
    targets = Targets(tmp_path / "t")
    for row in range(11):
        block = random_block(row // 2 * 2, min(2, 11 - row // 2 * 2)).rows(row % 2, row % 2 + 1)
        found = targets.row(row)
        for name in TARGET_FIELDS:
            np.testing.assert_array_equal(getattr(found, name), getattr(block, name), err_msg=name)
    assert targets.nbytes == sum(path.stat().st_size for path in (tmp_path / "t").glob("*.bin"))


TARGET_FIELDS = ("tokens", "targets", "documents", "entropy", "n_words", "ids", "counts", "log_p")


def test_a_batch_is_padded_and_its_positions_restart_with_each_document(tmp_path):
    write(tmp_path / "t")
    targets = Targets(tmp_path / "t")
    batch = TargetStream(targets, seed=1).batch(4, 5)
    for b in range(5):
        row = next(
            targets.row(n) for n in range(11) if (targets.row(n).tokens == batch.tokens_BT[b].numpy()).all()
        )
        at = 0
        for t in range(7):
            n = int(row.n_words[0, t])
            weights = batch.extras["weights"][b, t]
            assert weights[:n].tolist() == pytest.approx((row.counts[at : at + n] / 5).tolist())
            assert not weights[n:].any()
            assert batch.extras["ids"][b, t, :n].tolist() == row.ids[at : at + n].tolist()
            at += n
            same = t and batch.documents_BT[b, t] == batch.documents_BT[b, t - 1]
            assert batch.positions_BT[b, t] == (batch.positions_BT[b, t - 1] + 1 if same else 0)


def test_an_epoch_has_every_row_once_and_any_part_of_it_is_the_same(tmp_path):
    write(tmp_path / "t")
    stream = TargetStream(Targets(tmp_path / "t"), seed=3)
    epoch = stream.batch(11, 11)
    assert len({tuple(row) for row in epoch.tokens_BT.tolist()}) == 11
    part = stream.batch(15, 3)
    assert torch.equal(part.tokens_BT, epoch.tokens_BT[4:7])
    assert not torch.equal(stream.batch(0, 11).tokens_BT, epoch.tokens_BT)
    assert isinstance(part, Batch)


@pytest.mark.parametrize("upto", [0, 2, 4, 6, 8, 10])
@pytest.mark.parametrize("lost", [0, 1, 40])
def test_a_writer_that_was_stopped_continues_with_the_same_bytes(tmp_path, upto, lost):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", upto=upto)
    with pytest.raises(DataError, match="not finished"):
        Targets(tmp_path / "cut")
    for part in (tmp_path / "cut").glob("*.part"):
        with part.open("r+b") as file:  # a kill in the middle of a block
            file.truncate(max(0, part.stat().st_size - lost))
    write(tmp_path / "cut")
    write(tmp_path / "whole")
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert write(tmp_path / "cut") == 0


def test_a_shard_in_work_is_left_to_its_writer(tmp_path):
    write_spec(tmp_path, SPEC)
    with unfinished_shard(tmp_path, SPEC, 0) as mine:
        assert mine is not None
        with unfinished_shard(tmp_path, SPEC, 0) as theirs:
            assert theirs is None


@pytest.mark.parametrize("place", [0, 9, 30, -1])
def test_damage_is_found(tmp_path, place):
    write(tmp_path / "t")
    path = shard_path(tmp_path / "t", 1)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"corrupt|truncated"):
        TargetStream(Targets(tmp_path / "t"), 0).batch(0, 11)


@pytest.mark.parametrize(
    "field, value", [("tokenizer", "u"), ("data", "e"), ("teacher", "n"), ("n_draws", 6), ("seed", 2)]
)
def test_other_inputs_are_refused(tmp_path, field, value):
    write(tmp_path / "t")
    with pytest.raises(DataError, match=field):
        write_spec(tmp_path / "t", module.TargetsSpec(**{**vars(SPEC), field: value}))
    index = tmp_path / "t" / module.INDEX
    index.write_text(index.read_text().replace('"m"', '"x"'))
    with pytest.raises(DataError, match="damaged"):
        Targets(tmp_path / "t")
