"""A rehearsal trains for real, respects the free memory, and writes a valid shell script."""

import math
import subprocess

import pytest

from herd.cli import run
from herd.errors import PlanError, RecipeError
from herd.llama.config import SIZES
from herd.plan import machines, rehearse
from herd.train.memory import train_nbytes
from herd.train.recipe import parse_recipe

RECIPE = """
name: small
model:
  shape: {vocab_size: 512, dim: 64, n_layers: 3, n_heads: 4, n_kv_heads: 2, ffn_dim: 128, max_context: 128}
tokenizer: {train_vocab: 512}
data: {kind: text, paths: [builtin]}
objective: {kind: lm}
optimizer: {kind: adamw, lr: 1e-3}
train: {steps: 100, batch_size: 16, micro_batch_size: 2, context: 128}
parallel: {ranks: RANKS, shard: RANKS}
out: nowhere
"""


def recipe(ranks=1):
    return parse_recipe(RECIPE.replace("RANKS", str(ranks)))


def test_a_small_model_is_rehearsed_whole():
    piece = rehearse.cut_to_fit(SIZES["1B"], 1, 128, 1e12)
    assert (piece.slices, piece.vocab_parts, piece.rows, piece.context) == (1, 1, 1, 128)
    assert piece.config == SIZES["1B"].replace(n_layers=1)


@pytest.mark.parametrize("size", ["8B", "70B", "405B"])
def test_large_layers_are_cut_until_they_fit(size):
    free = 20e9
    piece = rehearse.cut_to_fit(SIZES[size], 4, 8192, free, 1e12)
    two = piece.config.replace(n_layers=2)
    assert train_nbytes(two, piece.rows, piece.context).total <= rehearse.SHARE * free
    assert piece.config.dim == SIZES[size].dim
    assert piece.config.ffn_dim * piece.slices == SIZES[size].ffn_dim
    assert piece.config.head_dim == 128
    whole, found = (
        rehearse.layer_flops(SIZES[size], 0),
        rehearse.layer_flops(piece.config, 0) * piece.slices,
    )
    assert whole <= found < 1.4 * whole  # KV heads are repeated beyond their number


def test_without_memory_the_rehearsal_is_refused():
    with pytest.raises(PlanError, match="larger machine"):
        rehearse.cut_to_fit(SIZES["405B"], 1, 8192, 1e6)


def test_a_rehearsal_trains_for_real():
    small = recipe()
    said = []
    found = rehearse.run_rehearsal(small, said.append)
    assert len(said) == 2 * 2 * rehearse.STEPS
    assert found.loss == pytest.approx(math.log(512), abs=0.3)
    assert found.layer_seconds > 0
    assert found.flops_rate > 0
    outlook = rehearse.outlook_here(small, found)
    assert outlook.fits
    assert outlook.hours == pytest.approx(outlook.step_seconds * 100 / 3600)
    assert outlook.step_seconds > 8 * 3 * found.layer_seconds  # eight micro-batches of three blocks


def test_the_prediction_for_another_machine_counts_its_ranks():
    outlook = rehearse.outlook_on(recipe(8), machines.find_machine("8xH100"))
    assert 0 < outlook.mfu < 1
    assert (
        outlook.nbytes.total
        == train_nbytes(rehearse.model_shape(recipe(8)), 2, 128, dtype="fp32", shard=8, ranks=8).total
    )
    with pytest.raises(RecipeError, match="use 8xA100"):
        rehearse.outlook_on(recipe(8), machines.find_machine("A100"))


@pytest.mark.parametrize("name, count", [("H100", 1), ("8xH100", 8), ("16xH100", 16)])
def test_the_script_is_valid_shell_and_starts_every_rank(name, count, tmp_path):
    text = rehearse.slurm_script(recipe(), tmp_path / "my recipe.yaml", machines.find_machine(name), 30.0)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "'" + str(tmp_path / "my recipe.yaml") + "'" in text
    assert "--time=1-10:00:00" in text
    nodes = max(1, count // 8)
    assert f"--nodes={nodes}\n" in text
    assert (f"--nproc-per-node={count // nodes} " in text) == (count > 1)


def test_train_rehearses_and_refuses_machines_that_do_not_match(tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("RANKS", "1"))
    script = tmp_path / "run.sh"
    assert run(["train", str(path), "--rehearse", "--machine", "RTX4090", "--script", str(script)]) == 0
    out = capsys.readouterr().out
    assert "RTX4090" in out
    assert script.read_text().startswith("#!/bin/bash")
    assert run(["train", str(path), "--rehearse", "--machine", "8xH100"]) == 1
    assert "parallel.ranks=1" in capsys.readouterr().err
    assert run(["train", str(path), "--script", str(script)]) == 1
    assert "--machine" in capsys.readouterr().err
