"""Prepared data is bound to its sources: every change of them is refused by name, and nothing else is."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from herd.checkpoint import load_lineage
from herd.data import origin
from herd.data.corpus import corpus_origin
from herd.data.origin import RECORD, bind
from herd.errors import DataError, StorageError
from herd.machine import lock_folder
from herd.train import metrics
from herd.train.recipe import parse_recipe
from herd.train.run import run_recipe

pytestmark = pytest.mark.filterwarnings("ignore::herd.data.text_files.DataWarning")


def prose(seed: int, n_words: int = 4000) -> str:
    draw = random.Random(seed)
    sounds = ("ba", "di", "ko", "lu", "me", "na", "pi", "ro")
    words = ("".join(draw.choices(sounds, k=draw.randint(1, 3))) for _ in range(n_words))
    return " ".join(words) + "\n"


def binding(folder: Path, text: object, **settings: object) -> None:
    """Bind ``folder/made`` to a text specification."""
    files, of_text = corpus_origin([str(one) for one in (text if isinstance(text, list) else [text])])
    bind(folder, files, of_text | settings, prepared=[folder / "made"], cure="Start again")


def prepare(folder: Path, text: object) -> None:
    """Make ``folder`` and data in it, bound to a text specification."""
    folder.mkdir()
    binding(folder, text)
    (folder / "made").write_text("")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder ``text`` with two files, and data prepared from it in ``out``."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("the first file")
    (text / "b.txt").write_text("the second one")
    prepare(tmp_path / "out", text)
    return text


def refused(sources: Path, text: object, match: str, **settings: object) -> None:
    with pytest.raises(DataError, match=match) as error:
        binding(sources.parent / "out", text, **settings)
    assert "Start again" in str(error.value)
    assert "\n" not in str(error.value)


def test_unchanged_sources_are_accepted_and_not_read_again(sources: Path, monkeypatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr(hashlib, "file_digest", never)
    binding(sources.parent / "out", sources)


def test_touched_moved_and_copied_sources_are_accepted(sources: Path, tmp_path: Path) -> None:
    os.utime(sources / "a.txt", (1, 1))
    binding(tmp_path / "out", sources)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(sources, tmp_path / "elsewhere" / "text")
    binding(tmp_path / "out", moved)


def test_an_edit_of_the_same_size_and_time_is_refused(sources: Path) -> None:
    before = (sources / "a.txt").stat()
    (sources / "a.txt").write_text("THE first file")
    os.utime(sources / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(sources, sources, r"a\.txt has other content \(14 bytes, SHA-256 [0-9a-f]{12} before, 14 bytes")


def test_added_removed_and_renamed_files_are_refused(sources: Path) -> None:
    (sources / "c.txt").write_text("a third")
    refused(sources, sources, r"c\.txt is a new source")
    (sources / "c.txt").unlink()
    (sources / "b.txt").rename(sources / "d.txt")
    refused(sources, sources, r"d\.txt is a new source; .*b\.txt is no longer among the sources")


def test_another_order_of_the_same_files_is_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(file.name)
    prepare(tmp_path / "out", files)
    order = r"order of the source files was a\.txt, b\.txt and is now b\.txt, a\.txt"
    with pytest.raises(DataError, match=order):
        binding(tmp_path / "out", files[::-1])


def test_a_symbolic_link_to_other_text_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"text {name}")
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "one")
    prepare(tmp_path / "out", link)
    link.unlink()
    link.symlink_to(tmp_path / "two")
    with pytest.raises(DataError, match=r"link\.txt has other content"):
        binding(tmp_path / "out", link)


def test_the_same_text_compressed_is_another_file(sources: Path) -> None:
    """The name of a file decides its split, so a compressed copy gives other shards."""
    (sources / "a.txt.gz").write_bytes(gzip.compress((sources / "a.txt").read_bytes()))
    (sources / "a.txt").unlink()
    refused(sources, sources, r"a\.txt\.gz is a new source; .*a\.txt is no longer")


def test_changed_settings_are_refused(sources: Path, monkeypatch) -> None:
    refused(sources, sources, "vocab was None and is now 700", vocab=700)
    monkeypatch.setattr(origin, "PREPARATION", origin.PREPARATION + 1)
    refused(sources, sources, "preparation was 1 and is now 2")


def test_missing_sources_are_refused(sources: Path) -> None:
    with pytest.raises(DataError, match=r"no such file"):
        binding(sources.parent / "out", sources / "nothing")


def test_data_without_a_record_or_with_a_damaged_one_is_refused(sources: Path) -> None:
    record = sources.parent / "out" / RECORD
    whole = record.read_text()
    for damaged in ("", "[]", "{}", whole[:-20], whole.replace("herd-data-1", "herd-data-0")):
        record.write_text(damaged)
        with pytest.raises(DataError, match=r"data\.json: is not a record"):
            binding(sources.parent / "out", sources)
    record.unlink()
    with pytest.raises(DataError, match=r"without a record of what it was made from.*choose another folder"):
        binding(sources.parent / "out", sources)


def test_sources_may_change_while_nothing_is_prepared(sources: Path) -> None:
    (sources.parent / "out" / "made").unlink()
    (sources / "a.txt").write_text("edited")
    binding(sources.parent / "out", sources)
    assert "edited" not in (sources.parent / "out" / RECORD).read_text()


def test_many_differences_are_counted(sources: Path) -> None:
    for number in range(9):
        (sources / f"n{number}").write_text("x")
    refused(sources, sources, "and 6 more differences")


# Whole training runs


RECIPE = """\
name: tiny
model:
  shape: {{vocab_size: {vocab}, dim: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, ffn_dim: 16,
    max_context: 64}}
  init_std: {init_std}
tokenizer: {tokenizer}
data: {data}
objective: {{kind: lm}}
optimizer: {{kind: adamw, lr: 1e-3}}
train: {{steps: 2, batch_size: 2, context: 16, save_every: 1, seed: {seed}}}
save_dtype: float32
out: {out}
"""


def recipe(base: Path, **changes: object) -> str:
    """The text of a recipe that trains in ``base/out``, on ``base/text`` unless told otherwise."""
    vocab = changes.get("vocab", 600)
    fields = {"vocab": vocab, "seed": 0, "init_std": 0.02, "out": base / "out"}
    fields |= {"tokenizer": f"{{train_vocab: {vocab}}}", "data": text_of(base)}
    return RECIPE.format(**(fields | changes))


def text_of(base: Path) -> str:
    return f'{{kind: text, paths: ["{base}/text"], heldout_rows: 2}}'


def train(base: Path, **changes: object):
    return run_recipe(parse_recipe(recipe(base, **changes)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("stale")
    (base / "text").mkdir()
    for number in range(4):
        (base / "text" / f"{number}.txt").write_text(prose(number, 2000))
    train(base)
    return base


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run and its text that a test may spoil."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_an_unchanged_run_goes_on(run: Path) -> None:
    _, result = train(run)
    assert result.resumed_from == 2


def test_a_second_start_in_the_same_folder_names_the_first_process(run: Path) -> None:
    with (
        lock_folder(run / "out"),
        pytest.raises(StorageError, match=f"out: process {os.getpid()} is working"),
    ):
        train(run)


def edit(run: Path) -> dict:
    text = (run / "text" / "0.txt").read_text()
    (run / "text" / "0.txt").write_text(text.swapcase())
    return {}


def add(run: Path) -> dict:
    (run / "text" / "9.txt").write_text(prose(9, 300))
    return {}


def other_text(run: Path) -> dict:
    (run / "other.txt").write_text(prose(5))
    return {"data": f'{{kind: text, paths: ["{run}/other.txt"], heldout_rows: 2}}'}


def other_tokenizer(run: Path) -> dict:
    from herd.text import Tokenizer

    (run / "new").mkdir()
    Tokenizer.train([prose(3)], 600).save(run / "new")
    return {"tokenizer": f'{{path: "{run}/new"}}'}


def text_with(option: str):
    return lambda run: {"data": f'{{kind: text, paths: ["{run}/text"], {option}}}'}


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed after the shards"])
@pytest.mark.parametrize(
    "change, match",
    [
        (edit, r"0\.txt has other content"),
        (add, r"9\.txt is a new source"),
        (other_text, r"other\.txt is a new source"),
        (other_tokenizer, r"train_vocab was 600 and is now None"),
        (lambda run: {"vocab": 601}, r"train_vocab was 600 and is now 601"),
        (lambda run: {"seed": 1}, r"train\.seed was 0 and is now 1"),
        (lambda run: {"init_std": 0.1}, r"model\.init_std was 0\.02 and is now 0\.1"),
        (text_with("split: student"), r"split was 'teacher' and is now"),
        (text_with("max_bytes: 30000"), r"max_bytes was None and is now 30000"),
        (text_with("documents: true"), r"documents was False and is now True"),
        (lambda run: {"data": "{kind: text, paths: [builtin]}"}, r"text was None and is now 'Python"),
    ],
)
def test_a_changed_source_or_setting_stops_the_run(run: Path, change, match: str, finished: bool) -> None:
    if not finished:
        shutil.rmtree(run / "out" / "state")
        shutil.rmtree(run / "out" / "model")
    before = contents(run / "out")
    with pytest.raises(DataError, match=match) as error:
        train(run, **change(run))
    assert f"remove {run / 'out'} to start from the beginning" in str(error.value)
    assert before == contents(run / "out")


def test_removing_the_folder_trains_on_the_new_text(run: Path, trained: Path) -> None:
    edit(run)
    shutil.rmtree(run / "out")
    folder, _ = train(run)
    assert load_lineage(folder).data_hash != load_lineage(trained / "out" / "model").data_hash
    assert metrics.read(run / "out")[0]["loss"] != metrics.read(trained / "out")[0]["loss"]


def test_edited_dialogs_stop_the_run(trained: Path, tmp_path: Path) -> None:
    def write(word: str) -> None:
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": word}]
        (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages}) + "\n")

    tokenizer, data = f'{{path: "{trained}/out/tokenizer"}}', f'{{kind: dialogs, path: "{tmp_path}/d.jsonl"}}'
    text = recipe(tmp_path, tokenizer=tokenizer, data=data)
    text = text.replace("kind: lm", "kind: sft").replace("context: 16", "context: 64")
    write("cat")
    run_recipe(parse_recipe(text))
    run_recipe(parse_recipe(text))
    write("dog")
    with pytest.raises(DataError, match=r"d\.jsonl has other content"):
        run_recipe(parse_recipe(text))


def test_other_shards_stop_the_run(trained: Path, tmp_path: Path) -> None:
    def start(shards: Path) -> None:
        tokenizer = f'{{path: "{trained}/out/tokenizer"}}'
        train(tmp_path, tokenizer=tokenizer, data=f'{{kind: shards, folder: "{shards}"}}')

    shutil.copytree(trained / "out" / "shards" / "teacher", tmp_path / "shards")
    start(tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards")
    shutil.copytree(trained / "out" / "shards" / "heldout", tmp_path / "shards")
    with pytest.raises(DataError, match=r"shards/index\.json has other content"):
        start(tmp_path / "shards")


def test_another_parent_of_the_same_shape_stops_the_run(trained: Path, tmp_path: Path) -> None:
    """Lineage must not name weights that the run never read."""
    start, teacher = tmp_path / "start", tmp_path / "teacher"
    for folder in (start, teacher):
        shutil.copytree(trained / "out" / "model", folder)
    text = recipe(tmp_path, tokenizer="", data=text_of(trained))
    text = re.sub("model:.*?tokenizer: ", f'model: {{start: "{start}"}}', text, flags=re.DOTALL)
    distilled = parse_recipe(text.replace("kind: lm", f'kind: distil, teacher: "{teacher}"'))
    run_recipe(distilled)
    for folder in (start, teacher):
        weights = folder / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(before[:-8] + bytes(8))
        with pytest.raises(DataError, match=rf"the {folder.name} model .SHA-256. was '\w+' and is now"):
            run_recipe(distilled)
        weights.write_bytes(before)


def test_truncated_shards_are_refused(run: Path) -> None:
    file = next((run / "out" / "shards" / "teacher").glob("tokens-*.bin"))
    os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(DataError, match=r"tokens-00000\.bin: .*truncated"):
        train(run)


def test_text_edited_while_it_is_read_is_refused(run: Path, monkeypatch) -> None:
    import herd.train.run as training

    shutil.rmtree(run / "out")
    whole = training.prepare

    def meanwhile(*args):
        material = whole(*args)
        edit(run)
        return material

    monkeypatch.setattr(training, "prepare", meanwhile)
    with pytest.raises(DataError, match=r"0\.txt has other content"):
        train(run)
