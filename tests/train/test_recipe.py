"""Recipes: those that are shipped, and every way of writing one wrongly."""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from herd.errors import HerdError, RecipeError
from herd.train.recipe import check_recipe, parse_recipe, read_recipe
from herd.train.recipe_yaml import read_yaml, write_yaml

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
  kind: text
  paths: [corpus]
objective:
  kind: lm
optimizer:
  kind: adamw
  lr: 3e-3
schedule:
  kind: cosine
  warmup_steps: 2
  decay_steps: 4
train:
  steps: 10
  batch_size: 8
  micro_batch_size: 2
  context: 64
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
    train = read_recipe(next(p for p in RECIPES if p.stem == "405b-pretrain")).config
    assert train.tokens_per_step == 2048 * 8192
    assert train.learning_rate(8000) == 8e-5
    assert train.learning_rate(train.steps - train.schedule.decay_steps) == pytest.approx(8e-7)


def test_the_distillation_recipe_has_the_constants_of_minitron():
    recipe = read_recipe(next(p for p in RECIPES if p.stem == "4b-distil"))
    assert recipe.train.tokens_per_step * recipe.train.steps == pytest.approx(94e9, rel=1e-3)
    assert (recipe.objective.kl_weight, recipe.objective.tau) == (1.0, 1.0)


def test_values_are_read_with_their_types():
    recipe = parse_recipe(GOOD)
    assert recipe.optimizer.lr == 3e-3  # which YAML 1.1 would read as text
    assert recipe.model.config().dim == 32
    assert recipe.parallel.ranks == 2


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "torch.bfloat16"])
def test_number_formats_have_short_names_and_their_long_ones_are_accepted(dtype):
    recipe = parse_recipe(edited(("  context: 64", f"  context: 64\n  dtype: {dtype}")))
    assert (recipe.train.dtype, recipe.save_dtype) == ("bf16", "bf16")


def test_configurations_and_memory_formulas_need_no_torch():
    code = "import sys, herd.train, herd.train.config, herd.train.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


TEXT, MIX = "  kind: text\n  paths: [corpus]", "  kind: mix\n  mix: "
WRONG = [
    ("batch_size: 8", "batch_row: 8", "train.batch_row is not a key; did you mean batch_size?"),
    (
        "  train_vocab: 1024",
        "  train_vocabs: 1024",
        "tokenizer.train_vocabs is not a key; did you mean train_v",
    ),
    ("    n_kv_heads: 2", "    kv_heads: 2", "model.shape.kv_heads is not a key; did you mean n_kv_heads?"),
    ("objective:", "goal:", "goal is not a key; "),
    ("lr: 3e-3", "lr: fast", "optimizer.lr='fast': input should be a valid number"),
    ("steps: 10", "steps: '10'", "train.steps='10': input should be a valid integer"),
    ("steps: 10", "steps: 10.5", "train.steps=10.5: input should be a valid integer"),
    ("steps: 10", "steps: 0", "train.steps=0: input should be greater than or equal to 1"),
    ("lr: 3e-3", "lr: .nan", "optimizer.lr=nan: input should be"),
    ("kind: lm", "kind: ppo", "objective.kind='ppo': give one of 'lm', 'sft', 'distil'"),
    ("kind: lm", "kind: distil", "objective.teacher is missing"),
    ("  kind: lm\n", "  tau: 1.0\n", "objective.kind is missing; give one of lm, sft, distil"),
    ("  kind: text\n", "", "data.kind is missing; give one of text, shards, dialogs"),
    (TEXT, MIX + "[{kind: text, path: [corpus]}]", "data.mix.0.path is not a key; did you mean paths?"),
    (TEXT, MIX + "[{kind: copy, weight: -1}]", "data.mix.0.weight=-1: input should be greater than 0"),
    (TEXT, MIX + "[{kind: lookup, levels: [far]}]", "data.mix.0.levels.0='far': input should be 'pairs'"),
    (TEXT, MIX + "[{kind: copi}]", "data.mix.0.kind='copi': give one of"),
    (TEXT, MIX + "[{kind: copy}]", "trained on data of kind text"),
    ("kind: cosine", "kind: cosin", "schedule.kind='cosin': give one of 'cosine', 'constant'"),
    ("kind: adamw", "kind: adam", "optimizer.kind='adam': input should be 'adamw'"),
    ("paths: [corpus]", "path: [corpus]", "data.path is not a key; did you mean paths?"),
    (TEXT, "  kind: dialogs\n  path: d\n  split: x", "data.split is not a key; known are"),
    ("kind: lm", "kind: sft", "objective sft reads dialogs; data of kind text is text"),
    ("kind: lm", "kind: lm\n  tau: 2.0", "objective.tau is not a key; known are kind"),
    ("micro_batch_size: 2", "micro_batch_size: 3", "micro_batch_size=3 does not divide batch_size=8"),
    ("micro_batch_size: 2", "micro_batch_size: 8", "micro_batch_size=8 does not divide the 4 rows of a rank"),
    ("ranks: 2", "ranks: 3", "batch_size=8 is not a multiple of the 3 ranks"),
    ("ranks: 2", "ranks: 2\n  shard: 3", "shard=3 does not divide ranks=2"),
    ("context: 64", "context: 256", "context=256 exceeds the model's max_context=128"),
    ("decay_steps: 4", "decay_steps: 11", "decay_steps=11 exceed steps=10"),
    ("  warmup_steps: 2", "  average_every: 5", "average_every=5 exceeds decay_steps=4"),
    ("  train_vocab: 1024", "  train_vocab: 2048", "train_vocab=2048 is not the model's vocab_size=1024"),
    ("  train_vocab: 1024", "  train_vocab: 1024\n  path: x", "give one of path or train_vocab"),
    ("tokenizer:\n  train_vocab: 1024\n", "", "random weights come without a tokenizer"),
    ("    n_kv_heads: 2", "    n_kv_heads: 3", "n_heads=4 is not a multiple of n_kv_heads=3"),
    ("  shape:", "  size: 9B\n  shape:", "give one of size, shape or start, not 2 of them"),
    (TEXT, "  kind: shards\n  folder: here", "a tokenizer is trained on data of kind text"),
    ("paths: [corpus]", "paths: [corpus]\n  folder: here", "data.folder is not a key; known are"),
    ("paths: [corpus]", "paths: [1]", "data.paths.0=1: input should be a valid string"),
    ("name: toy", "name: a/b", "name='a/b': string should match pattern"),
    ("out: runs/toy\n", "", "out is missing"),
    ("steps: 10", "steps: 10\n  steps: 11", "train.steps is given twice"),
    ("lr: 3e-3", "lr: [", "not YAML"),
]


@pytest.mark.parametrize(
    "old, new, message", WRONG, ids=[new.strip().replace("\n", " ") or old for old, new, _ in WRONG]
)
def test_every_mistake_is_one_line_that_names_the_file(old, new, message):
    with pytest.raises(RecipeError) as error:
        parse_recipe(edited((old, new)), "recipes/toy.yaml")
    said = str(error.value)
    assert said.startswith("recipes/toy.yaml:")
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("  context: 64", "  context: 64\n  lr: 3e-4", "train.lr is not a key; did you mean optimizer.lr\\?"),
        ("  kind: text", "  kind: text\n  steps: 9", "data.steps is not a key; did you mean train.steps\\?"),
    ],
)
def test_a_key_in_the_wrong_section_is_told_the_right_one(old, new, message):
    text = edited((old, new))
    with pytest.raises(RecipeError, match=rf"^toy:{line_of(text, new.splitlines()[-1])}: {message}"):
        parse_recipe(text, "toy")


@pytest.mark.parametrize(
    "old, new, needle",
    [
        ("batch_size: 8", "batch_row: 8", "batch_row:"),
        ("lr: 3e-3", "lr: fast", "lr: fast"),
        ("micro_batch_size: 2", "micro_batch_size: 3", "micro_batch_size: 3"),
        ("micro_batch_size: 2", "micro_batch_size: 8", "micro_batch_size: 8"),
        ("context: 64", "context: 256", "context: 256"),
        ("    n_kv_heads: 2", "    n_kv_heads: 3", "n_heads: 4"),
        ("kind: lm", "kind: ppo", "kind: ppo"),
        ("  train_vocab: 1024", "  train_vocab: 2048", "train_vocab"),
        ("steps: 10", "steps: 10\n  steps: 11", "steps: 11"),
        ("paths: [corpus]", "paths:\n  - one\n  - 2", "- 2"),
    ],
)
def test_an_error_names_the_line_of_its_key(old, new, needle):
    text = edited((old, new))
    with pytest.raises(RecipeError, match=rf"^toy.yaml:{line_of(text, needle)}: "):
        parse_recipe(text, "toy.yaml")


def test_several_errors_show_the_first_and_count_the_rest():
    text = edited(("steps: 10", "steps: ten"), ("lr: 3e-3", "lr: fast"), ("kind: lm", "kind: x"))
    with pytest.raises(RecipeError, match=r"toy:17: objective.kind='x'.* \(and 2 more\)$"):
        parse_recipe(text, "toy")


@pytest.mark.parametrize(
    "text",
    [
        "", "just words", "- a\n- list", "name: [", "\t- x", "a: !!python/object:os.system {}", "name: 2026-13-45",
        "a: &a [*a]", "[" * 5000, "a: \x07", "a: !!timestamp 2026-13-45", "a: !!int abc", "a: !!float x",
        "a: !!bool maybe", "a: !!binary '#'", "a: !!set {x}", "? [1, 2]\n: 3", "a: " + "1" * 5000,
        "a: 0x" + "f" * 5000, "<<: 5",
    ],
)  # fmt: skip
def test_texts_that_are_no_recipes_are_refused(text):
    with pytest.raises(RecipeError, match=r"^recipe:\d+: .+$"):
        parse_recipe(text)


def test_aliases_that_multiply_are_refused_before_they_fill_the_memory():
    names = "abcdefghij"
    text = "a: &a [x]\n" + "\n".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise(names)
    )
    with pytest.raises(RecipeError, match=r"^r:\d+: more than 100,000 entries, aliases included"):
        read_yaml(text, "r")


def test_an_alias_within_its_own_part_is_refused_with_its_line():
    for text in ("a: 1\nb: &b [*b]", "a: 1\nb: &b {c: {d: *b}}"):
        with pytest.raises(RecipeError, match=r"^r:2: b\.[0c].*: an alias refers to a part that contains it"):
            read_yaml(text, "r")
    assert read_yaml("a: &a [1]\nb: {<<: {c: 1}, d: *a}", "r")[0] == {"a": [1], "b": {"c": 1, "d": [1]}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0100", 100), ("-07", -7), ("0o17", 15), ("0x1F", 31), ("1_000_000", 1_000_000), ("1:30", "1:30"),
        ("3e-4", 3e-4), ("1e3", 1000.0), ("3.", 3.0), (".5", 0.5), (".inf", math.inf), ("12.5e+1", 125.0),
        ("0b101", "0b101"), ("yes", "yes"), ("off", "off"), ("True", True), ("~", None), ("", None),
        ("2026-01-02", "2026-01-02"), ("2026-13-45", "2026-13-45"), ("1.2.3", "1.2.3"), ("=", "="), ("'1'", "1"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read_yaml(f"a: {text}", "r")[0]["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "value", ["1e5", "0o17", "0x1F", "1:30", "yes", "~", "", "<<", "2026-01-02", 1e-5, None, 7]
)
def test_what_is_written_is_read_back(value):
    found = read_yaml(write_yaml({"a": [value]}), "r")[0]["a"]
    assert (found, type(found[0])) == ([value], type(value))
    assert yaml.safe_load(write_yaml({"a": [value]})) == {"a": [value]}  # also by readers of YAML 1.1


def test_the_home_folder_is_expanded_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    recipe = parse_recipe(edited(("out: runs/toy", "out: ~/toy"), ("train_vocab: 1024", "path: ~/t")))
    assert (recipe.out, recipe.tokenizer.path) == ("/h/toy", "/h/t")
    with pytest.raises(RecipeError, match=r"^r:\d+: 'a.x00b' cannot be a path"):
        parse_recipe(edited(("out: runs/toy", 'out: "a\\0b"')), "r")
    with pytest.raises(RecipeError, match=r"^r:\d+: ~nobody-here/x: there is no such user"):
        parse_recipe(edited(("out: runs/toy", "out: ~nobody-here/x")), "r")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_held_out_is_not_trained_on(tmp_path, mixed):
    for name in ("a", "copy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("other text" if name == "other" else "the text")

    def check(heldout):
        one = f"kind: shards, folder: {tmp_path}/a"
        other = f"kind: shards, folder: {tmp_path}/other"
        data = f"kind: mix, mix: [{{{one}}}, {{{other}, heldout: {tmp_path}/{heldout}}}]" if mixed else one
        data += "" if mixed else f", heldout: {tmp_path}/{heldout}"
        edits = ("data:\n", f"data: {{{data}}}\n"), ("  kind: text\n  paths: [corpus]\n", "")
        check_recipe(parse_recipe(edited(*edits, ("train_vocab: 1024", "path: tokenizer.model"))), 2)

    for heldout in ("a", "copy"):
        with pytest.raises(RecipeError, match=r"is held out, but .*a/index.json is trained on"):
            check(heldout)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "index.json").write_text("new text")
    check("new")


def test_check_looks_at_ranks_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(GOOD)
    with pytest.raises(RecipeError, match="corpus: no such file or folder"):
        check_recipe(recipe, 2)
    (tmp_path / "corpus").mkdir()
    assert check_recipe(recipe, 2).dim == 32
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/inside"):
        with pytest.raises(RecipeError, match=f"toy: out={out}: .*file is no folder that can be written"):
            check_recipe(parse_recipe(edited(("out: runs/toy", f"out: {out}"))), 2)
    with pytest.raises(RecipeError, match="toy: an empty path is given"):
        check_recipe(parse_recipe(edited(("[corpus]", "['']"))), 2)
    with pytest.raises(RecipeError, match=r"recipe is for parallel.ranks=2, started are 1: use torchrun"):
        check_recipe(recipe, 1)
    shards = edited(
        ("kind: text\n  paths: [corpus]", f"kind: shards\n  folder: {tmp_path}/none"),
        ("train_vocab: 1024", "path: tokenizer.model"),
    )
    with pytest.raises(RecipeError, match="none: no such file or folder"):
        check_recipe(parse_recipe(shards), 2)
    missing = edited(("kind: lm", f"kind: distil\n  teacher: {tmp_path}/nobody"))
    with pytest.raises(HerdError, match="nobody"):
        check_recipe(parse_recipe(missing), 2)
