"""Make and train the students of a shrink run: label, prune, recover, measure.

Every step is a cell of the run folder (`cells.py`), so an interrupted run continues where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Lineage, ModelSource, checkpoint_hash, load_model, load_trainable, save_model
from ..checkpoint.adapter_config import refuse_adapter
from ..data.stream import Stream, first_rows
from ..data.targets import INDEX, Targets, TargetsSpec, read_spec
from ..dtypes import torch_dtype
from ..errors import CheckpointError, ConfigError
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..text import Tokenizer
from ..train import AdamW, train
from ..train.config import TrainConfig
from ..train.objectives import lm
from ..train.parallel import device_of_rank
from ..train.recipe import read_recipe
from ..train.run import run_recipe
from .cells import LR_WIDTH, SWEEP, Cells
from .importance import Importance, best_block, importance, random_importance, uniform_layers
from .label import draw, label
from .material import Material
from .measure import Estimate, Quality, StudentEvaluator
from .own_words import write_own_text
from .prune import check_target, choose, cut
from .recovery import Arm, write_recipe
from .scores import probes, task_scores
from .speeds import Speeds, probe_labelling, probe_training
from .vocab import VocabCut, cut_vocabulary, trim_model

SHARD_ROWS = 64


class StudentPipeline:
    """The steps from a teacher and text to measured students, each a cell of the run's folder."""

    def __init__(self, cells: Cells) -> None:
        self.cells, self.settings = cells, cells.settings
        s = self.settings
        self.source = ModelSource(s.model)
        if self.source.adapter is not None:
            refuse_adapter(self.source.adapter, "herd shrink")
        self.config = self.source.config
        found = self.source.tokenizer
        if found is None:
            raise CheckpointError(f"{s.model}: has no tokenizer, without which text cannot be read")
        self.tokenizer: Tokenizer = found
        if (largest := max(s.vocab, default=0)) > self.config.vocab_size:
            raise ConfigError(f"--vocab {largest} exceeds the teacher's {self.config.vocab_size}: give less")
        if not s.own_text:
            Material(s.text, s.dialogs, s.heldout)  # refuses a run without text
        self.compute = torch_dtype(s.dtype)
        self.device = device_of_rank()
        self.rate_factor = 1.0  # of the usual learning rate (a sweep sets it)

    # The teacher and its text in a vocabulary ---------------------------------------------------------------

    @cached_property
    def material(self) -> Material:
        """The text, which the teacher writes first if it is to be its own."""
        s = self.settings
        if not s.own_text:
            return Material(s.text, s.dialogs, s.heldout)
        folder, n_tokens = self.cells.folder / "own", max(s.tokens, s.race_tokens)

        what = "writing text with the teacher"
        show = self.cells.progress(what, "token")

        def work() -> dict[str, Any]:
            write_own_text(
                lambda: self.source.load().eval(), self.tokenizer, folder, n_tokens, s.seed,
                lambda total: show(total, n_tokens, ""),
            )  # fmt: skip
            return {"tokens": n_tokens}

        self.cells.run("own-text", what, None, work)
        pattern = str(folder / "*.jsonl")
        if self.tokenizer.chat is None:
            return Material((*s.text, pattern), s.dialogs, s.heldout)
        return Material(s.text, (*s.dialogs, pattern), s.heldout)

    @cached_property
    def teacher(self) -> LlamaLM:
        """The teacher in the compute dtype, frozen."""
        return load_trainable(self.source.path, self.compute, self.device).requires_grad_(False).eval()

    @cached_property
    def teacher_hash(self) -> str:
        """The hash of the teacher's weights."""
        what = "hashing the weights of the teacher"
        found = self.cells.run(
            "teacher-hash", what, None, lambda: {"hash": checkpoint_hash(self.source.path)}
        )
        return str(found["hash"])

    @cached_property
    def corrected(self) -> dict[str, Any]:
        """The cell of the teacher that was trained on the text for a short time (arXiv 2408.11796)."""
        s, folder = self.settings, self.cells.folder / "teacher"
        what = f"training the teacher on {s.correct_tokens:,} tokens of the text"
        show = self.cells.progress(what, "step")

        def work() -> dict[str, Any]:
            model = load_trainable(self.source.path, torch.float32, self.device)
            config = TrainConfig(
                **s.train_section(s.steps(s.correct_tokens)), save_every=50, seed=s.seed,
                optimizer=AdamW(lr=min(SWEEP) * LR_WIDTH / self.config.dim, weight_decay=0.0),
            )  # fmt: skip
            result = train(
                model, self.stream(self.config.vocab_size)[0], lm, config, folder,
                on_step=lambda record: show(record["step"], config.steps, ""),
            )  # fmt: skip
            lineage = Lineage(name="teacher", stage="corrected", parents={"teacher": self.teacher_hash})
            hash_ = save_model(folder / "model", model, self.tokenizer, lineage=lineage, dtype=self.compute)
            shutil.rmtree(folder / "state", ignore_errors=True)
            return {"hash": hash_, "tokens": result.tokens, "flops": result.flops, "seconds": result.seconds}

        predicted = self.speeds(self.config).train_seconds(s.correct_tokens, self.config)
        return self.cells.run("teacher-corrected", what, predicted, work)

    @cached_property
    def labeller(self) -> tuple[LlamaLM, str]:
        """The teacher that labels, and the hash of its weights: the corrected one, if there is one."""
        if not self.settings.correct_tokens:
            return self.teacher, self.teacher_hash
        found = str(self.corrected["hash"])
        path = self.cells.folder / "teacher" / "model"
        return load_trainable(path, self.compute, self.device).requires_grad_(False).eval(), found

    @lru_cache(maxsize=8)  # noqa: B019 -- one pipeline per process
    def cut(self, vocab: int) -> VocabCut | None:
        """Return the vocabulary trimmed to the tokens that the text uses most, or None for the teacher's."""
        if vocab == self.config.vocab_size:
            return None

        def work() -> dict[str, Any]:
            return {"counts": sorted(self.material.counts(self.tokenizer).items())}

        what = "counting the tokens of the text"
        counts = dict(self.cells.run("token-counts", what, None, work)["counts"])
        return cut_vocabulary(self.tokenizer, vocab, self.config.vocab_size, counts)

    def tokenizer_of(self, vocab: int) -> Tokenizer:
        """Return the student's tokenizer."""
        found = self.cut(vocab)
        return self.tokenizer if found is None else found.tokenizer

    @lru_cache(maxsize=8)  # noqa: B019
    def stream(self, vocab: int) -> tuple[Stream, str]:
        """Return the rows of the text in a vocabulary, and their hash."""
        s, folder = self.settings, self.cells.folder / f"text-{vocab}"
        return self.material.stream(self.tokenizer_of(vocab), s.context, folder, s.seed)

    @lru_cache(maxsize=1)  # noqa: B019
    def evaluator(self, vocab: int) -> StudentEvaluator:
        """Return what measures students with a vocabulary on the held-out text."""
        s = self.settings
        documents = self.material.held_out(self.tokenizer_of(vocab), s.heldout_tokens)
        folder = self.cells.folder / f"heldout-{vocab}"
        return StudentEvaluator(
            self.teacher, documents, self.cut(vocab), s.context, self.compute, folder, self._show_batch
        )

    def _show_batch(self, done: int, total: int) -> None:
        if total >= 8 and done % (total // 4) == 0:
            self.cells.say(f"held-out text: {done} of {total} batches")

    # Speed --------------------------------------------------------------------------------------------------

    def speeds(self, student: ModelConfig) -> Speeds:
        """Return the speeds on this machine, which the first call of a run measures with ``student``."""
        s = self.settings

        def work() -> dict[str, Any]:
            cut, spec = self.cut(student.vocab_size), self.spec(student.vocab_size, s.batch_size)
            batch = self.stream(student.vocab_size)[0].batch(0, spec.block_rows)
            labelling = probe_labelling(
                self.config, batch, spec, partial(draw, self.teacher, batch, 0, spec, cut)
            )
            return labelling | probe_training(student, s, self.compute, self.device)

        record = self.cells.run("rates", "measuring the speed of labelling and training", None, work)
        measured = {name: record[name] for name in ("label_flops", "train_flops", "bytes_per_token")}
        return Speeds(self.config, s, **measured)

    # Targets ------------------------------------------------------------------------------------------------

    def spec(self, vocab: int, rows: int, teacher: str = "") -> TargetsSpec:
        """Return the description of the targets of the first ``rows`` rows, rounded up to whole shards.

        ``teacher`` is the hash of the weights that label.
        """
        s = self.settings
        stream, data = self.stream(vocab)
        whole = -(-rows // SHARD_ROWS) * SHARD_ROWS
        return TargetsSpec(
            tokenizer=self.tokenizer_of(vocab).sha256, data=data, teacher=teacher or self.teacher_hash,
            vocab_size=vocab, context=s.context, n_rows=min(whole, stream.n_rows), n_draws=s.n_draws,
            seed=s.seed,
            block_rows=4, shard_rows=SHARD_ROWS,
        )  # fmt: skip

    def targets(self, vocab: int, tokens: int) -> Path:
        """Label ``tokens`` tokens in a vocabulary, unless that is done, and return the folder."""
        s = self.settings
        folder = self.cells.folder / f"targets-{vocab}"
        wanted = s.steps(tokens) * s.batch_size
        teacher, hash_ = self.labeller
        spec = self.spec(
            vocab, max(wanted, read_spec(folder).n_rows if (folder / INDEX).exists() else 0), hash_
        )
        if spec.n_rows < wanted:
            has = f"{spec.n_rows * s.context:,} of the {wanted * s.context:,} tokens that are wanted"
            self.cells.say(f"the text has only {has}; give more text, or they are read several times")
        predicted = self.speeds(self.config.replace(vocab_size=vocab)).label_seconds(spec.n_rows * s.context)

        labelled = spec.n_rows * spec.context
        what = f"labelling {labelled:,} tokens with the teacher" + self._of_vocabulary(vocab)
        show, done = self.cells.progress(what, "row"), 0

        def on_rows(n: int) -> None:
            nonlocal done
            done += n
            show(done, spec.n_rows, "")

        def work() -> dict[str, Any]:
            label(teacher, self.stream(vocab)[0], folder, spec, self.cut(vocab), on_rows)
            return {
                "nbytes": Targets(folder).nbytes,
                "tokens": labelled,
                "flops": labelled * self.config.flops_per_token(s.context / 2),
            }

        self.cells.run(f"label-{vocab}-{spec.n_rows}", what, predicted, work)
        return folder

    def _of_vocabulary(self, vocab: int) -> str:
        return "" if vocab == self.config.vocab_size else f", vocabulary {vocab:,}"

    # Students -----------------------------------------------------------------------------------------------

    def start(self, arm: Arm) -> dict[str, Any]:
        """Make the first weights of an arm and measure them. Return the cell with the quality."""
        folder = self.cells.folder / "arms" / arm.name / "start"
        vocab = arm.config.vocab_size

        def work() -> dict[str, Any]:
            model = self._first_weights(arm)
            lineage = Lineage(name=arm.name, stage=arm.start, parents={"teacher": self.teacher_hash})
            save_model(folder, model, self.tokenizer_of(vocab), lineage=lineage)
            return {
                "quality": self.evaluator(vocab).measure(model.to(self.device).eval()).record(),
                "n_params": arm.config.n_params,
            }

        predicted = self.speeds(arm.config).measure_seconds(arm.config, first=True)
        what = f"making and measuring {replace(arm, lr=None).words(self.config)}, not trained"
        return self.cells.run(f"{arm.name}-start", what, predicted, work)

    def _first_weights(self, arm: Arm) -> LlamaLM:
        vocab, seed = arm.config.vocab_size, self.settings.seed
        if arm.start == "scratch":
            return LlamaLM(arm.config).init_weights(seed + 1)
        whole = self._stored_weights()
        found = self.cut(vocab)
        model = whole if found is None else trim_model(whole, found)
        del whole
        check_target(model.config, arm.config)
        n_drop = model.config.n_layers - arm.config.n_layers
        narrower = arm.config.replace(n_layers=model.config.n_layers) != model.config
        random = arm.start == "random mask" or not narrower  # scores that choose nothing need not be measured
        scores = random_importance(model, seed) if random else self.scores(vocab)
        if not n_drop:
            drop: list[int] = []
        elif arm.start == "pruned":
            drop = self.block(vocab, n_drop)
        elif arm.start == "uniform depth":
            drop = uniform_layers(model.config.n_layers, n_drop)
        else:
            order = torch.randperm(model.config.n_layers - 2, generator=torch.Generator().manual_seed(seed))
            drop = sorted(order[:n_drop].add(1).tolist())
        return cut(model, arm.config, choose(model.config, arm.config, scores, drop))

    def _stored_weights(self) -> LlamaLM:
        """Return the teacher with the weights of its file. Quantized ones are unpacked to fp32."""
        stored = self.source.stored_dtype
        if stored == self.compute:  # a large teacher is not read twice
            return self.teacher
        return load_trainable(self.source.path, stored, self.device).requires_grad_(False)

    def _scored(self, vocab: int) -> LlamaLM:
        found = self.cut(vocab)
        return self.teacher if found is None else trim_model(self.teacher, found).requires_grad_(False)

    @lru_cache(maxsize=2)  # noqa: B019
    def scores(self, vocab: int) -> Importance:
        """Return the importance of heads, neurons and channels for a vocabulary."""

        def work() -> dict[str, Any]:
            batches = first_rows(self.stream(vocab)[0], 4 * self.settings.calibration_rows, 4)
            found = importance(self._scored(vocab), batches)
            return {name: tensor.tolist() for name, tensor in vars(found).items()}

        what = "measuring which heads, neurons and channels matter" + self._of_vocabulary(vocab)
        record = self.cells.run(f"scores-{vocab}", what, None, work)
        return Importance(
            **{name: torch.tensor(record[name]) for name in ("heads_LH", "neurons_LF", "channels_D")}
        )

    def block(self, vocab: int, n_drop: int) -> list[int]:
        """Return the ``n_drop`` layers that are dropped."""
        s = self.settings
        tokens = s.calibration_rows * s.context * (self.config.n_layers - n_drop - 1)
        flops = tokens * self.config.flops_per_token(s.context / 2) * (1 - n_drop / self.config.n_layers)
        predicted = flops / self.speeds(self.config.replace(vocab_size=vocab)).label_flops

        def work() -> dict[str, Any]:
            batches = first_rows(self.stream(vocab)[0], s.calibration_rows, 4)
            return {"layers": list(best_block(self._scored(vocab), n_drop, batches))}

        what = f"finding which {n_drop} of {self.config.n_layers} layers are missed least"
        what += self._of_vocabulary(vocab)
        return list(self.cells.run(f"block-{vocab}-{n_drop}", what, predicted, work)["layers"])

    def trained(self, arm: Arm, tokens: int, labelled: int | None = None) -> dict[str, Any]:
        """Train an arm on ``tokens`` tokens of targets and measure it. Return the cell with the quality.

        ``labelled`` is the number of tokens with targets, if it is not ``tokens``: rows are then read
        repeatedly.
        """
        self.start(arm)
        targets = self.targets(arm.config.vocab_size, labelled or tokens)
        what = f"training {arm.words(self.config)} on {tokens:,} tokens"
        return self._run(arm, what, targets, tokens, "start", self.run_name(arm, tokens), self._rate(arm))

    def run_name(self, arm: Arm, tokens: int) -> str:
        """Return the name of the folder of an arm's training within the arm's."""
        return f"run-{tokens}-lr{self._rate(arm):g}"

    def rounded(self, arm: Arm, source: Path, to: str, tokens: int) -> dict[str, Any]:
        """Distil a trained student in weights of the format ``to``, measure it, and return the cell.

        ``source`` is the student's folder. The result is a folder with a GGUF file.
        """
        s, folder = self.settings, self.cells.folder / "arms" / arm.name
        start = str(source.relative_to(folder))
        targets = self.targets(arm.config.vocab_size, tokens)
        rate = s.learning_rate(arm.config)
        out = f"{start.partition('/')[0]}-{to}-{tokens}-lr{rate:g}"
        what = f"distilling {arm.words(self.config)} in {to} on {tokens:,} tokens"
        return self._run(arm, what, targets, tokens, start, out, rate, to)

    def _run(
        self, arm: Arm, what: str, targets: Path, tokens: int, start: str, out: str, lr: float,
        to: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train an arm by a recipe (`write_recipe`) as a cell, measure the student, and return the cell."""
        folder, show = self.cells.folder / "arms" / arm.name, self.cells.progress(what, "step")

        def work() -> dict[str, Any]:
            recipe = read_recipe(
                write_recipe(
                    arm, self.settings, folder, targets, self.labeller[1], tokens, start, out, lr, to
                )
            )
            steps = recipe.train.steps
            made, result = run_recipe(
                recipe, on_step=lambda record: show(record["step"], steps, f", loss {record['loss']:.3f}")
            )
            student = load_model(made, device=self.device).eval()
            return {
                "quality": self.evaluator(arm.config.vocab_size).measure(student).record(),
                "model": str(made.relative_to(self.cells.folder)), "n_params": arm.config.n_params,
                "tokens": result.tokens, "flops": result.flops, "seconds": result.seconds,
            }  # fmt: skip

        speeds = self.speeds(arm.config)
        predicted = speeds.train_seconds(tokens, arm.config) + speeds.measure_seconds(arm.config)
        record = self.cells.run(f"{arm.name}-{out}", what, predicted, work)
        shutil.rmtree(folder / out / "state", ignore_errors=True)
        return record

    def model_scores(
        self, name: str, who: str, vocab: int, load: Callable[[], LlamaLM]
    ) -> dict[str, Estimate]:
        """Return the scores of a model of the run: copying, looking up, and the tasks that were asked for."""
        s, tokenizer = self.settings, self.tokenizer_of(vocab)
        out = self.cells.folder / "scores" / name

        def work() -> dict[str, Any]:
            model = load().eval()
            of_tasks = task_scores(model, tokenizer, name, name, s.tasks, s.task_data, s.task_limit, out)
            return {"scores": probes(model, tokenizer) | of_tasks}

        what = f"scoring {who}: {', '.join(('copying', 'looking up', *s.tasks))}"
        return dict(self.cells.run(f"scores-{name}", what, None, work)["scores"])

    def _rate(self, arm: Arm) -> float:
        return arm.lr or self.rate_factor * self.settings.learning_rate(arm.config)

    def teacher_quality(self, vocab: int) -> Quality:
        """Return the teacher's own quality in a vocabulary."""

        def work() -> dict[str, Any]:
            return {"quality": self.evaluator(vocab).measure(None).record()}

        what = "measuring the teacher on held-out text" + self._of_vocabulary(vocab)
        record = self.cells.run(f"teacher-{vocab}", what, None, work)
        return Quality(**record["quality"])
