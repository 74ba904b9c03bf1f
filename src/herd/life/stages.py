"""The stages of a life, one function each: from text to tokenizer, teacher, long context, instruct model and students.

Each returns what it took as an `Outcome`. Measuring and the page are in `measure.py`, order and resuming in `run.py`.
Sources: "The Llama 3 Herd of Models" sections 3.4 and 4; Minitron (arXiv 2407.14679) for the student.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from ..checkpoint import Lineage, load_lineage, load_model, save_model
from ..data.corpus import corpus_origin, load_corpus
from ..data.dialogs import make_dialogs, showcase_dialogs, training_texts
from ..data.origin import bind
from ..data.stream import MixStream
from ..distill import prune
from ..evals.needle import needle
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..text import Tokenizer, render
from ..train import distil, lm, sft
from ..train.heldout import heldout_loss
from ..train.memory import MASTER, kept_nbytes, loss_nbytes
from .learn import Learned, Prompt, evaluation_rows, learn
from .material import DIALOG_NBYTES, RaiseData, bytes_per_token, is_parallel, numbers
from .plan import Phase, extended
from .run import Outcome, RaiseRun

NEEDLE_SEED = 424_242
"""Needles of the gates; the final measurement uses others."""
SHORT_LOSS_BAR = 1.05
"""A longer context may cost this factor of short-context loss at most."""
NEEDLE_BAR = 0.8
"""Share of needles found at the new length that lets a stage go on."""
MIN_VOCAB_FOR_NUMBERS = 2048


def bind_text(run: RaiseRun, prepared: Path) -> None:
    """Tie the run's data to the content of its text. `DataError` if it changed after ``prepared`` was made."""
    plan = run.plan
    files, settings = corpus_origin(plan.text)
    settings |= {"seed": plan.seed, "corpus_bytes": plan.corpus_bytes, "vocab_size": plan.vocab_size}
    cure = "Restore the text, or raise a new herd under another --name"
    bind(run.folder, files, settings, prepared=[prepared], cure=cure)


def make_tokenizer(run: RaiseRun) -> Outcome:
    """Corpus to splits, byte-level BPE, and token shards."""
    plan, material = run.plan, RaiseData(run.plan, run.folder)
    run.show.advance(0.05, "reading")
    corpus = load_corpus(plan.text, max_bytes=plan.corpus_bytes)
    run.show.advance(0.4, "learning merges")
    dialogs = make_dialogs(4000, plan.seed, split="train")
    few = [
        d.text for d in corpus.splits["teacher"] if is_parallel(d)
    ] * 8  # small, but every language needs its words
    texts = chain((d.text for d in corpus.splits["teacher"]), few, training_texts(dialogs))
    if plan.vocab_size >= MIN_VOCAB_FOR_NUMBERS:
        texts = chain(texts, numbers())
    tokenizer = Tokenizer.train(texts, plan.vocab_size)
    tokenizer.save(run.folder / "tokenizer")
    for done, split in enumerate(("teacher", "student", "heldout")):
        run.show.advance(0.6 + 0.13 * done, f"writing {split} tokens")
        material.write_shards(split, corpus.splits[split], tokenizer)
    material.require_rows(corpus.n_bytes)
    bind_text(run, run.folder / "tokenizer")  # refuses text that was edited while it was read
    density = bytes_per_token(corpus, tokenizer)
    counts = {
        split: {kind: {"documents": n, "bytes": size} for kind, (n, size) in of.items()}
        for split, of in corpus.counts().items()
    }
    return Outcome(
        notes=list(corpus.notes),
        extra={"bytes_per_token": density, "vocab_size": tokenizer.vocab_size, "corpus": counts},
    )


def pretrain(run: RaiseRun) -> Outcome:
    """The teacher from nothing: next-token prediction, the rate decayed to zero, the last weights averaged."""
    plan, material = run.plan, RaiseData(run.plan, run.folder)
    config = plan.teacher_config
    model = LlamaLM(config).init_weights(plan.seed, std=init_std(config))
    heldout = evaluation_rows(material.text("heldout", plan.pretrain.context, 0), plan.eval_rows)
    stream = material.pretraining(plan.pretrain.context)
    learned = learn(
        run,
        "teacher",
        model,
        stream,
        lm,
        plan.pretrain,
        tokenizer=material.tokenizer,
        prompts=text_prompts(material.tokenizer),
        heldout=heldout,
    )
    keep(run, "teacher", model, material.tokenizer, parents=(), phase=plan.pretrain)
    outcome = trained("teacher", config, [learned], plan.pretrain)
    outcome.extra["heldout_loss"] = heldout_loss(model, heldout)
    return outcome


def extend(run: RaiseRun) -> Outcome:
    """Longer context in steps, each gated by short-context loss and by needles; the last model that passed stays."""
    plan, material = run.plan, RaiseData(run.plan, run.folder)
    tokenizer = material.tokenizer
    model = load_model(run.folder / "teacher")
    short = evaluation_rows(material.text("heldout", plan.pretrain.context, 0), plan.eval_rows)
    before = heldout_loss(model, short)
    unseen = material.filler("heldout")
    outcome, learned = Outcome(), []
    passed = model
    for number, phase in enumerate(plan.extend):
        context = phase.context
        model = stretch(passed, context)
        text = material.text("teacher", context, plan.seed + context)
        retrieval = material.retrieval(context)
        stream = MixStream([text, retrieval], [0.6, 0.4], plan.seed)
        learned.append(
            learn(
                run,
                f"long/{context}",
                model,
                stream,
                lm,
                phase,
                tokenizer=tokenizer,
                prompts=text_prompts(tokenizer),
                heldout=evaluation_rows(
                    material.text("heldout", context, 0), plan.eval_rows * plan.pretrain.context // context
                ),
                progress=(number / len(plan.extend), (number + 1) / len(plan.extend)),
            )
        )
        after = heldout_loss(model, short)
        found = needle(model, tokenizer, unseen, [context], n=plan.needle_items, seed=NEEDLE_SEED).value
        at = f"at {context} tokens"
        bar = before * SHORT_LOSS_BAR
        loss_ok = outcome.gate(f"short-context loss {at}", after <= bar, after, bar, "nats/token")
        needle_ok = outcome.gate(f"needles found {at}", found >= NEEDLE_BAR, found, NEEDLE_BAR, "fraction")
        run.show.gate(f"short-context loss {at}", loss_ok, f"{after:.3f} nats/token, was {before:.3f}")
        run.show.gate(f"needles found {at}", needle_ok, f"{found:.0%}, at least {NEEDLE_BAR:.0%}")
        if not (loss_ok and needle_ok):
            outcome.notes.append(
                f"the gate at {context} tokens was not passed: the stage stops and keeps {passed.config.max_context}"
            )
            break
        passed = model
    keep(run, "long", passed, tokenizer, parents=("teacher",), phase=plan.extend[-1])
    done = trained("long", passed.config, learned, plan.extend[-1])
    done.gates, done.notes = outcome.gates, outcome.notes
    done.extra["max_context"] = passed.config.max_context
    return done


def instruct(run: RaiseRun) -> Outcome:
    """Dialogs with tools, trained on what the assistant says, packed."""
    plan, material = run.plan, RaiseData(run.plan, run.folder)
    tokenizer = material.tokenizer
    model = load_model(run.folder / "long")
    phase = fitted(plan.instruct, model.config)
    heldout = evaluation_rows(material.text("heldout", phase.context, 0), plan.eval_rows // 2)
    learned = learn(
        run,
        "instruct",
        model,
        material.instruct(phase.context),
        sft,
        phase,
        tokenizer=tokenizer,
        prompts=chat_prompts(tokenizer),
        heldout=heldout,
    )
    keep(run, "instruct", model, tokenizer, parents=("long",), phase=phase)
    return trained("instruct", model.config, [learned], phase, besides=plan.n_dialogs * DIALOG_NBYTES)


def student(run: RaiseRun) -> Outcome:
    """Cut out of the instruct model by importance, then taught by it: forward KL on logits, tau 1."""
    plan, material = run.plan, RaiseData(run.plan, run.folder)
    teacher = load_model(run.folder / "instruct").requires_grad_(False).eval()
    phase = fitted(plan.distil, teacher.config)
    stream = material.student(phase.context)
    target = student_config(plan.student_config, teacher.config)
    calibration = [stream.batch(start, 8) for start in (0, 8)]
    model, kept = prune(teacher, target, calibration)
    heldout = evaluation_rows(material.text("heldout", phase.context, 0), plan.eval_rows // 2)
    before = heldout_loss(model, heldout)
    learned = learn(
        run,
        "student",
        model,
        stream,
        distil(teacher),
        phase,
        tokenizer=material.tokenizer,
        prompts=chat_prompts(material.tokenizer),
        heldout=heldout,
    )
    keep(run, "student", model, material.tokenizer, parents=("instruct",), phase=phase)
    listening = MASTER * teacher.config.n_params + loss_nbytes(teacher.config, phase.rows, phase.context)
    outcome = trained(
        "student", target, [learned], phase, besides=listening + material.n_lessons * DIALOG_NBYTES
    )
    outcome.extra["layers_kept"] = kept.layers
    outcome.extra["loss_after_pruning"] = before
    return outcome


def control(run: RaiseRun) -> Outcome:
    """The student's architecture from random weights with cross-entropy on the same tokens in the same order."""
    plan, material = run.plan, RaiseData(run.plan, run.folder)
    final = load_model(run.folder / "instruct").config
    phase = fitted(plan.distil, final)
    config = student_config(plan.student_config, final)
    model = LlamaLM(config).init_weights(plan.seed + 1, std=init_std(config))
    learned = learn(
        run,
        "control",
        model,
        material.student(phase.context),
        lm,
        phase,
        tokenizer=material.tokenizer,
        prompts=chat_prompts(material.tokenizer),
        heldout=evaluation_rows(material.text("heldout", phase.context, 0), plan.eval_rows // 2),
    )
    keep(run, "control", model, material.tokenizer, parents=(), phase=phase)
    return trained("control", config, [learned], phase, besides=material.n_lessons * DIALOG_NBYTES)


# Small helpers of the stages -----------------------------------------------------------------------------------------


def init_std(config: ModelConfig) -> float:
    """Weights of a random start: 0.55 / sqrt(D), as 0.02 is for D = 760; at toy widths 0.02 is too flat to begin."""
    return 0.55 / config.dim**0.5


def stretch(model: LlamaLM, context: int) -> LlamaLM:
    """The same weights with Llama 3's rotary scaling for ``context`` tokens."""
    longer = LlamaLM(extended(model.config, context))
    longer.load_state_dict(model.state_dict())
    return longer


def student_config(wanted: ModelConfig, teacher: ModelConfig) -> ModelConfig:
    """The planned shape with the context and the rotary scaling the teacher really ended with."""
    return wanted.replace(rope_scaling=teacher.rope_scaling, max_context=teacher.max_context)


def fitted(phase: Phase, config: ModelConfig) -> Phase:
    """The phase within the model's context; the same tokens in more rows where a gate stopped the extension."""
    if phase.context <= config.max_context:
        return phase
    factor = -(-phase.context // config.max_context)
    return phase.model_copy(update={"context": config.max_context, "rows": phase.rows * factor})


def keep(
    run: RaiseRun, name: str, model: LlamaLM, tokenizer: Tokenizer, parents: tuple[str, ...], phase: Phase
) -> None:
    """Save a checkpoint with its lineage. It is replaced whole if an earlier start left one."""
    found = {parent: load_lineage(run.folder / parent) for parent in parents}
    shards = RaiseData(run.plan, run.folder).shards(
        "student" if name in ("student", "control") else "teacher"
    )
    lineage = Lineage(
        name=f"{run.plan.name}-{name}",
        stage=name,
        parents={parent: of.weights_hash for parent, of in found.items() if of and of.weights_hash},
        recipe={"mode": run.plan.mode, "seed": run.plan.seed, **phase.model_dump()},
        data_hash=shards.sha256 if shards else None,
    )
    save_model(run.folder / name, model, tokenizer, lineage=lineage)


def trained(
    name: str, config: ModelConfig, learned: list[Learned], phase: Phase, besides: int = 0
) -> Outcome:
    """What a training stage reports. ``besides``: bytes it holds that are not the trained model's."""
    return Outcome(
        model=name,
        n_params=config.n_params,
        tokens=sum(part.tokens for part in learned),
        flops=sum(part.flops for part in learned),
        earlier_seconds=sum(part.earlier_seconds for part in learned),
        predicted_bytes=kept_nbytes(config, phase.rows, phase.context, average=True) + besides,
    )


def text_prompts(tokenizer: Tokenizer) -> list[Prompt]:
    """What a base model continues while it learns."""
    texts = ("def area(", "Return the", "import os\n", "The ", "Die ")
    return [Prompt(text, tokenizer.encode(text, bos=True)) for text in texts]


def chat_prompts(tokenizer: Tokenizer) -> list[Prompt]:
    """What an instruct model answers while it learns: the questions `herd chat` opens with."""
    prompts = []
    for dialog in (*showcase_dialogs("en"), *showcase_dialogs("de")):
        messages, tools = list(dialog.prompt), list(dialog.tools) or None
        ids = render(
            messages, tokenizer, tools=tools, tool_call_format=dialog.tool_call_format, generation_prompt=True
        ).ids
        prompts.append(Prompt(str(messages[-1]["content"]) + " → ", ids))
    return prompts
