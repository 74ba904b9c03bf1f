"""The seconds and bytes of a shrink run, predicted from a probe of some seconds.

Labelling, training and measuring are predicted by their FLOPs at the measured rates. A race has a winner that
is not known yet, so its cost is that of the most promising shape. Tasks of the ledger and the teacher's own
writing are not predicted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..llama.config import ModelConfig
from ..quant.mixtures import named_scheme
from .arms import StudentPipeline
from .cells import SWEEP
from .recovery import Arm
from .scores import PROBE_CONTEXT, PROBE_ROWS
from .shrink import PLAIN, Shrinker

FITTED_PER_SECOND = 20e6
"""Weights whose grids one core fits in a second."""


@dataclass(frozen=True)
class Forecast:
    """A step that a run will compute, with its predicted seconds and the bytes that it leaves on disk."""

    name: str
    seconds: float
    nbytes: float = 0.0


def forecast(run: Shrinker) -> list[Forecast]:
    """Return the steps of a run from the beginning, with seconds and bytes, from measured rates."""
    s, pipeline, first = run.settings, run.pipeline, run.shapes[0]
    speeds, winner = pipeline.speeds(first.config), run.arm(first)
    out = list(_preparations(run))
    sizes = _Sizes(pipeline, first.config)
    raced = [(run.arm(shape), s.race_tokens) for shape in run.shapes] if run.races else []
    if run.races:
        for control in run.controls(winner):
            tokens = s.race_tokens if control.distilled else run.equal_flops(control.config)
            raced.append((control, tokens))
    if s.lr is None and s.sweep_tokens and not run.is_teacher(winner):
        usual = s.learning_rate(winner.config)
        raced += [(replace(winner, lr=factor * usual), s.sweep_tokens) for factor in SWEEP]
    planned = {run.arm(shape).name: shape.weights for shape in run.shapes} if run.races else {}
    started: set[str] = set()
    for arm, tokens in dict.fromkeys([*raced, (winner, s.tokens)]):
        if run.is_teacher(arm):
            tokens = 0
        measured = speeds.measure_seconds(arm.config)
        seconds, nbytes = 0.0, 0.0
        if arm.name not in started:
            started.add(arm.name)
            seconds, nbytes = measured, sizes.start(arm.config)
        if tokens:
            seconds += speeds.train_seconds(tokens, arm.config) + measured
            nbytes += sizes.folder(arm.config, 4)
        weights = "bf16" if arm.lr else planned.get(arm.name, "bf16")
        if weights not in PLAIN and tokens == s.race_tokens:
            seconds += arm.config.n_params / FITTED_PER_SECOND + measured
            nbytes += sizes.packed(arm.config, weights)
        words = arm.words(pipeline.config)
        out.append(Forecast(f"train {words} on {tokens:,} tokens", seconds, nbytes))
    return [*out, *_students(run, winner, sizes)]


def _preparations(run: Shrinker) -> Iterator[Forecast]:
    """Yield the steps before the first student: measuring and correcting the teacher, targets, importance."""
    s, pipeline = run.settings, run.pipeline
    teacher, first = pipeline.config, run.shapes[0].config
    speeds = pipeline.speeds(first)
    vocabularies = dict.fromkeys(
        [teacher.vocab_size, first.vocab_size, *(shape.config.vocab_size for shape in run.shapes)]
    )
    for vocab in vocabularies:
        documents = pipeline.material.held_out(pipeline.tokenizer_of(vocab), s.heldout_tokens)
        scored = sum(len(document.ids) - 1 for document in documents)
        seconds = speeds.measure_seconds(teacher)
        name = f"the teacher on held-out text, vocabulary {vocab:,}"
        yield Forecast(name, seconds, 2 * scored * teacher.dim)
    if s.correct_tokens:
        seconds = speeds.train_seconds(s.correct_tokens, teacher)
        yield Forecast("correct the teacher", seconds, pipeline.compute.itemsize * teacher.n_params)
    tokens = {shape.config.vocab_size: s.race_tokens if run.races else 0 for shape in run.shapes}
    tokens[first.vocab_size] = max(s.tokens, s.qad_tokens, tokens[first.vocab_size])
    for vocab, count in tokens.items():
        count = pipeline.spec(vocab, s.steps(count) * s.batch_size).n_rows * s.context if count else 0
        seconds, nbytes = speeds.label_seconds(count), count * speeds.bytes_per_token
        yield Forecast(f"label {count:,} tokens, vocabulary {vocab:,}", seconds, nbytes)
    flops = teacher.flops_per_token(s.context / 2)
    rows, searches = 0, set()
    for config in [shape.config for shape in run.shapes]:
        dropped = teacher.n_layers - config.n_layers
        if dropped:
            searches.add((config.vocab_size, dropped))
        if config.replace(n_layers=teacher.n_layers, vocab_size=teacher.vocab_size) != teacher:
            rows = 4 * s.calibration_rows
    for _, dropped in searches:
        rows += s.calibration_rows * (teacher.n_layers - dropped - 1)
    yield Forecast("importance", rows * s.context * flops / speeds.label_flops)


def _students(run: Shrinker, winner: Arm, sizes: _Sizes) -> Iterator[Forecast]:
    """Yield what comes after the training of the winner: scores, the export, fewer bits."""
    s, shape = run.settings, run.shapes[0]
    speeds = run.pipeline.speeds(winner.config)
    to = s.gguf or shape.weights
    packed = to not in PLAIN
    n_scored = 1 + (2 if s.tokens else 1) * (not run.is_teacher(winner)) + packed
    seconds = n_scored * speeds.label_seconds(2 * PROBE_ROWS * PROBE_CONTEXT)
    yield Forecast("copying and looking up", seconds)
    yield Forecast("write the student", 0.0, sizes.folder(winner.config, 2))
    if not packed:
        return
    nbytes = sizes.packed(winner.config, to)
    measured = speeds.measure_seconds(winner.config)
    fitting = winner.config.n_params / FITTED_PER_SECOND
    yield Forecast(f"round to {to}", fitting + measured, 2 * nbytes)  # with the copy that is the result
    if s.qad_tokens:
        seconds = fitting + speeds.train_seconds(s.qad_tokens, winner.config) + measured
        yield Forecast(f"distil in {to} on {s.qad_tokens:,} tokens", seconds, nbytes)


class _Sizes:
    """The bytes of checkpoint folders of the run."""

    def __init__(self, pipeline: StudentPipeline, first: ModelConfig) -> None:
        with tempfile.TemporaryDirectory() as folder:
            pipeline.tokenizer_of(first.vocab_size).save(folder)
            self.tokenizer = sum(path.stat().st_size for path in Path(folder).iterdir())
        self.stored = pipeline.source.stored_dtype.itemsize

    def folder(self, config: ModelConfig, itemsize: int) -> float:
        """Return the bytes of a folder with plain weights."""
        return itemsize * config.n_params + self.tokenizer

    def start(self, config: ModelConfig) -> float:
        """Return the bytes of a pruned model, whose weights have the dtype of the teacher's."""
        return self.folder(config, self.stored)

    def packed(self, config: ModelConfig, to: str) -> float:
        """Return the bytes of a folder with a GGUF file."""
        return named_scheme(to, config).nbytes(config) + self.tokenizer / 2  # its vocabulary has no settings
