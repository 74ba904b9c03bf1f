"""Training from stored targets by a recipe: equal to the objective by hand, resumable, refused when wrong."""

from pathlib import Path

import pytest
import torch

from herd.checkpoint import Lineage, load_model, save_model
from herd.data.shards import Shards
from herd.data.stream import TokenStream
from herd.data.targets import Targets, TargetsSpec, TargetStream
from herd.distill.label import label
from herd.errors import HerdError
from herd.llama import ModelConfig
from herd.llama.model import LlamaLM
from herd.text import Tokenizer
from herd.train.objectives import batch_loss, lm, sampled_distil
from herd.train.recipe import parse_recipe
from herd.train.run import run_recipe

TEXT = "the quick brown fox jumps over the lazy dog and runs away. " * 400
RECIPE = """
name: toy
model: {{start: {start}}}
data: {{kind: targets, folder: {targets}{more}}}
objective: {objective}
optimizer: {{kind: adamw, lr: 1e-3}}
train: {{steps: {steps}, batch_size: 4, context: 16, save_every: 1}}
save_dtype: fp32
out: {out}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    tokenizer = Tokenizer.train([TEXT], 530)
    config = ModelConfig(
        vocab_size=530, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, max_context=64
    )
    for name, seed in (("teacher", 0), ("student", 1)):
        model = LlamaLM(config).init_weights(seed, std=0.2)
        save_model(folder / name, model, tokenizer, lineage=Lineage(name=name, stage="test"))
    shards = Shards.write(folder / "shards", [TEXT], tokenizer)
    spec = TargetsSpec(tokenizer.sha256, shards.sha256, "teacher", 530, 16, 20, block_rows=2, shard_rows=8)
    label(load_model(folder / "teacher"), TokenStream(shards, 16, 0), folder / "targets", spec)
    return folder


def recipe(made: Path, out: Path, objective="{kind: sampled_distil}", more="", steps=3, targets="targets"):
    fields = {"objective": objective, "more": more, "steps": steps, "out": out}
    return parse_recipe(RECIPE.format(start=made / "student", targets=made / targets, **fields))


def test_the_recipe_trains_as_the_objective_says(made, tmp_path):
    folder, result = run_recipe(recipe(made, tmp_path / "run"))
    batch = TargetStream(Targets(made / "targets"), 0).batch(8, 4)
    student = load_model(made / "student")
    before = batch_loss(student, sampled_distil(), batch)
    after = batch_loss(load_model(folder), sampled_distil(), batch)
    assert float(after.total) < float(before.total)
    assert set(result.last) >= {"kl", "ce", "loss"}
    assert result.last["loss"] == pytest.approx(result.last["kl"])
    loss = batch_loss(student, lm, batch)
    torch.testing.assert_close(before.metrics["ce"], loss.total.detach())


@pytest.mark.parametrize(
    "objective", ["{kind: lm}", "{kind: sampled_distil, kl_weight: 0.5, direction: reverse}"]
)
def test_the_same_rows_serve_other_objectives_and_runs_resume(made, tmp_path, objective):
    whole, _ = run_recipe(recipe(made, tmp_path / "whole", objective))
    out = tmp_path / "cut"

    def stop(record):
        if record["step"] == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run_recipe(recipe(made, out, objective), on_step=stop)
    resumed, result = run_recipe(recipe(made, out, objective))
    assert result.resumed_from == 1
    for (name, a), (_, b) in zip(
        load_model(whole).state_dict().items(), load_model(resumed).state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"more": ", teacher: other"}, "labelled by the teacher"),
        ({"objective": "{kind: sft}"}, "reads dialogs"),
        ({"targets": "shards"}, "holds no targets.json"),
        ({"targets": "nothing"}, "no such file"),
    ],
)
def test_wrong_inputs_are_refused(made, tmp_path, change, message):
    with pytest.raises(HerdError, match=message):
        run_recipe(recipe(made, tmp_path / "run", **change))


def test_another_tokenizer_is_refused(made, tmp_path):
    other = Tokenizer.train([TEXT[::-1]], 530)
    save_model(
        tmp_path / "student", load_model(made / "student"), other, lineage=Lineage(name="x", stage="x")
    )
    text = RECIPE.format(start=tmp_path / "student", targets=made / "targets", objective="{kind: sampled_distil}",
                         more="", steps=1, out=tmp_path / "run")  # fmt: skip
    with pytest.raises(HerdError, match="tokenizer of hash"):
        run_recipe(parse_recipe(text))
