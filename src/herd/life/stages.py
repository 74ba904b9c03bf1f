"""The stages of `herd raise` that make models, from text to the student and its control.

Each function returns an `Outcome`. Training itself is `herd.train.run.run_recipe`, as in `herd train`.
Evaluation and the report are in `measure.py`, the order of the stages in `raise_.py`, resuming in `run.py`.
Sources: "The Llama 3 Herd of Models", sections 3.4 and 4; Minitron (arXiv 2407.14679) for the student.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

from ..checkpoint import Lineage, checkpoint_hash, load_config, load_lineage, load_model, save_model
from ..data.batch import Batch
from ..data.copying import CopyStream
from ..data.corpus import corpus_origin, load_corpus
from ..data.dialogs import make_dialogs, training_texts
from ..data.origin import bind
from ..data.stream import TokenStream, first_rows
from ..data.text_files import DataWarning
from ..distill import prune
from ..evals.needle import needle
from ..files import whole_folder
from ..llama.config import ModelConfig, RopeScaling
from ..text import Tokenizer
from ..train.heldout import accuracy, heldout_loss
from ..train.memory import MASTER, kept_nbytes, loss_nbytes
from ..train.run import run_recipe
from .data import bytes_per_token
from .live import Live
from .plan import Phase, TrainingStage
from .recipes import recipe_folder, write_recipe
from .run import Outcome, RaiseRun

GATE_SEED = 424_242
"""Seed of the gates' needles and rows. The final evaluation uses others."""
COPY_ROWS = 64
"""Fresh rows that the teacher's copying is measured on."""
SHORT_LOSS_BAR = 1.05
"""Largest accepted ratio of the short-context losses after and before an extension of the context."""
NEEDLE_BAR = 0.6
"""Fraction of needles that must be found at the new length. Otherwise the context is not extended further."""
COPY_BAR = 0.95
"""Fraction of the tokens of fresh repeated passages that the teacher must copy."""
MIN_GATE_NEEDLES = 40
"""Fewest needles of a gate."""
DIALOG_NBYTES = 1_250
"""Bytes of memory of one rendered dialog that waits to be packed into a row."""
CALIBRATION_ROWS = 16
"""Rows on which the importance of the teacher's parts is measured."""


def bind_text(run: RaiseRun, prepared: Path) -> None:
    """Record a hash of the text with the run's data.

    Raises `DataError` if the text changed after ``prepared``.
    """
    plan = run.plan
    files, settings = corpus_origin(plan.text)
    settings |= {"seed": plan.seed, "corpus_bytes": plan.corpus_bytes, "vocab_size": plan.vocab_size}
    cure = "Restore the text, or start a new run under another --name"
    bind(run.folder, files, settings, prepared=[prepared], cure=cure)


def make_tokenizer(run: RaiseRun) -> Outcome:
    """Divide the corpus, train a byte-level BPE tokenizer and write token shards."""
    plan, data = run.plan, run.data
    run.show.advance(0.05, "reading")
    corpus = load_corpus(plan.text, max_bytes=plan.corpus_bytes)
    run.show.advance(0.4, "learning merges")
    documents = corpus.splits["teacher"]
    texts = [document.text for document in documents]
    # There are few parallel sentences, but the words of every language need tokens.
    parallel = [document.text for document in documents if document.kind == "parallel"] * 8
    dialogs = training_texts(make_dialogs(4000, plan.seed, split="train"))
    tokenizer = Tokenizer.train(chain(texts, parallel, dialogs), plan.vocab_size)
    tokenizer.save(run.folder / "tokenizer")
    for number, split in enumerate(("teacher", "student", "heldout")):
        run.show.advance(0.6 + 0.13 * number, f"writing {split} tokens")
        data.write_shards(split, corpus.splits[split], tokenizer)
    data.require_rows(corpus.n_bytes)
    bind_text(run, run.folder / "tokenizer")  # raises if the text was edited while it was read
    counts = {
        split: {kind: {"documents": n, "bytes": size} for kind, (n, size) in kinds.items()}
        for split, kinds in corpus.counts().items()
    }
    density = bytes_per_token(corpus.splits["heldout"], tokenizer)
    extra = {"bytes_per_token": density, "vocab_size": tokenizer.vocab_size, "corpus": counts}
    notes = data.notes_on_size(corpus.n_bytes)
    for note in notes:
        run.show.note(note)
    return Outcome(notes=[*corpus.notes, *notes], extra=extra)


def teacher(run: RaiseRun) -> Outcome:
    """Train the teacher from random weights. Its gate is copying on fresh rows."""
    stage, outcome = run.plan.stage("teacher"), Outcome()
    out = train_phases(run, stage, {"shape": shape_section(run.plan.teacher_config)}, outcome)
    fresh = CopyStream(run.data.tokenizer.n_ordinary, run.plan.teacher_config.max_context, GATE_SEED)
    copied = accuracy(load_model(out), first_rows(fresh, COPY_ROWS, 8))
    add_gate(run, outcome, "copying of fresh passages", copied, COPY_BAR)
    return finish(run, stage, outcome)


def long(run: RaiseRun) -> Outcome:
    """Extend the context step by step. Keep the last length that passed its gates (short loss, needles)."""
    plan, stage, outcome = run.plan, run.plan.stage("long"), Outcome()
    shards = run.data.filler("heldout")
    short = first_rows(TokenStream(shards, plan.teacher_config.max_context, 0), 16, 8)
    start = run.folder / "teacher"
    before = heldout_loss(load_model(start), short)
    kept = -1
    for number, phase in enumerate(stage.phases):
        out = train_phase(run, stage, number, {"start": str(start), "extend_to": phase.context}, outcome)
        start = out
        if stage.phases[number + 1 : number + 2] and stage.phases[number + 1].context == phase.context:
            continue  # another recipe at this length
        loss = heldout_loss(load_model(out), short)
        length = f"at {phase.context} tokens"
        add_gate(run, outcome, f"short-context loss {length}", loss, before * SHORT_LOSS_BAR, lower=True)
        n = max(MIN_GATE_NEEDLES, plan.needle_items)
        tokenizer = run.data.tokenizer
        found = needle(load_model(out), tokenizer, shards, [phase.context], n=n, seed=GATE_SEED).value
        add_gate(run, outcome, f"needles {length}", found, NEEDLE_BAR)
        if not all(gate["passed"] for gate in outcome.gates):
            context = plan.teacher_config.max_context if kept < 0 else stage.phases[kept].context
            note = f"A gate failed at {phase.context} tokens: later models have {context} tokens of context."
            outcome.notes.append(note)
            run.show.note(note)
            break
        kept = number
    return finish(run, stage, outcome, kept)


def instruct(run: RaiseRun) -> Outcome:
    """Tune the model on packed dialogs with tools. The loss counts the assistant's messages only."""
    stage, outcome = run.plan.stage("instruct"), Outcome()
    train_phases(run, stage, {"start": str(run.folder / "long")}, outcome)
    return finish(run, stage, outcome)


def student(run: RaiseRun) -> Outcome:
    """Prune the instruct model by importance and train the result on its logits (forward KL, tau 1)."""
    plan, stage, outcome = run.plan, run.plan.stage("student"), Outcome()
    parent = load_model(run.folder / "instruct").requires_grad_(False).eval()
    pruned = run.stage_folder("student") / "pruned"
    if not pruned.exists():
        run.show.advance(0.0, "pruning")
        stream = calibration_rows(run, fitted(stage.phases[0], parent.config))
        model, kept = prune(parent, student_config(plan.student_config, parent.config), stream)
        family = {"teacher": checkpoint_hash(run.folder / "instruct")}
        lineage = Lineage(name=f"{plan.name}-pruned", stage="prune", parents=family)
        save_model(pruned, model, run.data.tokenizer, lineage=lineage)
        outcome.extra["layers_kept"] = kept.layers
    train_phases(run, stage, {"start": str(pruned)}, outcome)
    return finish(run, stage, outcome)


def control(run: RaiseRun) -> Outcome:
    """Train the student's shape from random weights by cross-entropy on the same tokens in the same order."""
    stage, outcome = run.plan.stage("control"), Outcome()
    shape = student_config(run.plan.student_config, load_config(run.folder / "instruct"))
    train_phases(run, stage, {"shape": shape_section(shape)}, outcome)
    return finish(run, stage, outcome)


# Small helpers of the stages --------------------------------------------------------------------------------


def train_phases(run: RaiseRun, stage: TrainingStage, model: dict[str, Any], outcome: Outcome) -> Path:
    """Train a stage's recipes one after another, the first from ``model`` (a recipe's section).

    Adds their costs to ``outcome``. Returns the last checkpoint folder.
    """
    for number in range(len(stage.phases)):
        out = train_phase(run, stage, number, model, outcome)
        model = {"start": str(out)}
    return out


def train_phase(
    run: RaiseRun, stage: TrainingStage, number: int, model: dict[str, Any], outcome: Outcome
) -> Path:
    """Write and run one recipe of a stage, and add its cost to ``outcome``. Return the checkpoint folder."""
    phase = stage.phases[number]
    if "shape" in model:  # the usual deviation of 0.02 fits 760 dimensions and is too small for a toy's start
        model = model | {"init_std": round(0.55 / model["shape"]["dim"] ** 0.5, 4)}
        config = config_of(model["shape"])
    else:
        config = load_config(model["start"])
    if "extend_to" not in model:
        phase = fitted(phase, config)
    recipe = write_recipe(run.data, stage, phase, model)
    done = sum(earlier.tokens for earlier in stage.phases[:number])
    total = sum(each.tokens for each in stage.phases)
    live = Live(run.show, stage.prompts, phase.steps, (done / total, (done + phase.tokens) / total))
    began = time.perf_counter()
    out, result = run_recipe(recipe, on_step=live.on_step, on_begin=live.begin, on_evaluate=live.on_evaluate)
    outcome.tokens += result.tokens
    outcome.flops += result.flops
    if result.resumed_from:
        outcome.earlier_seconds += max(0.0, result.seconds - (time.perf_counter() - began))
    other = DIALOG_NBYTES * sum(source.get("count", 0) for source in phase.mix)
    if stage.objective == "distil":
        parent = load_config(run.folder / "instruct")
        other += MASTER * parent.n_params + loss_nbytes(parent, phase.rows, phase.context)
    memory = kept_nbytes(load_config(out), phase.rows, phase.context, average=True) + other
    outcome.predicted_bytes = max(outcome.predicted_bytes or 0, memory)
    return out


def finish(run: RaiseRun, stage: TrainingStage, outcome: Outcome, last: int | None = None) -> Outcome:
    """Copy the checkpoint of the stage's recipe number ``last`` to its place in the run.

    Its lineage names the models of the run as parents. With ``last`` -1 no recipe passed its gate, and the
    stage's model is a copy of its parent.
    """
    target = run.folder / stage.name
    last = len(stage.phases) - 1 if last is None else last
    source = run.folder / str(stage.start)
    if last >= 0:
        source = recipe_folder(run.folder, stage, stage.phases[last]) / "model"
    family = load_lineage(source)
    assert family is not None  # every stage writes one
    parents = {} if stage.start is None else {stage.start: checkpoint_hash(run.folder / stage.start)}
    own = {"name": f"{run.plan.name}-{stage.name}", "stage": stage.name, "parents": parents}
    with whole_folder(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        family.model_copy(update=own).write(temporary)
    outcome.model, outcome.n_params = stage.name, load_config(target).n_params
    return outcome


def add_gate(
    run: RaiseRun, outcome: Outcome, name: str, value: float, bar: float, *, lower: bool = False
) -> None:
    """Show a gate and add it to ``outcome``. ``lower``: the value, a loss, must be at most the bar."""
    passed = value <= bar if lower else value >= bar
    unit = "nats/token" if lower else "fraction"
    shown = f"{value:.3f} nats/token, at most {bar:.3f} allowed"
    if not lower:
        shown = f"{100 * value:.0f} %, {100 * bar:.0f} % needed"
    run.show.gate(name, passed, shown)
    outcome.gates.append({"name": name, "passed": passed, "value": value, "bar": bar, "unit": unit})


def calibration_rows(run: RaiseRun, phase: Phase) -> list[Batch]:
    """Return the first rows of the student's data, for the importance of the teacher's parts."""
    stage = run.plan.stage("student")
    recipe = write_recipe(run.data, stage, phase, {"start": str(run.folder / "instruct")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # training opens the same data and warns
        opened = recipe.data.open(run.data.tokenizer, run.stage_folder("student"), recipe.train)
    return [opened.stream.batch(start, 8) for start in range(0, CALIBRATION_ROWS, 8)]


def student_config(wanted: ModelConfig, parent: ModelConfig) -> ModelConfig:
    """Return the planned shape with the teacher's final context and rotary scaling."""
    return wanted.replace(rope_scaling=parent.rope_scaling, max_context=parent.max_context)


def shape_section(config: ModelConfig) -> dict[str, Any]:
    """Return ``model.shape`` of a recipe."""
    shape = dataclasses.asdict(config)
    if config.rope_scaling is not None and not config.rope_scaling.freq_factors:
        del shape["rope_scaling"]["freq_factors"]
    return shape


def config_of(shape: dict[str, Any]) -> ModelConfig:
    """Return the config of a recipe's ``model.shape``."""
    scaling = shape["rope_scaling"]
    return ModelConfig(**shape | {"rope_scaling": None if scaling is None else RopeScaling(**scaling)})


def fitted(phase: Phase, config: ModelConfig) -> Phase:
    """Return the phase with rows within the model's context: the same tokens in more rows if needed."""
    if phase.context <= config.max_context:
        return phase
    factor = -(-phase.context // config.max_context)
    return phase.model_copy(update={"context": config.max_context, "rows": phase.rows * factor})
