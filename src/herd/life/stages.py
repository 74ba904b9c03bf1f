"""The training stages of `herd raise`, one function each, from text to the student models.

Each function returns an `Outcome`. Evaluation and the report are in `measure.py`. The order of the stages is
in `raise_.py`, resuming in `run.py`. Sources: "The Llama 3 Herd of Models", sections 3.4 and 4; Minitron
(arXiv 2407.14679) for the student.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from ..checkpoint import Lineage, load_lineage, load_model, save_model
from ..data.batch import Batch
from ..data.corpus import corpus_origin, load_corpus
from ..data.dialogs import make_dialogs, showcase_dialogs, training_texts
from ..data.origin import bind
from ..data.stream import MixStream, first_rows
from ..distill import prune
from ..evals.needle import needle
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..text import Tokenizer, render
from ..train import distil, lm, sft
from ..train.heldout import heldout_loss
from ..train.memory import MASTER, kept_nbytes, loss_nbytes
from .learn import Prompt, learn
from .material import DIALOG_NBYTES, bytes_per_token, is_parallel, numbers
from .plan import Phase, extended
from .run import Outcome, RaiseRun

NEEDLE_SEED = 424_242
"""Seed of the gates' needles. The final evaluation uses other needles."""
SHORT_LOSS_BAR = 1.05
"""Largest accepted ratio of the short-context losses after and before an extension of the context."""
NEEDLE_BAR = 0.8
"""Fraction of needles that must be found at the new length. Otherwise the context is not extended further."""
MIN_VOCAB_FOR_NUMBERS = 2048
"""Smallest vocabulary that has room for one token per number of up to three digits."""
STEP_TOKENS = 2048
"""Tokens per step in the plans, and most tokens per batch of held-out rows."""


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
    texts = [document.text for document in corpus.splits["teacher"]]
    # There are few parallel sentences, but the words of every language need tokens.
    parallel = [document.text for document in corpus.splits["teacher"] if is_parallel(document)] * 8
    dialogs = training_texts(make_dialogs(4000, plan.seed, split="train"))
    spoken = numbers() if plan.vocab_size >= MIN_VOCAB_FOR_NUMBERS else ()
    tokenizer = Tokenizer.train(chain(texts, parallel, dialogs, spoken), plan.vocab_size)
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
    density = bytes_per_token(corpus, tokenizer)
    extra = {"bytes_per_token": density, "vocab_size": tokenizer.vocab_size, "corpus": counts}
    return Outcome(notes=list(corpus.notes), extra=extra)


def pretrain(run: RaiseRun) -> Outcome:
    """Train the teacher from random weights by next-token prediction, with decay and averaging at the end."""
    plan, phase = run.plan, run.plan.pretrain
    model = random_model(plan.teacher_config, plan.seed)
    heldout = heldout_rows(run, phase.context, plan.eval_rows)
    stream = run.data.pretraining(phase.context)
    learned = learn(run, "teacher", model, stream, lm, phase, heldout, text_prompts(run.data.tokenizer))
    outcome = finish(run, "teacher", model, [learned], phase)
    outcome.extra["heldout_loss"] = heldout_loss(model, heldout)
    return outcome


def extend(run: RaiseRun) -> Outcome:
    """Extend the context step by step.

    Keep the last step that passed its gates (short-context loss, needles).
    """
    plan, data = run.plan, run.data
    passed = load_model(run.folder / "teacher")
    short = heldout_rows(run, plan.pretrain.context, plan.eval_rows)
    before = heldout_loss(passed, short)
    prompts = text_prompts(data.tokenizer)
    learned, gates, notes = [], [], []
    for number, phase in enumerate(plan.extend):
        context = phase.context
        model = stretch(passed, context)
        text = data.text("teacher", context, plan.seed + context)
        stream = MixStream([text, data.retrieval(context)], [0.6, 0.4], plan.seed)
        heldout = heldout_rows(run, context, plan.eval_rows * plan.pretrain.context // context)
        bar = (number / len(plan.extend), (number + 1) / len(plan.extend))
        learned.append(learn(run, f"long/{context}", model, stream, lm, phase, heldout, prompts, bar))
        found = gates_at(run, model, context, heldout_loss(model, short), before)
        gates += found
        if not all(gate["passed"] for gate in found):
            kept = passed.config.max_context
            notes.append(f"a gate failed at {context} tokens: the context stays {kept}")
            break
        passed = model
    outcome = finish(run, "long", passed, learned, plan.extend[-1], parents=("teacher",))
    outcome.gates, outcome.notes = gates, notes
    outcome.extra["max_context"] = passed.config.max_context
    return outcome


def gates_at(run: RaiseRun, model: LlamaLM, context: int, loss: float, before: float) -> list[dict[str, Any]]:
    """Show and return the two gates of a context length: loss at the short context, and needles found."""
    data, n = run.data, run.plan.needle_items
    found = needle(model, data.tokenizer, data.filler("heldout"), [context], n=n, seed=NEEDLE_SEED).value
    bar = before * SHORT_LOSS_BAR
    gates = [
        (f"short-context loss at {context} tokens", loss <= bar, loss, bar, "nats/token"),
        (f"needles at {context} tokens", found >= NEEDLE_BAR, found, NEEDLE_BAR, "fraction"),
    ]
    shown = (
        f"{loss:.3f} nats/token, at most {bar:.3f} allowed",
        f"{100 * found:.0f} % found, {100 * NEEDLE_BAR:.0f} % needed",
    )
    for (name, passed, *_), value in zip(gates, shown, strict=True):
        run.show.gate(name, passed, value)
    return [dict(zip(("name", "passed", "value", "bar", "unit"), gate, strict=True)) for gate in gates]


def instruct(run: RaiseRun) -> Outcome:
    """Tune the model on packed dialogs with tools. The loss counts the assistant's messages only."""
    plan, data = run.plan, run.data
    model = load_model(run.folder / "long")
    phase = fitted(plan.instruct, model.config)
    heldout = heldout_rows(run, phase.context, plan.eval_rows // 2)
    stream = data.instruct(phase.context)
    learned = learn(run, "instruct", model, stream, sft, phase, heldout, chat_prompts(data.tokenizer))
    dialogs = plan.n_dialogs * DIALOG_NBYTES
    return finish(run, "instruct", model, [learned], phase, parents=("long",), other_bytes=dialogs)


def student(run: RaiseRun) -> Outcome:
    """Prune the instruct model by importance and train the result on its logits (forward KL, tau 1)."""
    plan, data = run.plan, run.data
    teacher = load_model(run.folder / "instruct").requires_grad_(False).eval()
    phase = fitted(plan.distil, teacher.config)
    stream = data.student(phase.context)
    target = student_config(plan.student_config, teacher.config)
    model, kept = prune(teacher, target, [stream.batch(start, 8) for start in (0, 8)])
    heldout = heldout_rows(run, phase.context, plan.eval_rows // 2)
    before = heldout_loss(model, heldout)
    prompts = chat_prompts(data.tokenizer)
    learned = learn(run, "student", model, stream, distil(teacher), phase, heldout, prompts)
    held = MASTER * teacher.config.n_params + loss_nbytes(teacher.config, phase.rows, phase.context)
    held += data.n_lessons * DIALOG_NBYTES
    outcome = finish(run, "student", model, [learned], phase, parents=("instruct",), other_bytes=held)
    outcome.extra |= {"layers_kept": kept.layers, "loss_after_pruning": before}
    return outcome


def control(run: RaiseRun) -> Outcome:
    """Train the student's shape from random weights by cross-entropy on the same tokens in the same order."""
    plan, data = run.plan, run.data
    final = load_model(run.folder / "instruct").config
    phase = fitted(plan.distil, final)
    model = random_model(student_config(plan.student_config, final), plan.seed + 1)
    stream = data.student(phase.context)
    heldout = heldout_rows(run, phase.context, plan.eval_rows // 2)
    learned = learn(run, "control", model, stream, lm, phase, heldout, chat_prompts(data.tokenizer))
    dialogs = data.n_lessons * DIALOG_NBYTES
    return finish(run, "control", model, [learned], phase, other_bytes=dialogs)


# Small helpers of the stages --------------------------------------------------------------------------------


def random_model(config: ModelConfig, seed: int) -> LlamaLM:
    """Return a model with random weights of deviation 0.55 / sqrt(D).

    This is the usual 0.02 for D = 760. At the widths of toy models, 0.02 is too small for a quick start of
    learning.
    """
    return LlamaLM(config).init_weights(seed, std=0.55 / config.dim**0.5)


def heldout_rows(run: RaiseRun, context: int, n_rows: int) -> list[Batch]:
    """Return the first rows of held-out text for repeated evaluation."""
    return first_rows(run.data.text("heldout", context, 0), n_rows, max(1, STEP_TOKENS // context))


def stretch(model: LlamaLM, context: int) -> LlamaLM:
    """Return the same weights with Llama 3's rotary scaling for ``context`` tokens."""
    longer = LlamaLM(extended(model.config, context))
    longer.load_state_dict(model.state_dict())
    return longer


def student_config(wanted: ModelConfig, teacher: ModelConfig) -> ModelConfig:
    """Return the planned shape with the teacher's final context and rotary scaling."""
    return wanted.replace(rope_scaling=teacher.rope_scaling, max_context=teacher.max_context)


def fitted(phase: Phase, config: ModelConfig) -> Phase:
    """Return the phase with rows within the model's context: the same tokens in more rows if needed."""
    if phase.context <= config.max_context:
        return phase
    factor = -(-phase.context // config.max_context)
    return phase.model_copy(update={"context": config.max_context, "rows": phase.rows * factor})


def finish(
    run: RaiseRun,
    name: str,
    model: LlamaLM,
    learned: list[Outcome],
    phase: Phase,
    *,
    parents: tuple[str, ...] = (),
    other_bytes: int = 0,
) -> Outcome:
    """Save a stage's model with its lineage and return the stage's outcome.

    ``learned`` has the costs of its phases. ``other_bytes`` is memory for other things than the model in
    training, such as a teacher and dialogs.
    """
    found = {parent: load_lineage(run.folder / parent) for parent in parents}
    shards = run.data.shards("student" if name in ("student", "control") else "teacher")
    lineage = Lineage(
        name=f"{run.plan.name}-{name}",
        stage=name,
        parents={parent: of.weights_hash for parent, of in found.items() if of and of.weights_hash},
        recipe={"mode": run.plan.mode, "seed": run.plan.seed, **phase.model_dump()},
        data_hash=shards.sha256 if shards else None,
    )
    save_model(run.folder / name, model, run.data.tokenizer, lineage=lineage)
    return Outcome(
        model=name,
        n_params=model.config.n_params,
        tokens=sum(part.tokens for part in learned),
        flops=sum(part.flops for part in learned),
        earlier_seconds=sum(part.earlier_seconds for part in learned),
        predicted_bytes=kept_nbytes(model.config, phase.rows, phase.context, average=True) + other_bytes,
    )


def text_prompts(tokenizer: Tokenizer) -> list[Prompt]:
    """Return the texts that a base model continues in live samples."""
    texts = ("def area(", "Return the", "import os\n", "The ", "Die ")
    return [Prompt(text, tokenizer.encode(text, bos=True)) for text in texts]


def chat_prompts(tokenizer: Tokenizer) -> list[Prompt]:
    """Return the questions that an instruct model answers in live samples. `herd chat` suggests them too."""
    prompts = []
    for dialog in (*showcase_dialogs("en"), *showcase_dialogs("de")):
        ids = render(
            dialog.prompt, tokenizer, tool_call_format=dialog.tool_call_format, generation_prompt=True
        ).ids
        prompts.append(Prompt(f"{dialog.prompt[-1]['content']} → ", ids))
    return prompts
