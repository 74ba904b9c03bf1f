"""Shrink a model to a budget: plan shapes, race them, distil the winner, write it with a ledger.

The winner of the race has the fewest bits per byte on held-out text among arms that were distilled on the
same number of tokens. Controls of its shape show what importance and distillation are worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import units
from ..checkpoint import (
    Lineage,
    export_gguf,
    load_lineage,
    load_model,
    open_source,
    quantize_folder,
    save_model,
)
from ..checkpoint.gguf_folder import GGUFSource, write_gguf_folder
from ..checkpoint.paths import GENERATION, SIDE_FILES, read_kept, write_kept
from ..errors import CheckpointError, ConfigError
from ..evals.tasks import make_task
from ..llama.config import ModelConfig
from ..plan.ways import GGUF_FORMATS, Target
from ..quant.mixtures import named_scheme
from .arms import StudentPipeline
from .cells import SWEEP, Cells, ShrinkSettings
from .ledger import LedgerStep, write_ledger
from .measure import Estimate, Quality
from .recovery import Arm
from .scores import open_data
from .shapes import Budget, Shape, plan_shapes, predicted_loss_increase, resident_nbytes

EXPORTED_KL = 0.005
"""Largest KL, in nats per token, of the exported folder (rounded to bf16) from the trained model."""
PLAIN = ("bf16", "f16", "f32")
"""Formats that are not quantized."""
CONTROLS = ("random mask", "uniform depth", "scratch")
"""Initial weights of the controls. Those from scratch train on text alone, with equal FLOPs."""


@dataclass(frozen=True)
class Shrunk:
    """The result: the student's folder, its ledger, and the reasons for which it failed."""

    folder: Path
    ledger: dict[str, Any]
    failures: list[str]


class Shrinker:
    """A shrink run in a folder."""

    def __init__(
        self,
        folder: Path,
        settings: ShrinkSettings,
        say: Callable[[str], None] = lambda line: None,
        target: Target | None = None,
    ) -> None:
        self.folder, self.settings, self.say = folder, settings, say
        self.pipeline = StudentPipeline(Cells(folder, settings, say))
        self.shapes = self._shapes(target)

    # The plan -----------------------------------------------------------------------------------------------

    def _shapes(self, target: Target | None) -> list[Shape]:
        s, teacher = self.settings, self.pipeline.config
        if s.context > teacher.max_context:
            raise ConfigError(f"--context {s.context} exceeds the teacher's {teacher.max_context}: give less")
        open_data(s.task_data)
        for task in s.tasks:
            make_task(task)
        sizes = s.vocab or (teacher.vocab_size,)
        shapes = self._shapes_of(sizes, target)
        formats = [s.gguf or shape.weights for shape in shapes]
        for shape, name in zip(shapes, formats, strict=True):
            if name not in PLAIN:
                # raises for an unknown format, and for rows with an incomplete block
                named_scheme(name, shape.config).plan(shape.config)
        if s.qad_tokens and set(formats) <= set(PLAIN):
            raise ConfigError(
                "--qad-tokens distils the student in a packed format: give --gguf, e.g. --gguf q4"
            )
        return shapes

    def _shapes_of(self, sizes: Sequence[int], target: Target | None) -> list[Shape]:
        s, teacher = self.settings, self.pipeline.config
        if s.to is None and not s.vocab and s.gguf is not None and s.qad_tokens:
            return [Shape(teacher, "bf16", "bf16", 0.0)]  # only the format changes
        if s.to is None:
            if len(sizes) != 1 or sizes[0] >= teacher.vocab_size:
                raise ConfigError("give --to BUDGET, or one --vocab smaller than the teacher's vocabulary")
            config = teacher.replace(vocab_size=sizes[0])
            return [Shape(config, "bf16", "bf16", predicted_loss_increase(teacher, config))]
        shapes = plan_shapes(teacher, Budget.parse(s.to, teacher.max_context), sizes, s.arms, target)
        if shapes[0].loss_increase == 0:
            size = f"{teacher.n_params:,} parameters"
            raise ConfigError(
                f"--to {s.to}: {s.model} with {size} meets this budget as it is; give a smaller"
            )
        return shapes

    def arm(self, shape: Shape) -> Arm:
        """Return the arm of a shape."""
        return Arm(shape.label(self.pipeline.config), shape.config)

    @property
    def races(self) -> bool:
        """Whether shapes are raced."""
        return self.settings.to is not None and self.settings.race_tokens > 0

    def controls(self, winner: Arm) -> list[Arm]:
        """Return the controls of the winner's shape. Uniform depth makes sense only if layers are dropped."""
        teacher = self.pipeline.config
        pruned = winner.config != teacher.replace(vocab_size=winner.config.vocab_size)
        shallower = winner.config.n_layers < teacher.n_layers
        made = {"random mask": pruned, "uniform depth": shallower, "scratch": pruned}
        return [
            replace(
                winner,
                name=f"{winner.name}-{start.replace(' ', '-')}",
                start=start,
                distilled=start != "scratch",
            )
            for start in CONTROLS
            if made[start]
        ]

    # The run ------------------------------------------------------------------------------------------------

    def run(self) -> Shrunk:
        """Run all cells that are not finished, write the student and the ledger, and return them."""
        pipeline, s = self.pipeline, self.settings
        pipeline.speeds(self.shapes[0].config)
        steps = [self._teacher_step()]
        shape, raced = self.race() if self.races else (self.shapes[0], [])
        if not self.races:
            self.sweep()
        winner = self.arm(shape)
        vocab = winner.config.vocab_size
        trimmed = Arm(f"v{vocab}", pipeline.config.replace(vocab_size=vocab))
        if vocab != pipeline.config.vocab_size and trimmed.name != winner.name:
            steps.append(self._untrained(trimmed, "vocabulary trimmed, not trained"))
        start = self._untrained(winner, "pruned, not trained")
        if not self.is_teacher(winner):
            start.scores = self._scores("start", "not trained", winner, self.trained_folder(winner, 0))
            steps.append(start)
        steps += raced
        if s.tokens and not self.is_teacher(winner):
            final = self._step(winner, s.tokens, "distilled")
            if final.name not in {step.name for step in steps}:
                final.better_than |= {step.name: step.quality for step in raced if step.control}
                steps.append(final)
            distilled = next(step for step in steps if step.name == final.name)
            run = self._run_name(winner, s.tokens)
            folder = self.trained_folder(winner, s.tokens)
            distilled.scores = self._scores(run, "distilled", winner, folder)
        source = self.trained_folder(winner, s.tokens)
        folder = self._export(winner, shape, load_model(source))
        format_name = s.gguf or shape.weights
        if format_name not in PLAIN:
            steps += self._quantized_steps(winner, source, folder, format_name)
        elif s.gguf is not None:
            export_gguf(folder, self.folder / f"{self._name(winner)}-{format_name}.gguf", format_name)
        fraction = winner.config.n_params / pipeline.config.n_params
        title = f"{self._name(winner)}: {fraction:.0%} of the teacher's parameters"
        ledger = write_ledger(self.folder, title, steps, self._facts(shape))
        return Shrunk(folder, ledger, list(ledger["worse"]))

    def race(self) -> tuple[Shape, list[LedgerStep]]:
        """Distil every arm on the race's tokens. Return the best shape, and all arms and controls as steps.

        A shape that is planned for quantized weights is judged with them.
        """
        s = self.settings
        self.sweep()
        arms = [self.arm(shape) for shape in self.shapes]
        steps = [self._step(arm, s.race_tokens, "raced") for arm in arms]
        measured = [
            _bits_per_byte(self._as_planned(shape, step.quality))
            for shape, step in zip(self.shapes, steps, strict=True)
        ]
        best = min(range(len(steps)), key=measured.__getitem__)
        for control in self.controls(arms[best]):
            tokens = s.race_tokens if control.distilled else self.equal_flops(control.config)
            step = self._step(control, tokens, f"control: {control.start}")
            step.control = True
            steps.append(step)
            steps[best].better_than[step.name] = step.quality
        predicted = [shape.loss_increase for shape in self.shapes]
        if len(predicted) > 2:
            found = rank_correlation(predicted, measured)
            self.say(f"rank correlation of the predicted with the measured order: {found:.2f}")
        return self.shapes[best], steps

    def sweep(self) -> None:
        """Set the learning rate of all arms to the best one of a short training of the first shape."""
        s, arm = self.settings, self.arm(self.shapes[0])
        if s.lr is not None or not s.sweep_tokens or not (s.tokens or s.race_tokens) or self.is_teacher(arm):
            return
        measured = {}
        for factor in SWEEP:
            tried = replace(arm, lr=factor * s.learning_rate(arm.config))
            record = self.pipeline.trained(tried, s.sweep_tokens)
            measured[factor] = _bits_per_byte(Quality(**record["quality"]))
        self.pipeline.rate_factor = min(measured, key=measured.__getitem__)
        best = self.pipeline.rate_factor * s.learning_rate(arm.config)
        self.say(f"best of {len(SWEEP)} learning rates: {best:.2g}")

    def _as_planned(self, shape: Shape, quality: Quality) -> Quality:
        """Return the quality of a raced shape in the format of weights that is planned for it."""
        if shape.weights in PLAIN:
            return quality
        arm, tokens = self.arm(shape), self.settings.race_tokens
        return self.quantized(arm, self.trained_folder(arm, tokens), tokens, shape.weights)

    def is_teacher(self, arm: Arm) -> bool:
        """Return whether an arm is the whole teacher, which meets the budget in smaller formats alone."""
        return arm.config == self.pipeline.config

    def _teacher_step(self) -> LedgerStep:
        pipeline, config = self.pipeline, self.pipeline.config
        step = LedgerStep("teacher", self.settings.model, config.n_params, config.nbytes(),
                          pipeline.teacher_quality(config.vocab_size))  # fmt: skip
        step.scores = pipeline.model_scores(
            "teacher", "the teacher", config.vocab_size, lambda: pipeline.teacher
        )
        return step

    def _scores(self, made: str, how: str, arm: Arm, folder: Path) -> dict[str, Estimate]:
        """Return the scores of the model in ``folder``, which is what ``made`` in the arm's folder is.

        ``how`` says in words how it was made.
        """
        who, vocab = f"{arm.words(self.pipeline.config)}, {how}", arm.config.vocab_size
        return self.pipeline.model_scores(
            f"{arm.name}-{made}", who, vocab, lambda: load_model(folder, device=self.pipeline.device)
        )

    def _untrained(self, arm: Arm, what: str) -> LedgerStep:
        record = self.pipeline.start(arm)
        config = arm.config
        return LedgerStep(
            f"{arm.name}, start", what, config.n_params, config.nbytes(), Quality(**record["quality"])
        )

    def equal_flops(self, config: ModelConfig) -> int:
        """Return the tokens of text that a student trains on for the FLOPs of the distilled race."""
        own = config.flops_per_token(self.settings.context / 2, training=True)
        teacher = self.pipeline.config.flops_per_token(self.settings.context / 2)
        return round(self.settings.race_tokens * (1 + teacher / own))

    def _step(self, arm: Arm, tokens: int, what: str) -> LedgerStep:
        if self.is_teacher(arm):
            return self._untrained(arm, "the whole teacher, in smaller formats")
        s, teacher = self.settings, self.pipeline.config
        record = self.pipeline.trained(arm, tokens, s.race_tokens if not arm.distilled else None)
        charged = record["tokens"] * teacher.flops_per_token(s.context / 2) if arm.distilled else 0.0
        step = LedgerStep(
            f"{arm.name}, {tokens:,} tokens", what, arm.config.n_params, arm.config.nbytes(),
            Quality(**record["quality"]), record["tokens"], record["flops"], charged, record["seconds"],
        )  # fmt: skip
        if arm.start == "pruned":
            step.better_than[f"{arm.name}, start"] = Quality(**self.pipeline.start(arm)["quality"])
        return step

    # The student --------------------------------------------------------------------------------------------

    def _run_name(self, arm: Arm, tokens: int) -> str:
        return self.pipeline.run_name(arm, tokens) if tokens and not self.is_teacher(arm) else "start"

    def trained_folder(self, arm: Arm, tokens: int) -> Path:
        """Return the folder of an arm after its training on ``tokens``, or (0) before it."""
        name = self._run_name(arm, tokens)
        return self.folder / "arms" / arm.name / name / ("" if name == "start" else "model")

    def _name(self, arm: Arm) -> str:
        """Return the student's name. What is made from Meta's Llamas must be named Llama first."""
        known = load_lineage(self.pipeline.source.path)
        base = known.name if known is not None else self.pipeline.source.path.stem
        name = f"{base}-{arm.name}"
        licence = (self._licence() or "").lower()
        return name if "llama" not in licence or name.lower().startswith("llama") else f"Llama-{name}"

    def _licence(self) -> str | None:
        known = self.pipeline.source.lineage
        if known is not None and known.licence:
            return known.licence
        if self.pipeline.source.file is None:
            return None
        return GGUFSource(self.pipeline.source.file).licence

    def _export(self, arm: Arm, shape: Shape, model: Any) -> Path:
        """Write the student in bf16, and compare what was written with the trained model."""
        folder = self.folder / "model"
        lineage = Lineage(
            name=self._name(arm), stage="distilled", parents={"teacher": self.pipeline.teacher_hash},
            licence=self._licence(), recipe=self.settings.model_dump(mode="json")
            | {"run_in": {"weights": shape.weights, "kv": shape.kv}},
        )  # fmt: skip
        tokenizer = self.pipeline.tokenizer_of(arm.config.vocab_size)
        save_model(folder, model, tokenizer, lineage=lineage, dtype=torch.bfloat16)
        write_kept(
            folder, read_kept(self.pipeline.source.path, tuple(n for n in SIDE_FILES if n != GENERATION))
        )
        tokens_BT = self.pipeline.stream(arm.config.vocab_size)[0].batch(0, 1).tokens_BT
        written = load_model(folder, dtype=torch.float32)
        with torch.inference_mode():
            log_p, log_q = (m.float().logits(tokens_BT).log_softmax(-1) for m in (model, written))
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        if not kl <= EXPORTED_KL:
            raise CheckpointError(
                f"{folder}: the written model differs from the trained one by {kl:.3g} nats per token; "
                f"bf16 explains at most {EXPORTED_KL}: do not use it, and report this"
            )
        self.say(f"{folder}: as written, {kl:.2g} nats per token from the trained weights")
        return folder

    def _rounded_name(self, arm: Arm, tokens: int, format_name: str) -> str:
        return f"{format_name}-{self._run_name(arm, tokens)}"

    def quantized(self, arm: Arm, source: Path, tokens: int, format_name: str) -> Quality:
        """Quantize ``source``, the arm after its training on ``tokens``, and return its quality."""
        name = self._rounded_name(arm, tokens, format_name)
        folder = self.folder / "arms" / arm.name / name

        def work() -> dict[str, Any]:
            quantize_folder(open_source(str(source)), folder, named_scheme(format_name, arm.config))
            student = load_model(folder, device=self.pipeline.device).eval()
            return {"quality": self.pipeline.evaluator(arm.config.vocab_size).measure(student).record()}

        what = f"rounding {arm.words(self.pipeline.config)} to {format_name} and measuring it"
        return Quality(**self.pipeline.cells.run(f"{arm.name}-{name}", what, None, work)["quality"])

    def _quantized_steps(self, arm: Arm, source: Path, exported: Path, format_name: str) -> list[LedgerStep]:
        """Round the student to a format, distil it there if asked, and write the better of the two."""
        s, config = self.settings, arm.config
        quality = self.quantized(arm, exported, s.tokens, format_name)
        best = plain = self.folder / "arms" / arm.name / self._rounded_name(arm, s.tokens, format_name)
        nbytes = (plain / "model.gguf").stat().st_size
        what = f"quantized to {format_name}"
        steps = [LedgerStep(f"{arm.name}, {format_name}", what, config.n_params, nbytes, quality)]
        if s.qad_tokens:
            record = self.pipeline.rounded(arm, source, format_name, s.qad_tokens)
            teacher_flops = record["tokens"] * self.pipeline.config.flops_per_token(s.context / 2)
            step = LedgerStep(
                f"{arm.name}, {format_name}, {s.qad_tokens:,} tokens", f"distilled in {format_name}",
                config.n_params,
                nbytes, Quality(**record["quality"]), record["tokens"], record["flops"], teacher_flops,
                record["seconds"], better_than={steps[0].name: quality},
            )  # fmt: skip
            steps.append(step)
            if _bits_per_byte(step.quality) < _bits_per_byte(quality):
                best = self.folder / record["model"]
        made = (plain if best == plain else best.parent).name
        self._write_packed(GGUFSource(best / "model.gguf"), exported, self.folder / f"model-{format_name}")
        packed = self.folder / f"model-{format_name}"
        steps[-1].scores = self._scores(made, f"in {format_name}", arm, packed)
        return steps

    def _write_packed(self, packed: GGUFSource, exported: Path, out: Path) -> None:
        """Write a packed student to ``out`` with the exported one's name, licence and side files."""
        known = load_lineage(exported)
        assert known is not None
        kept = read_kept(exported, SIDE_FILES)
        write_gguf_folder(out, packed.content(known.name), lambda: known, extra_files=kept)

    def _facts(self, shape: Shape) -> dict[str, Any]:
        s = self.settings
        facts: dict[str, Any] = {
            "teacher": s.model,
            "budget": s.to or f"vocabulary {shape.config.vocab_size:,}",
            "context": s.context,
            "seed": s.seed,
            "learning rate": f"{self.pipeline.rate_factor * s.learning_rate(shape.config):.2g}",
        }
        if s.correct_tokens:
            facts["teacher corrected"] = (
                f"on {self.pipeline.corrected['tokens']:,} tokens of the text, then labelled"
            )
        if s.to is not None and s.to.startswith("memory"):
            budget = Budget.parse(s.to, self.pipeline.config.max_context)
            found = next(f for f in GGUF_FORMATS if f.name == shape.weights)
            size = units.nbytes(resident_nbytes(shape.config, found, shape.kv, budget.context))
            facts["run with"] = (
                f"{shape.weights} weights, {shape.kv} cache, {budget.context:,} tokens: {size}"
            )
        return facts


def _bits_per_byte(quality: Quality) -> float:
    return math.fsum(quality.bits) / math.fsum(quality.n_bytes)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two lists without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    n = len(a)
    squares = sum((x - y) ** 2 for x, y in zip(*ranks, strict=True))
    return 1 - 6 * squares / (n * (n * n - 1))
