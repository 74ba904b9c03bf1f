"""Tune a model: measure it, train by the recipe in the run's folder, and compare before with after.

Everything is resumable: the options, the recipe, the measurements of the model before, and the state of the
loop are in the run's folder. The comparison has three parts: the held-out examples (what was to be learned),
tasks, and other text (what may have been forgotten).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import checkpoint_hash, load_config, load_model
from ..data.builtin import read_parallel
from ..data.corpus import Document, read_corpus, require_apart, require_unseen
from ..data.pairs import PairStream
from ..errors import TrainingError
from ..evals.bootstrap import wilson
from ..evals.bpb import Compression, compare_compression, compression
from ..evals.harness import run_task
from ..evals.local import CheckpointModel
from ..evals.tasks import make_task
from ..evals.tasks.data import Data
from ..evals.windows import from_texts
from ..files import require_own, write_json
from ..llama.model import LlamaLM
from ..machine import lock_folder
from ..quant.linear import use_exact_products
from ..text import Tokenizer
from ..train.heldout import heldout_loss
from ..train.loop import TrainResult
from ..train.objectives.dpo import answer_log_probs
from ..train.recipe import Recipe, read_recipe
from ..train.run import PREPARED, bind_data, prepare, run_recipe
from ..train.sources.base import padding
from ..train.sources.tuning import PreferenceData
from .options import FILE as OPTIONS
from .options import TuneOptions, stored_options
from .recipe import FILE, Prepared, prepare_run

OTHER_BYTES = 4_000
"""Bytes of text of each language, or of each file, to measure what was forgotten."""
TASK_ITEMS = 200
BEFORE = "before.json"
"""The measurements of the model before."""


@dataclass(frozen=True)
class Change:
    """A measurement before and after tuning. ``lo`` and ``hi``: the 95 % interval of the change, if known."""

    name: str
    unit: str
    before: float
    after: float
    lower_is_better: bool
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True)
class Tuned:
    """The result of a tuning run."""

    folder: Path
    result: TrainResult
    changes: list[Change]


def open_run(options: TuneOptions) -> Prepared | None:
    """Return a new run, ready to start, or None if the same run has begun in ``options.out`` already.

    Until the first state is saved a run has not begun, and other options replace it. Raises
    `RecipeError` if another run has begun, `DataError` naming a data file that is missing, was edited
    since, or is both held out and trained on, and `StorageError` if the folder has other files. Keep the
    folder locked (`lock_run`) until `tune` returns.
    """
    out = Path(options.out)
    heldout = [options.heldout] if options.heldout else []
    require_apart(out, [*options.data, *options.replay, *options.other, *heldout])
    require_unseen(heldout, [*options.data, *options.replay])
    stored_options(out)
    require_own(out, OPTIONS, (FILE, BEFORE, "tasks", *PREPARED))
    if any((out / name).exists() for name in ("state", "model", "adapter")):
        options.require_same()
        recipe = read_recipe(out / FILE)
        bind_data(recipe, Path(recipe.out))
        return None
    (out / BEFORE).unlink(missing_ok=True)  # of other options, or of data that was edited since
    return prepare_run(options)


def lock_run(out: Path) -> AbstractContextManager[None]:
    """Keep other processes from tuning into ``out``. Training has a lock of its own there."""
    return lock_folder(out, ".tune.lock")


def tune(
    options: TuneOptions,
    data: Data,
    *,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Measure, train and measure again, as the recipe in ``options.out`` says. Call `open_run` before.

    ``say`` is told what is measured, which may take minutes.
    """
    out = Path(options.out)
    recipe = read_recipe(out / FILE)
    bind_data(recipe, Path(recipe.out))

    def measured(when: str, source: str) -> dict[str, Any]:
        say(f"measuring the model {when}: {', '.join(('held-out rows', 'other texts', *options.tasks))}")
        return _measure(options, recipe, source, data)

    before = kept(out / BEFORE, lambda: measured("before", str(recipe.model.start)))
    folder, result = run_recipe(recipe, on_step=on_step)
    after = kept(out / "after.json", lambda: measured("after", str(folder)))
    changes = list(_changes(before, after))
    write_json(out / "changes.json", [vars(change) for change in changes])
    return Tuned(folder, result, changes)


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the measurements in a file, or make and write them."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    found = measure()
    write_json(path, found)
    return found


# Measuring --------------------------------------------------------------------------------------------------


def _measure(options: TuneOptions, recipe: Recipe, source: str, data: Data) -> dict[str, Any]:
    """Return the losses, scores and bits of the model ``source``."""
    tokenizer, opened = prepare(recipe, load_config(str(recipe.model.start)), Path(recipe.out))
    model = load_model(source)
    use_exact_products(model)
    found: dict[str, Any] = {"heldout": {}, "tasks": {}, "other": {}}
    if opened.heldout:
        found["heldout"]["loss"] = heldout_loss(model, opened.heldout)
    if isinstance(recipe.data, PreferenceData):
        found["heldout"] |= _preferences(model, recipe, tokenizer)
    for name, documents in _other_texts(options.other):
        held_out = from_texts(documents, tokenizer, max_bytes=OTHER_BYTES)
        measured = compression(model, held_out, min(1024, model.config.max_context))
        found["other"][name] = compression_record(measured)
    for name in options.tasks:
        found["tasks"][name] = _task(name, model, tokenizer, source, data, Path(options.out))
    return found


def _other_texts(paths: Sequence[str]) -> Iterable[tuple[str, list[Document]]]:
    """Yield the texts to measure forgetting on: the user's files, or Herd's sentences by language."""
    if paths:
        stems = [Path(path).stem for path in paths]
        for path, stem in zip(paths, stems, strict=True):
            yield path if stems.count(stem) > 1 else stem, list(islice(read_corpus(path), 200))
        return
    by_language: dict[str, list[Document]] = {}
    for document in read_parallel():
        by_language.setdefault(document.lang, []).append(document)
    yield from by_language.items()


def _preferences(model: LlamaLM, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """Measure the fraction of held-out pairs in which the model finds the chosen answer more likely.

    ``shorter`` is how often the shorter answer is the chosen one, a baseline without a model.
    """
    assert isinstance(recipe.data, PreferenceData)
    _, held = recipe.data.divided(tokenizer, recipe.train.context)
    if not held:
        return {}
    stream = PairStream(held, recipe.train.context, 0, pad_id=padding(tokenizer))
    hits: list[bool] = []
    margins: list[float] = []
    with torch.no_grad():
        for row in range(stream.n_rows):
            batch = stream.batch(row, 1).to(model.device)
            hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.attend)
            sums_P2, counts_P2 = answer_log_probs(hidden_BTD, model.lm_head, batch)
            margins += (sums_P2[:, 0] - sums_P2[:, 1]).tolist()
            hits += (counts_P2[:, 0] < counts_P2[:, 1]).tolist()
    order = [member for index in range(stream.n_rows) for member in stream.members(index)]
    return {"margins": dict(zip(map(str, order), margins, strict=True)), "shorter": sum(hits) / len(hits)}


def _task(
    name: str, model: LlamaLM, tokenizer: Tokenizer, source: str, data: Data, out: Path
) -> dict[str, Any]:
    task = make_task(name, mode="instruct" if tokenizer.chat else "base")
    judged = CheckpointModel(model, tokenizer, name=name, hash=checkpoint_hash(source)[:12], mode=task.mode)
    row = run_task(judged, task, data, out / "tasks" / Path(source).name, limit=TASK_ITEMS)
    if row.status != "done":
        return {"failed": row.reason}
    score = row.scores[0]
    return {key: score[key] for key in ("name", "value", "unit", "lo", "hi", "n")}


# The comparison ---------------------------------------------------------------------------------------------


def _changes(before: dict[str, Any], after: dict[str, Any]) -> Iterable[Change]:
    held_b, held_a = before["heldout"], after["heldout"]
    if "loss" in held_b:
        yield Change("held-out loss", "nats/token", held_b["loss"], held_a["loss"], lower_is_better=True)
    if "margins" in held_b:
        names = list(held_b["margins"])
        gains = [held_a["margins"][name] - held_b["margins"][name] > 0 for name in names]
        interval = wilson(sum(gains), len(gains))
        yield Change(
            f"pairs whose margin grew (shorter is right: {100 * held_b['shorter']:.0f} %)", "fraction", 0.5,
            interval.value, lower_is_better=False, lo=interval.lo - 0.5, hi=interval.hi - 0.5,
        )  # fmt: skip
    for name, score in before["tasks"].items():
        other = after["tasks"][name]
        if failed := score.get("failed") or other.get("failed"):
            warnings.warn(f"task {name} is not compared, because it failed: {failed}", stacklevel=2)
        else:
            yield Change(f"task {name}", score["unit"], score["value"], other["value"], lower_is_better=False)
    for name in before["other"]:
        yield text_change(name, before["other"][name], after["other"][name])


def compression_record(measured: Compression) -> dict[str, list[float]]:
    """Return the sums of each document of a text, to be stored. Raises `TrainingError` for a broken model."""
    if not np.isfinite(measured.bits).all():
        raise TrainingError(
            "the model gives probabilities that are not finite: it is damaged, or was trained at too high a "
            "learning rate; train again with a lower --lr into another --out"
        )
    return {key: getattr(measured, key).tolist() for key in ("bits", "n_bytes", "n_tokens")}


def text_change(name: str, before: dict[str, list[float]], after: dict[str, list[float]]) -> Change:
    """Return the change of the bits per byte of a text from two `compression_record`s, with its interval."""
    b, a = (stored_compression(record, name) for record in (before, after))
    difference = compare_compression(name, a, b)
    total = math.fsum(b.n_bytes)
    return Change(
        f"text: {name}", "bits/byte", math.fsum(b.bits) / total, math.fsum(a.bits) / total,
        lower_is_better=True, lo=difference.lo, hi=difference.hi,
    )  # fmt: skip


def stored_compression(record: dict[str, Any], name: str) -> Compression:
    """Return the bits of a text from its `compression_record`."""
    bits, n_bytes, n_tokens = (np.array(record[key]) for key in ("bits", "n_bytes", "n_tokens"))
    return Compression(bits, n_bytes, n_tokens, [name] * len(bits), [""] * len(bits))


def table(changes: Sequence[Change]) -> list[tuple[str, str, str, str, str]]:
    """Return the rows of the comparison: name, before, after, change with its interval, verdict."""
    rows = []
    for change in changes:
        difference = change.after - change.before
        interval = "" if change.lo is None or change.hi is None else f" [{change.lo:+.3f}, {change.hi:+.3f}]"
        better = (difference < 0) == change.lower_is_better
        clear = change.lo is None or change.hi is None or not change.lo <= 0 <= change.hi
        verdict = "same" if difference == 0 or not clear else "better" if better else "worse"
        if change.name.startswith("text: ") and verdict == "worse":
            verdict = "forgotten"
        numbers = (f"{change.before:.3f}", f"{change.after:.3f}", f"{difference:+.3f}{interval}")
        rows.append((f"{change.name}, {change.unit}", *numbers, verdict))
    return rows
