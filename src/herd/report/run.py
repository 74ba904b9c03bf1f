"""A run's folder as data: what the stages left on disk, read without torch and without ever failing on a missing part.

This is the contract between the stages and the page::

    run.json             name, seed, mode, created, version, text, vocab_size, predicted_seconds {stage: seconds};
                         optional speeds {shape: tokens/s} of the probe and stages [name, ...]
    machine.json         machine (as `receipt.describe_machine()`) and commit (as `receipt.git_commit()`)
    stages/NAME/stage.json
                         stage, title, seconds, predicted_seconds, tokens, flops, peak_rss_bytes, predicted_peak_bytes,
                         model (folder, relative to the run, or null), n_params, notes [text],
                         gates [{name, passed, value, bar, unit}]; the tokenizer's also bytes_per_token {lang: number}
                         and vocab_size
    stages/NAME/**/metrics.jsonl
                         one JSON a line from the training loop: step, tokens, loss (nats/token); or step with a
                         held-out loss under one of the names in `EVAL_LOSSES`
    scores.json          [{model, name, value, unit, lo, hi, n, detail}, ...]; names the page knows: bpb, kl, top1,
                         needle, tool_use, code_parse, code_pass, and NAME_vs_MODEL for paired differences. detail
                         may hold by_lang, by_form, by_task, by_length {key: number or {value, lo, hi, n}} and
                         grid [{length, depth, value}, ...]; shares have the unit "fraction" and are shown in percent
    samples.json         [{prompt, outputs: {model: text}}, ...]
    MODEL/herd.json, config.json
                         lineage and shape of each stage's model

A file that cannot be understood is named in `Run.problems`, which the page shows: nothing is left out silently.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ReportError

Point = tuple[float, float]
EVAL_LOSSES = ("eval/loss", "eval/heldout_loss", "eval_loss")

# The kinds of the fields that the page looks at; a field of another kind counts as missing and is named as a problem.
_NUMBER, _TEXT, _LIST, _DICT, _ANY = "number", "text", "list", "object", "anything"
_PLAN = {
    "name": _TEXT, "mode": _TEXT, "seed": _NUMBER, "created": _TEXT, "version": _TEXT, "command": _TEXT, "text": _LIST,
    "stages": _LIST, "predicted_seconds": _DICT, "speeds": _DICT, "vocab_size": _NUMBER,
}  # fmt: skip
_STAGE = {
    "title": _TEXT, "seconds": _NUMBER, "predicted_seconds": _NUMBER, "tokens": _NUMBER, "flops": _NUMBER,
    "peak_rss_bytes": _NUMBER, "predicted_peak_bytes": _NUMBER, "model": _TEXT, "n_params": _NUMBER, "gates": _LIST,
    "notes": _LIST, "bytes_per_token": _DICT, "vocab_size": _NUMBER, "sha256": _TEXT,
}  # fmt: skip
_MACHINE = {
    "cpu": _TEXT, "cores": _NUMBER, "isa": _LIST, "memory_bytes": _NUMBER, "os": _TEXT, "python": _TEXT, "torch": _TEXT,
    "instruction_set": _TEXT,
}  # fmt: skip
_COMMIT = {"hash": _TEXT, "dirty": _ANY}
_WHERE = {"machine": _DICT, "commit": _DICT}
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
    """One measured quantity of one model; ``detail`` maps a breakdown (by_lang, by_form, by_length) to its parts."""

    model: str
    name: str
    unit: str
    estimate: Estimate
    detail: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    grid: list[tuple[int, float, float]] = field(default_factory=list)  # (length tokens, depth 0..1, value)


@dataclass(frozen=True)
class LossCurve:
    """Losses along a training, x in tokens, y in nats per token."""

    name: str
    train: list[Point]
    evals: list[Point]


@dataclass(frozen=True)
class Gate:
    name: str
    passed: bool
    value: Any = None
    bar: Any = None
    unit: str = ""


@dataclass(frozen=True)
class Stage:
    """What one stage did and cost; None where it did not say."""

    name: str
    title: str
    seconds: float | None = None
    predicted_seconds: float | None = None
    tokens: float | None = None
    flops: float | None = None
    peak_bytes: float | None = None
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
        """The model this stage made is called after its folder, or after the stage if only its size is known."""
        return Path(self.model).name if self.model else self.name if self.n_params else None


@dataclass(frozen=True)
class Run:
    """A whole run as the page needs it."""

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
        """Names of models: those of stages in order of their making, then any other that was scored."""
        made = [stage.model_name for stage in self.stages if stage.model_name]
        scored = [score.model for score in self.scores]
        return list(dict.fromkeys(made + scored))

    def maker(self, model: str) -> Stage | None:
        """The stage that made a model."""
        return next((stage for stage in self.stages if stage.model_name == model), None)

    def score(self, model: str, name: str) -> ModelScore | None:
        return next((score for score in self.scores if score.model == model and score.name == name), None)

    def curve(self, name: str) -> LossCurve | None:
        return next((curve for stage in self.stages for curve in stage.curves if curve.name == name), None)


def load_run(folder: Path | str) -> Run:
    """Read a run's folder. Raises `ReportError` only if it is no run at all."""
    folder = Path(folder)
    if not (folder / "run.json").is_file() and not (folder / "stages").is_dir():
        raise ReportError(
            f"{folder} is not a run: no run.json and no stages/ in it; give the folder `herd raise` made"
        )
    problems: list[str] = []
    plan = _typed(_read(folder / "run.json", dict, problems), _PLAN, "run.json", problems)
    where = _typed(_read(folder / "machine.json", dict, problems), _WHERE, "machine.json", problems)
    machine = _typed(where.get("machine", {}), _MACHINE, "machine.json, machine", problems)
    commit = _typed(where.get("commit", {}), _COMMIT, "machine.json, commit", problems)
    stages = [_stage(folder, name, plan, problems) for name in _stage_names(folder, plan)]
    scores = []
    for index, record in enumerate(_read(folder / "scores.json", list, problems)):
        try:
            scores += _scores(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"scores.json, entry {index}: {type(error).__name__}: {error}")
    samples = []
    for index, sample in enumerate(_read(folder / "samples.json", list, problems)):
        outputs = sample.get("outputs") if isinstance(sample, dict) else None
        if isinstance(outputs, dict):
            words = {model: str(text) for model, text in outputs.items()}
            samples.append({"prompt": str(sample.get("prompt", "")), "outputs": words})
        else:
            problems.append(f"samples.json, entry {index}: no outputs")
    return Run(
        folder,
        plan.get("name") or folder.resolve().name,
        plan,
        machine,
        commit,
        stages,
        scores,
        samples,
        problems,
    )


def finite_number(value: Any) -> float | None:
    """``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def estimate(value: Any) -> Estimate:
    """From a number or a dict {value, lo, hi, n}."""
    record = value if isinstance(value, dict) else {"value": value}
    found, n = finite_number(record["value"]), finite_number(record.get("n"))
    if found is None:
        raise ValueError(f"{record['value']!r} is not a finite number")
    return Estimate(
        found, finite_number(record.get("lo")), finite_number(record.get("hi")), None if n is None else int(n)
    )


def _read(path: Path, kind: type, problems: list[str]) -> Any:
    """The file's JSON if it is of the kind, an empty one otherwise; a missing file is no problem, a broken one is."""
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


def _typed(record: dict[str, Any], kinds: dict[str, str], where: str, problems: list[str]) -> dict[str, Any]:
    """The record with only those known fields that are of their kind; nulls are dropped, they mean "not measured"."""
    good: dict[str, Any] = {}
    for key, kind in kinds.items():
        value = record.get(key)
        if value is None:
            continue
        if kind == _ANY or _is(value, kind):
            good[key] = value
        else:
            problems.append(f"{where}: {key} is not a {kind}")
    return good


def _is(value: Any, kind: str) -> bool:
    if kind == _NUMBER:
        return finite_number(value) is not None
    return isinstance(value, {_TEXT: str, _LIST: list, _DICT: dict}[kind])


def _stage_names(folder: Path, plan: dict[str, Any]) -> list[str]:
    """Stages on disk, in the plan's order; those that the plan does not know come last."""
    listed = plan.get("stages") or list(plan.get("predicted_seconds") or {})
    planned = [str(stage.get("name")) if isinstance(stage, dict) else str(stage) for stage in listed]
    root = folder / "stages"
    begun = (
        path for path in root.iterdir() if (path / "stage.json").exists() or (path / "metrics.jsonl").exists()
    )
    found = [path.name for path in begun] if root.is_dir() else []

    def order(name: str) -> tuple[int, float]:
        record = root / name / "stage.json"
        made = record.stat().st_mtime if record.exists() else math.inf
        return (planned.index(name), 0.0) if name in planned else (len(planned), made)

    return sorted(found, key=order)


def _stage(folder: Path, name: str, plan: dict[str, Any], problems: list[str]) -> Stage:
    place = folder / "stages" / name
    record = _typed(_read(place / "stage.json", dict, problems), _STAGE, f"stage.json of {name}", problems)
    made = _model_folder(folder, place, record["model"]) if record.get("model") else None
    lineage = _read(made / "herd.json", dict, problems) if made else {}
    config = _read(made / "config.json", dict, problems) if made else {}
    params = record.get("n_params")
    return Stage(
        name=name,
        title=record.get("title", name),
        seconds=record.get("seconds"),
        predicted_seconds=record.get(
            "predicted_seconds", finite_number((plan.get("predicted_seconds") or {}).get(name))
        ),
        tokens=record.get("tokens"),
        flops=record.get("flops"),
        peak_bytes=record.get("peak_rss_bytes"),
        predicted_peak_bytes=record.get("predicted_peak_bytes"),
        n_params=None if params is None else int(params),
        model=record.get("model"),
        gates=[_gate(gate) for gate in record.get("gates", []) if isinstance(gate, dict)],
        notes=[str(note) for note in record.get("notes", [])],
        curves=_curves(place, name, problems),
        record=record,
        lineage=_typed(lineage, _LINEAGE, f"herd.json of {record.get('model')}", problems),
        config=_typed(config, _CONFIG, f"config.json of {record.get('model')}", problems),
        weight_bytes=sum(path.stat().st_size for path in made.glob("*.safetensors")) if made else None,
    )


def _gate(gate: dict[str, Any]) -> Gate:
    unit, name = str(gate.get("unit") or ""), str(gate.get("name", "gate"))
    return Gate(name, gate.get("passed") is True, gate.get("value"), gate.get("bar"), unit)


def _model_folder(folder: Path, place: Path, model: str) -> Path | None:
    """A stage names its model relative to the run, to itself or to where it ran."""
    try:
        return next((path for path in (folder / model, place / model, Path(model)) if path.is_dir()), None)
    except (OSError, ValueError):  # not a name a file can have
        return None


def _curves(place: Path, stage: str, problems: list[str]) -> list[LossCurve]:
    """One curve a metrics file: the stage's own is named after the stage, others after their folders."""
    curves = []
    for path in sorted(place.rglob("metrics.jsonl")):
        inside = path.parent.relative_to(place).as_posix()
        curve = _curve(path, stage if inside == "." else f"{stage} {inside}", problems)
        if curve.train or curve.evals:
            curves.append(curve)
    return curves


def _curve(path: Path, name: str, problems: list[str]) -> LossCurve:
    """Losses by tokens. A resumed run repeats lines; the last one of each position counts. Evaluations may give only
    their step, whose tokens the training lines tell."""
    records, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            records.append(
                {key: found for key, value in record.items() if (found := finite_number(value)) is not None}
            )
        except (ValueError, AttributeError):
            broken += 1
    if broken:
        problems.append(
            f"{path.name} of {name}: {broken} line{'s' if broken > 1 else ''} not readable as JSON"
        )
    tokens = {record["step"]: record["tokens"] for record in records if record.keys() >= {"step", "tokens"}}
    train, evals = {}, {}
    for record in records:
        at = record.get("tokens", tokens.get(record.get("step", -1)))
        if at is None:
            continue
        if "loss" in record:
            train[at] = record["loss"]
        if (key := next((key for key in EVAL_LOSSES if key in record), None)) is not None:
            evals[at] = record[key]
    return LossCurve(name, sorted(train.items()), sorted(evals.items()))


def _scores(record: dict[str, Any]) -> list[ModelScore]:
    """The score, and the 99th percentile in its detail as a score of its own."""
    if not isinstance(record["model"], str) or not isinstance(record["name"], str):
        raise TypeError("model and name must be text")
    raw = record.get("detail") or {}
    detail: dict[str, dict[str, Estimate]] = {}
    for key, parts in raw.items():
        if isinstance(parts, dict):
            detail[key] = {str(part): estimate(value) for part, value in parts.items() if value is not None}
    grid = [
        (int(cell["length"]), float(cell["depth"]), float(cell["value"])) for cell in raw.get("grid") or []
    ]
    unit = str(record.get("unit") or "")
    scores = [ModelScore(record["model"], record["name"], unit, estimate(record), detail, grid)]
    if (p99 := finite_number(raw.get("p99"))) is not None:
        scores.append(ModelScore(record["model"], f"{record['name']}_p99", unit, Estimate(p99)))
    return scores
