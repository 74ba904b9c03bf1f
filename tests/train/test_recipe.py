"""Recipes: those that are shipped, and every way of writing one wrongly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from herd.errors import HerdError, RecipeError
from herd.train import learning_rate
from herd.train.recipe import check, parse_recipe, read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

GOOD = """\
name: toy
model:
  shape:
    vocab_size: 1024
    dim: 32
    n_layers: 2
    n_heads: 4
    n_kv_heads: 2
    ffn_dim: 64
    max_context: 128
tokenizer:
  train_vocab: 1024
data:
  text: [corpus]
objective:
  kind: lm
train:
  steps: 10
  batch_size: 8
  micro_batch_size: 2
  context: 64
  lr: 3e-3
  warmup_steps: 2
  decay_steps: 4
parallel:
  ranks: 2
out: runs/toy
"""


def line_of(text: str, needle: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if needle in line)


def edited(*edits: tuple[str, str]) -> str:
    text = GOOD
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    recipe = read_recipe(path)
    assert recipe.train.rows_of_rank(recipe.parallel.ranks)
    assert yaml.safe_load(path.read_text())["name"] == recipe.name


def test_the_405b_recipe_is_the_papers():
    train = read_recipe(next(p for p in RECIPES if p.stem == "405b-pretrain")).train
    assert train.tokens_per_step == 2048 * 8192
    assert learning_rate(8000, train) == 8e-5
    assert learning_rate(train.steps - train.decay_steps, train) == pytest.approx(8e-7)


def test_the_distillation_recipe_is_minitrons():
    recipe = read_recipe(next(p for p in RECIPES if p.stem == "4b-distil"))
    assert recipe.train.tokens_per_step * recipe.train.steps == pytest.approx(94e9, rel=1e-3)
    assert (recipe.objective.kl_weight, recipe.objective.tau) == (1.0, 1.0)


def test_reads_what_it_says():
    recipe = parse_recipe(GOOD)
    assert recipe.train.lr == 3e-3  # which YAML 1.1 would read as text
    assert recipe.model.config().dim == 32
    assert recipe.parallel.ranks == 2


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "torch.bfloat16"])
def test_number_formats_have_short_names_and_their_long_ones_are_accepted(dtype):
    recipe = parse_recipe(edited(("  lr: 3e-3", f"  lr: 3e-3\n  dtype: {dtype}")))
    assert (recipe.train.dtype, recipe.save_dtype) == ("bf16", "bf16")


def test_reading_needs_no_torch():
    code = "import sys, herd.train.recipe, herd.train.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


WRONG = [
    ("batch_size: 8", "batch_row: 8", "train.batch_row is not a key; did you mean batch_size?"),
    (
        "  train_vocab: 1024",
        "  train_vocabulary: 1024",
        "tokenizer.train_vocabulary is not a key; did you mean train_v",
    ),
    ("    n_kv_heads: 2", "    kv_heads: 2", "model.shape.kv_heads is not a key; did you mean n_kv_heads?"),
    ("objective:", "goal:", "goal is not a key; "),
    ("lr: 3e-3", "lr: fast", "train.lr='fast': input should be a valid number"),
    ("steps: 10", "steps: '10'", "train.steps='10': input should be a valid integer"),
    ("steps: 10", "steps: 10.5", "train.steps=10.5: input should be a valid integer"),
    ("steps: 10", "steps: 0", "train.steps=0: input should be greater than or equal to 1"),
    ("lr: 3e-3", "lr: .nan", "train.lr=nan: input should be"),
    ("kind: lm", "kind: dpo", "objective.kind='dpo': input should be 'lm', 'sft' or 'distil'"),
    ("kind: lm", "kind: distil", "distil needs a teacher"),
    ("kind: lm", "kind: sft", "objective sft reads dialogs or made_dialogs"),
    ("kind: lm", "kind: lm\n  tau: 2.0", "tau is for distil, the objective here is lm"),
    ("micro_batch_size: 2", "micro_batch_size: 3", "micro_batch_size=3 does not divide batch_size=8"),
    ("micro_batch_size: 2", "micro_batch_size: 8", "micro_batch_size=8 does not divide the 4 rows of a rank"),
    ("ranks: 2", "ranks: 3", "batch_size=8 is not a multiple of the 3 ranks"),
    ("ranks: 2", "ranks: 2\n  shard: 3", "shard=3 does not divide ranks=2"),
    ("context: 64", "context: 256", "context=256 exceeds the model's max_context=128"),
    ("decay_steps: 4", "decay_steps: 11", "decay_steps=11 are more than steps=10"),
    ("  warmup_steps: 2", "  average_every: 5", "average_every=5 exceeds decay_steps=4"),
    ("  train_vocab: 1024", "  train_vocab: 2048", "train_vocab=2048 is not the model's vocab_size=1024"),
    ("  train_vocab: 1024", "  train_vocab: 1024\n  path: x", "give one of path or train_vocab"),
    ("tokenizer:\n  train_vocab: 1024\n", "", "random weights come without a tokenizer"),
    ("    n_kv_heads: 2", "    n_kv_heads: 3", "n_heads=4 is not a multiple of n_kv_heads=3"),
    ("  shape:", "  size: 9B\n  shape:", "give one of size, shape or start, not 2 of them"),
    ("text: [corpus]", "shards: here", "a tokenizer is trained on data.text"),
    (
        "text: [corpus]",
        "text: [corpus]\n  shards: here",
        "give one of shards, text, dialogs, made_dialogs, not 2",
    ),
    ("text: [corpus]", "text: [1]", "data.text"),
    ("name: toy", "name: a/b", "name='a/b': string should match pattern"),
    ("out: runs/toy\n", "", "out is missing"),
    ("steps: 10", "steps: 10\n  steps: 11", "train.steps is given twice"),
    ("lr: 3e-3", "lr: [", "not YAML"),
]


@pytest.mark.parametrize(
    "old, new, message", WRONG, ids=[new.strip().replace("\n", " ") or old for old, new, _ in WRONG]
)
def test_errors_carry_the_line(old, new, message):
    with pytest.raises(RecipeError) as error:
        parse_recipe(edited((old, new)), "recipes/toy.yaml")
    said = str(error.value)
    assert said.startswith("recipes/toy.yaml:")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "new, old",
    [
        ("batch_size: 8", "batch_rows: 8"),
        ("micro_batch_size: 2", "micro_rows: 2"),
        ("decay_steps: 4", "anneal_steps: 4"),
        ("lr: 3e-3", "lr: 3e-3\n  remat: true"),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_its_new_name(new, old):
    key, now = old.split("\n")[-1].strip().split(":")[0], new.split(":")[0]
    now = "activation_checkpointing" if key == "remat" else now
    with pytest.raises(RecipeError, match=rf"train\.{key} is now called train\.{now}"):
        parse_recipe(edited((f"  {new}\n", f"  {old}\n")))


@pytest.mark.parametrize(
    "old, new, needle",
    [
        ("batch_size: 8", "batch_row: 8", "batch_row:"),
        ("lr: 3e-3", "lr: fast", "lr: fast"),
        ("micro_batch_size: 2", "micro_batch_size: 3", "micro_batch_size: 3"),
        ("micro_batch_size: 2", "micro_batch_size: 8", "micro_batch_size: 8"),
        ("context: 64", "context: 256", "context: 256"),
        ("    n_kv_heads: 2", "    n_kv_heads: 3", "n_heads: 4"),
        ("kind: lm", "kind: distil", "kind: distil"),
        ("  train_vocab: 1024", "  train_vocab: 2048", "train_vocab"),
        ("steps: 10", "steps: 10\n  steps: 11", "steps: 11"),
        ("text: [corpus]", "text:\n  - one\n  - 2", "- 2"),
    ],
)
def test_the_line_is_the_right_one(old, new, needle):
    text = edited((old, new))
    with pytest.raises(RecipeError, match=rf"^toy.yaml:{line_of(text, needle)}: "):
        parse_recipe(text, "toy.yaml")


def test_several_errors_show_the_first_and_count_the_rest():
    text = edited(("steps: 10", "steps: ten"), ("lr: 3e-3", "lr: fast"), ("kind: lm", "kind: x"))
    with pytest.raises(RecipeError, match=r"toy:16: objective.kind='x'.* \(and 2 more\)$"):
        parse_recipe(text, "toy")


@pytest.mark.parametrize(
    "text", ["", "just words", "- a\n- list", "name: [", "\t- x", "a: !!python/object:os.system {}"]
)
def test_what_is_no_recipe(text):
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(tmp_path / "binary.yaml")


def test_check_looks_at_ranks_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(GOOD)
    with pytest.raises(RecipeError, match="corpus: no such file or folder"):
        check(recipe, 2)
    (tmp_path / "corpus").mkdir()
    assert check(recipe, 2).dim == 32
    with pytest.raises(RecipeError, match=r"recipe is for parallel.ranks=2, started are 1: use torchrun"):
        check(recipe, 1)
    shards = edited(
        ("text: [corpus]", f"shards: {tmp_path}/none"), ("train_vocab: 1024", "path: tokenizer.model")
    )
    with pytest.raises(RecipeError, match="none: no such file or folder"):
        check(parse_recipe(shards), 2)
    missing = edited(("kind: lm", f"kind: distil\n  teacher: {tmp_path}/nobody"))
    with pytest.raises(HerdError, match="nobody"):
        check(parse_recipe(missing), 2)
