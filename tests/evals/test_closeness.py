"""Fidelity as a row of an evaluation: zero against oneself, kept on disk, seen by the comparison."""

import pytest

from herd.evals.closeness import measure_fidelity
from herd.evals.compare import compare
from herd.evals.local import CheckpointModel
from herd.evals.results import read_evaluation
from herd.evals.tasks import Data


@pytest.fixture
def local(tokenizer, make_model):
    def build(name, seed, **changes):
        return CheckpointModel(make_model(seed, **changes), tokenizer, name=name, hash=f"{name}{seed}")

    return build


def test_nothing_is_nearer_than_oneself(local, tmp_path):
    one = local("one", 1)
    row = measure_fidelity(one, one, Data(), tmp_path / "one", limit=6)
    kl, top1, overlap = row.scores
    assert (kl["name"], kl["value"], top1["value"]) == ("kl", pytest.approx(0, abs=1e-6), 1)
    assert overlap["value"] == pytest.approx(1, abs=1e-5)
    assert set(kl["detail"]["by_group"]) <= {"en", "de", "fr", "it", "pt", "hi", "es", "th", "ja"}


def test_rows_are_kept_and_compared(local, tmp_path):
    parent = local("parent", 1)
    for seed in (2, 3):
        measure_fidelity(parent, local(f"child{seed}", seed), Data(), tmp_path / str(seed), limit=6)
    before = (tmp_path / "2").glob("fidelity-*.jsonl")
    text = next(before).read_bytes()
    again = measure_fidelity(parent, local("child2", 2), Data(), tmp_path / "2", limit=6)
    assert next((tmp_path / "2").glob("fidelity-*.jsonl")).read_bytes() == text  # nothing was asked again
    assert len(read_evaluation(tmp_path / "2").tasks) == 1
    assert again.scores[0]["value"] > 0
    comparison = compare([read_evaluation(tmp_path / name) for name in ("2", "3")])
    assert (comparison.rows[0].task, comparison.rows[0].unit) == ("fidelity", "nats/token")
    difference = comparison.differences[0]
    kl = [score.value for score in comparison.rows[0].scores.values()]
    assert difference.interval.value == pytest.approx(kl[1] - kl[0])
