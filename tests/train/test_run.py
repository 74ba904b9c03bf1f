"""Recipes run to a checkpoint folder: text to teacher, teacher to student, base to instruct.

Each runs in one process and on two ranks.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from herd.checkpoint import checkpoint_hash, load_lineage, load_model
from herd.errors import DataError, RecipeError
from herd.train import metrics
from herd.train.recipe import check_recipe, parse_recipe
from herd.train.run import prepare, run_recipe

pytestmark = pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")

SOUNDS = "ba be bi bo da de di do ka ke ki ko la le li lo ma me mi mo na ne ni no".split()

SHARDS = {"student": (1, 2), "instruct": (2,)}

TEACHER = """\
name: teacher
model:
  shape: {{vocab_size: 600, dim: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, ffn_dim: 48, max_context: 256}}
tokenizer: {{train_vocab: 600}}
data: {{kind: text, paths: ["{base}/text"], heldout_rows: 4}}
objective: {{kind: lm}}
optimizer: {{kind: adamw, lr: 1e-2}}
schedule: {{kind: cosine, warmup_steps: 1, decay_steps: 2, average_every: 1}}
train: {{steps: 6, batch_size: 4, context: 32, save_every: 2, eval_every: 3}}
save_dtype: fp32
out: {base}/teacher
"""

STUDENT = """\
name: student
model:
  shape: {{vocab_size: 600, dim: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, ffn_dim: 24, max_context: 256}}
tokenizer: {{path: "{base}/teacher/model"}}
data: {{kind: text, paths: ["{base}/text"], split: student, heldout_rows: 4, documents: true}}
objective: {{kind: distil, teacher: "{base}/teacher/model"}}
optimizer: {{kind: adamw, lr: 1e-2}}
train: {{steps: 4, batch_size: 4, micro_batch_size: 2, context: 32, eval_every: 2}}
parallel: {{ranks: {ranks}, shard: {shard}}}
save_dtype: fp32
out: {base}/student-{ranks}-{shard}
"""

INSTRUCT = """\
name: instruct
model: {{start: "{base}/teacher/model"}}
data: {{kind: made_dialogs, count: 12, heldout_rows: 2}}
objective: {{kind: sft}}
optimizer: {{kind: adamw, lr: 1e-3}}
train: {{steps: 2, batch_size: 2, context: 256, eval_every: 2}}
parallel: {{ranks: {ranks}, shard: {shard}}}
save_dtype: fp32
out: {base}/instruct-{ranks}-{shard}
"""


def recipe(text, base, ranks=1, shard=1):
    return parse_recipe(text.format(base=base, ranks=ranks, shard=shard))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A corpus and a teacher trained on it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").mkdir()
    draw = random.Random(0)
    for number in range(24):
        words = ("".join(draw.choices(SOUNDS, k=draw.randint(1, 3))) for _ in range(400))
        text = " ".join(words)
        (folder / "text" / f"{number}.txt").write_text(text)
    run_recipe(recipe(TEACHER, folder))
    return folder


def test_a_recipe_turns_text_into_a_checkpoint_with_lineage(base):
    model = load_model(base / "teacher" / "model")
    lineage = load_lineage(base / "teacher" / "model")
    assert (lineage.name, lineage.stage, lineage.parents) == ("teacher", "lm", {})
    assert lineage.recipe["train"]["steps"] == 6
    records = metrics.read(base / "teacher")
    assert [r["step"] for r in records if "eval/heldout_loss" in r] == [3, 6]
    assert records[-2]["loss"] < records[0]["loss"]
    again, result = run_recipe(recipe(TEACHER, base))  # finished: loads, saves the same
    assert result.resumed_from == 6
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), load_model(again).parameters(), strict=True)
    )


def test_students_and_instruct_models_name_their_parents(base):
    folder, result = run_recipe(recipe(STUDENT, base))
    lineage = load_lineage(folder)
    assert lineage.parents == {"teacher": load_lineage(base / "teacher" / "model").weights_hash}
    assert {"kl", "ce"} <= result.last.keys()
    folder, _ = run_recipe(recipe(INSTRUCT, base))
    assert load_lineage(folder).parents.keys() == {"start"}


def test_two_ranks_make_the_same_checkpoints(base):
    """The sharded runs allocate on the meta device and fill tensor by tensor.

    The result is that of one rank.
    """
    jobs = {"student": STUDENT, "instruct": INSTRUCT}
    paths = []
    for name, text in jobs.items():
        run_recipe(recipe(text, base))
        for shard in SHARDS[name]:
            path = base / f"{name}-{shard}.yaml"
            path.write_text(text.format(base=base, ranks=2, shard=shard))
            paths.append(str(path))
    script = str(Path(__file__).parent / "run_worker.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        script,
        *paths,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in jobs:
        one = load_model(base / f"{name}-1-1" / "model").state_dict()
        for shard in SHARDS[name]:
            two = load_model(base / f"{name}-2-{shard}" / "model").state_dict()
            for key in one:
                assert (one[key] - two[key]).abs().max() < 2e-5, (name, shard, key)


def test_what_does_not_fit_is_refused_before_anything_is_written(base, tmp_path):
    other = TEACHER.replace("vocab_size: 600", "vocab_size: 700").replace(
        "train_vocab: 600", "train_vocab: 700"
    )
    run_recipe(recipe(other.replace("{base}/teacher", str(tmp_path / "other")), base))
    wrong = STUDENT.replace('teacher: "{base}/teacher/model"', f'teacher: "{tmp_path}/other/model"')
    with pytest.raises(RecipeError, match="model's vocabulary is 600, its teacher's 700"):
        run_recipe(recipe(wrong.replace("{base}/student", str(tmp_path / "student")), base))
    assert not list(tmp_path.glob("student*"))
    small = STUDENT.replace("vocab_size: 600", "vocab_size: 599").replace(
        'distil, teacher: "{base}/teacher/model"', "lm"
    )
    with pytest.raises(RecipeError, match="tokenizer has 600 ids, the model's vocabulary is 599"):
        run_recipe(recipe(small.replace("{base}/student", str(tmp_path / "small")), base))
    with pytest.raises(RecipeError, match=r"parallel.ranks=2, started are 1"):
        run_recipe(recipe(STUDENT, base, ranks=2))


def test_other_data_is_not_resumed(base):
    changed = INSTRUCT.replace("count: 12", "count: 13")
    run_recipe(recipe(INSTRUCT, base))
    with pytest.raises(DataError, match=r"data\.count was 12 and is now 13"):
        run_recipe(recipe(changed, base))


MIX = """\
name: mix
model: {{start: "{base}/teacher/model", extend_to: 512}}
data:
  kind: mix
  mix:
  - {{kind: text, paths: ["{base}/text"], weight: 0.5, heldout_rows: 4}}
  - {{kind: copy, weight: 0.25, recurring: 0.5, heldout_rows: 4}}
  - {{kind: lookup, weight: 0.15, levels: [pairs, names], heldout_rows: 4}}
  - {{kind: made_dialogs, count: 12, languages: [en], weight: 0.1, heldout_rows: 2}}
objective: {{kind: lm}}
optimizer: {{kind: adamw, lr: 1e-3}}
train: {{steps: 4, batch_size: 10, context: 288, eval_every: 2}}
parallel: {{ranks: {ranks}, shard: {shard}}}
save_dtype: fp32
out: {base}/mix-{ranks}-{shard}
"""


def test_a_mix_trains_on_its_sources_by_weight_and_measures_each(base):
    """With an extended context, and the same bits in a second run."""
    wanted = recipe(MIX, base)
    folder, _ = run_recipe(wanted)
    model = load_model(folder)
    assert (model.config.max_context, model.config.rope_scaling.factor) == (512, 2.0)
    records = metrics.read(base / "mix-1-1")
    names = {"eval/heldout_loss", "eval/copy_accuracy", "eval/lookup_accuracy"}
    assert [r["step"] for r in records if r.keys() >= names] == [2, 4]
    _, data = prepare(wanted, check_recipe(wanted, 1), base / "mix-1-1")
    assert data.stream.quota_P.tolist() == [10, 5, 3, 2]  # rows in a block of twenty
    again, _ = run_recipe(recipe(MIX.replace("/mix-", "/again-"), base))
    assert checkpoint_hash(again) == checkpoint_hash(folder)


def test_sources_of_a_mix_have_rows_of_their_own(base):
    twice = MIX.replace("kind: lookup, weight: 0.15, levels: [pairs, names]", "kind: copy, weight: 0.15")
    wanted = recipe(twice, base)
    _, data = prepare(wanted, check_recipe(wanted, 1), base / "mix-1-1")
    first, second = (data.stream.streams[i].batch(0, 4).tokens_BT for i in (1, 2))
    assert not torch.equal(first, second)
