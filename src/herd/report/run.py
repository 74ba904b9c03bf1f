"""Read the folder of a run: the files that its stages wrote.

Does not import torch. A missing part is not an error.

This is the contract between the stages and the page::

    run.json             name, seed, mode, created, version, text, vocab_size,
                         predicted_seconds {stage: seconds}, optionally stages [name, ...] and
                         speeds {shape: tokens/s} of the probe
    machine.json         machine (from `receipt.describe_machine()`) and commit (from `receipt.git_commit()`)
    stages/NAME/stage.json
                         stage, title, seconds, predicted_seconds, tokens, flops, peak_rss_bytes,
                         predicted_peak_bytes, model (folder, relative to the run, or null), n_params,
                         notes [text], gates [{name, passed, value, bar, unit}]. The tokenizer's also has
                         bytes_per_token {lang: number} and vocab_size
    stages/NAME/**/metrics.jsonl
                         one JSON record per line from the training loop: either step, tokens and loss
                         (nats/token), or step with a held-out loss under one of the names in `EVAL_LOSSES`
                         and accuracies as eval/NAME_accuracy
    scores.json          [{model, name, value, unit, lo, hi, n, detail}, ...]. Names the page knows: bpb, kl,
                         top1, needle, tool_use, code_parse, code_pass, and NAME_vs_MODEL for paired
                         differences. detail may have by_lang, by_form, by_task, by_length
                         {key: number or {value, lo, hi, n}} and grid [{length, depth, value}, ...].
                         Values of the unit "fraction" are shown in percent
    samples.json         [{prompt, outputs: {model: text}}, ...]
    MODEL/herd.json, config.json
                         lineage and shape of each stage's model

A file that cannot be understood is named in `Run.problems`, which the page shows: nothing is left out
silently.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ReportError

Point = tuple[float, float]
ACCURACY = "_accuracy"
"""Ending of the names of accuracies in a log."""
EVAL_LOSSES = ("eval/loss", "eval/heldout_loss", "eval_loss")

_NUMBER, _TEXT, _LIST, _DICT, _ANY = "number", "text", "list", "object", "anything"
# The fields of each file that the page uses, with their types. A value of another type counts as missing, and
# the page names it as a problem.
_PLAN = {
    "name": _TEXT, "mode": _TEXT, "seed": _NUMBER, "created": _TEXT, "version": _TEXT, "command": _TEXT,
    "text": _LIST, "stages": _LIST, "predicted_seconds": _DICT, "speeds": _DICT, "vocab_size": _NUMBER,
}  # fmt: skip
_STAGE = {
    "title": _TEXT, "seconds": _NUMBER, "predicted_seconds": _NUMBER, "tokens": _NUMBER, "flops": _NUMBER,
    "peak_rss_bytes": _NUMBER, "predicted_peak_bytes": _NUMBER, "model": _TEXT, "n_params": _NUMBER,
    "gates": _LIST, "notes": _LIST, "bytes_per_token": _DICT, "vocab_size": _NUMBER, "sha256": _TEXT,
}  # fmt: skip
_MACHINE = {
    "cpu": _TEXT, "cores": _NUMBER, "instruction_set": _TEXT, "isa": _LIST, "memory_bytes": _NUMBER,
    "os": _TEXT, "python": _TEXT, "torch": _TEXT,
}  # fmt: skip
_COMMIT = {"hash": _TEXT, "dirty": _ANY}
_LINEAGE = {"weights_hash": _TEXT, "parents": _DICT}
_CONFIG = {"num_hidden_layers": _NUMBER, "hidden_size": _NUMBER, "max_position_embeddings": _NUMBER}


@dataclass(frozen=True)
class Estimate:
    """A number with its interval (None: no interval) and the number of items behind it."""

    value: float
    lo: float | None = None
    hi: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class ModelScore:
    """A measured quantity of one model.

    ``detail`` maps a breakdown (by_lang, by_form, by_length) to its parts.
    """

    model: str
    name: str
    unit: str
    estimate: Estimate
    detail: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    grid: list[tuple[int, float, float]] = field(default_factory=list)  # (length tokens, depth 0..1, value)


@dataclass(frozen=True)
class LossCurve:
    """The losses of a training: x in tokens, y in nats per token.

    ``accuracies`` are curves of fractions by what was asked ("copy", "lookup").
    """

    name: str
    train: list[Point]
    evals: list[Point]
    accuracies: dict[str, list[Point]] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """A condition that a stage had to meet: ``value`` against ``bar``."""

    name: str
    passed: bool
    value: Any = None
    bar: Any = None
    unit: str = ""


@dataclass(frozen=True)
class Stage:
    """The results and costs of a stage. Values that it did not record are None."""

    name: str
    title: str
    seconds: float | None = None
    predicted_seconds: float | None = None
    tokens: float | None = None
    flops: float | None = None
    peak_rss_bytes: float | None = None
    predicted_peak_bytes: float | None = None
    n_params: int | None = None
    model: str | None = None
    gates: list[Gate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curves: list[LossCurve] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    weight_bytes: int | None = None

    @property
    def model_name(self) -> str | None:
        """The name of the model that the stage made, or the stage's name if only its size is known."""
        return Path(self.model).name if self.model else self.name if self.n_params else None


@dataclass(frozen=True)
class Run:
    """All data of a run for the report page."""

    folder: Path
    name: str
    plan: dict[str, Any]
    machine: dict[str, Any]
    commit: dict[str, Any]
    stages: list[Stage]
    scores: list[ModelScore]
    samples: list[dict[str, Any]]
    problems: list[str]

    @property
    def models(self) -> list[str]:
        """Names of the models: first the models that stages made, in that order, then others with a score."""
        made = [stage.model_name for stage in self.stages if stage.model_name]
        return list(dict.fromkeys([*made, *(score.model for score in self.scores)]))

    def maker(self, model: str) -> Stage | None:
        """Return the stage that made a model."""
        return next((stage for stage in self.stages if stage.model_name == model), None)

    def score(self, model: str, name: str) -> ModelScore | None:
        return next((score for score in self.scores if score.model == model and score.name == name), None)

    def curve(self, name: str) -> LossCurve | None:
        return next((curve for stage in self.stages for curve in stage.curves if curve.name == name), None)


def load_run(folder: Path | str) -> Run:
    """Read a run's folder. Raises `ReportError` only if the folder is not a run."""
    folder = Path(folder)
    if not (folder / "run.json").is_file() and not (folder / "stages").is_dir():
        raise ReportError(
            f"{folder} is not a run: no run.json and no stages/ in it; give the folder `herd raise` made"
        )
    problems: list[str] = []
    plan = _typed(_read_json(folder / "run.json", dict, problems), _PLAN, "run.json", problems)
    where = _read_json(folder / "machine.json", dict, problems)
    where = _typed(where, {"machine": _DICT, "commit": _DICT}, "machine.json", problems)
    machine = _typed(where.get("machine", {}), _MACHINE, "machine.json, machine", problems)
    commit = _typed(where.get("commit", {}), _COMMIT, "machine.json, commit", problems)
    stages = [_stage(folder, name, plan, problems) for name in _stage_names(folder, plan)]
    scores = []
    for index, record in enumerate(_read_json(folder / "scores.json", list, problems)):
        try:
            scores += _scores(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"scores.json, entry {index}: {type(error).__name__}: {error}")
    samples = []
    for index, sample in enumerate(_read_json(folder / "samples.json", list, problems)):
        outputs = sample.get("outputs") if isinstance(sample, dict) else None
        if isinstance(outputs, dict):
            words = {model: str(text) for model, text in outputs.items()}
            samples.append({"prompt": str(sample.get("prompt", "")), "outputs": words})
        else:
            problems.append(f"samples.json, entry {index}: no outputs")
    name = plan.get("name") or folder.resolve().name
    return Run(folder, name, plan, machine, commit, stages, scores, samples, problems)


def finite_number(value: Any) -> float | None:
    """Return ``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _estimate(value: Any) -> Estimate:
    """Return an estimate from a number or a dictionary {value, lo, hi, n}."""
    record = value if isinstance(value, dict) else {"value": value}
    number, lo, hi, n = (finite_number(record.get(key)) for key in ("value", "lo", "hi", "n"))
    if number is None:
        raise ValueError(f"{record.get('value')!r} is not a finite number")
    return Estimate(number, lo, hi, None if n is None else int(n))


def _read_json(path: Path, kind: type, problems: list[str]) -> Any:
    """Read JSON of a type.

    A missing file reads as an empty value, a broken one as well, with a problem noted.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} of {path.parent.name}: {error}")
        return kind()
    if not isinstance(data, kind):
        problems.append(f"{path.name} of {path.parent.name}: expected a JSON {kind.__name__}")
        return kind()
    return data


def _typed(record: dict[str, Any], types: dict[str, str], where: str, problems: list[str]) -> dict[str, Any]:
    """Return the known fields with the right type. A null means "not measured" and is dropped."""
    good: dict[str, Any] = {}
    classes = {_TEXT: str, _LIST: list, _DICT: dict, _ANY: object}
    for key, wanted in types.items():
        value = record.get(key)
        if value is None:
            continue
        if finite_number(value) is not None if wanted == _NUMBER else isinstance(value, classes[wanted]):
            good[key] = value
        else:
            problems.append(f"{where}: {key} is not a {wanted}")
    return good


def _stage_names(folder: Path, plan: dict[str, Any]) -> list[str]:
    """Return the stages on disk in the order of the plan. Stages that are not in the plan come last."""
    listed = plan.get("stages") or list(plan.get("predicted_seconds") or {})
    planned = [str(stage.get("name")) if isinstance(stage, dict) else str(stage) for stage in listed]
    records = {path.parent.name: path for path in (folder / "stages").glob("*/stage.json")}
    begun = [path.parent.name for path in (folder / "stages").glob("*/metrics.jsonl")]

    def order(name: str) -> tuple[int, float]:
        if name in planned:
            return planned.index(name), 0.0
        return len(planned), records[name].stat().st_mtime if name in records else math.inf

    return sorted(dict.fromkeys([*records, *begun]), key=order)


def _stage(folder: Path, name: str, plan: dict[str, Any], problems: list[str]) -> Stage:
    place = folder / "stages" / name
    record = _read_json(place / "stage.json", dict, problems)
    record = _typed(record, _STAGE, f"stage.json of {name}", problems)
    model, params = record.get("model"), record.get("n_params")
    made = _model_folder(folder, place, model) if model else None
    lineage = _read_json(made / "herd.json", dict, problems) if made else {}
    config = _read_json(made / "config.json", dict, problems) if made else {}
    costs = ("seconds", "tokens", "flops", "peak_rss_bytes", "predicted_peak_bytes")
    predicted = finite_number((plan.get("predicted_seconds") or {}).get(name))
    return Stage(
        name=name,
        title=record.get("title", name),
        predicted_seconds=record.get("predicted_seconds", predicted),
        n_params=None if params is None else int(params),
        model=model,
        gates=[_gate(gate) for gate in record.get("gates", []) if isinstance(gate, dict)],
        notes=[str(note) for note in record.get("notes", [])],
        curves=_curves(place, name, problems),
        record=record,
        lineage=_typed(lineage, _LINEAGE, f"herd.json of {model}", problems),
        config=_typed(config, _CONFIG, f"config.json of {model}", problems),
        weight_bytes=sum(path.stat().st_size for path in made.glob("*.safetensors")) if made else None,
        **{key: record.get(key) for key in costs},
    )


def _gate(gate: dict[str, Any]) -> Gate:
    unit, name = str(gate.get("unit") or ""), str(gate.get("name", "gate"))
    return Gate(name, gate.get("passed") is True, gate.get("value"), gate.get("bar"), unit)


def _model_folder(folder: Path, place: Path, model: str) -> Path | None:
    """Return a model's folder, named relative to the run, the stage or the working folder, or None."""
    try:
        return next((path for path in (folder / model, place / model, Path(model)) if path.is_dir()), None)
    except (OSError, ValueError):  # not a name that a file can have
        return None


def _curves(place: Path, stage: str, problems: list[str]) -> list[LossCurve]:
    """Return a curve for each metrics file, named after the stage and, in a subfolder, the subfolder."""
    curves = []
    for path in sorted(place.rglob("metrics.jsonl")):
        inside = path.parent.relative_to(place).as_posix()
        curve = _curve(path, stage if inside == "." else f"{stage} {inside}", problems)
        if curve.train or curve.evals:
            curves.append(curve)
    return curves


def _curve(path: Path, name: str, problems: list[str]) -> LossCurve:
    """Return the losses by tokens.

    A resumed run repeats lines, and the last one counts. An evaluation may record only its step. Its tokens
    are then taken from the training line of that step.
    """
    records, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            records.append({key: value for key, value in record.items() if finite_number(value) is not None})
        except (ValueError, AttributeError):
            broken += 1
    if broken:
        problems.append(f"{path.name} of {name}: {broken} line{'s' if broken > 1 else ''} not valid JSON")
    tokens = {record["step"]: record["tokens"] for record in records if record.keys() >= {"step", "tokens"}}
    train, evals = {}, {}
    accuracies: dict[str, dict[float, float]] = {}
    for record in records:
        at = record.get("tokens", tokens.get(record.get("step", -1)))
        if at is None:
            continue
        if "loss" in record:
            train[at] = record["loss"]
        if (key := next((key for key in EVAL_LOSSES if key in record), None)) is not None:
            evals[at] = record[key]
        for key in (key for key in record if key.startswith("eval/") and key.endswith(ACCURACY)):
            accuracies.setdefault(key.removeprefix("eval/").removesuffix(ACCURACY), {})[at] = record[key]
    curves = {asked: sorted(points.items()) for asked, points in accuracies.items()}
    return LossCurve(name, sorted(train.items()), sorted(evals.items()), curves)


def _scores(record: dict[str, Any]) -> list[ModelScore]:
    """Return the score, and the 99th percentile of its detail as a score of its own."""
    model, name = record["model"], record["name"]
    if not isinstance(model, str) or not isinstance(name, str):
        raise TypeError("model and name must be text")
    raw = record.get("detail") or {}
    detail: dict[str, dict[str, Estimate]] = {}
    for key, parts in raw.items():
        if isinstance(parts, dict):
            detail[key] = {str(part): _estimate(value) for part, value in parts.items() if value is not None}
    cells = raw.get("grid") or []
    grid = [(int(cell["length"]), float(cell["depth"]), float(cell["value"])) for cell in cells]
    unit = str(record.get("unit") or "")
    scores = [ModelScore(model, name, unit, _estimate(record), detail, grid)]
    if (p99 := finite_number(raw.get("p99"))) is not None:
        scores.append(ModelScore(model, f"{name}_p99", unit, Estimate(p99)))
    return scores
