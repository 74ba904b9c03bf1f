"""`herd eval fidelity` and `herd eval contamination`: what is added to an evaluation that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from .common import Json, print_json, print_table

if TYPE_CHECKING:
    from ..evals.local import LocalModel
    from ..evals.results import Evaluation, TaskResult

DataOption = Annotated[
    Path | None, typer.Option(help="Folder of data sets; the built-in items if not given.")
]


def fidelity(
    model: Annotated[str, typer.Argument(help="A checkpoint folder: the child.")],
    parent: Annotated[str, typer.Option(help="The checkpoint it was made from, or is measured against.")],
    data: DataOption = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many texts.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results; runs/evals/NAME-HASH if not given.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How near a model is to its parent: KL, same first choice, same distribution on parallel text; items flipped."""
    from ..evals.closeness import measure_fidelity
    from ..evals.tasks import Data
    from .eval import results_folder

    child, elder = _local(model, dtype, device), _local(parent, dtype, device)
    folder = out or results_folder(child)
    row = measure_fidelity(elder, child, Data() if data is None else Data(data), folder, limit)
    flips = _flips(results_folder(elder), folder)
    if as_json:
        print_json(dataclasses.asdict(row) | {"folder": str(folder), "flips": flips})
        return
    scores = [
        (s["name"], f"{s['value']:.4g}", s["unit"], f"{s['lo']:.4g} to {s['hi']:.4g}") for s in row.scores
    ]
    print_table(("score", "value", "unit", "95 % interval"), scores)
    print(f"{child.name} against {elder.name}, {row.n_items} texts; in {folder}")
    if flips:
        print()
        print_table(
            ("items flipped", "won", "lost", "of"), [tuple(map(str, flip.values())) for flip in flips]
        )
    else:
        print(f"Flipped items are counted where both were evaluated: herd eval {parent}, herd eval {model}")


def contamination(
    folder: Annotated[Path, typer.Argument(help="A folder of herd eval.")],
    corpus: Annotated[str, typer.Option(help="Training text: a file, a folder, hf:NAME; or builtin.")],
    data: DataOption = None,
    as_json: Json = False,
) -> None:
    """Which test items share 13 words in a row with a training corpus; written beside their scores."""
    from ..data.corpus import read_corpus
    from ..evals.contamination import overlaps
    from ..evals.results import read_evaluation, write_summary
    from ..evals.tasks import Data, make

    evaluation, source = read_evaluation(folder), Data() if data is None else Data(data)
    if source.label != evaluation.summary.get("data"):
        raise DataError(f"{folder} was measured on {evaluation.summary.get('data')}: give the same --data")
    done = {row.task: row for row in evaluation.tasks if row.status == "done" and row.task != "fidelity"}
    tests = {}
    for name, row in done.items():
        items = make(name, 0, row.settings.get("mode", "base")).items(source)
        tests[name] = items[: row.n_items]
    texts: Iterator[str] = (
        document.text for document in read_corpus(None if corpus == "builtin" else corpus)
    )
    found = overlaps(tests, texts, corpus)
    records = {name: found[name].record(_values(evaluation, row)) for name, row in done.items()}
    rows = [_with(row, records.get(row.task)) for row in evaluation.tasks]
    about = {
        k: v for k, v in evaluation.summary.items() if k not in ("schema", "model", "model_hash", "tasks")
    }
    write_summary(folder, evaluation.model, evaluation.model_hash, rows, **about)
    if as_json:
        print_json(records)
        return
    table = [
        (name, str(r["n_hit"]), str(r["n_clean"]), str(r["n_short"]), f"{100 * r['share']:.1f} %",
         "–" if r["score_without"] is None else f"{r['score_without']:.4g}")
        for name, r in records.items()
    ]  # fmt: skip
    print_table(("task", "with overlap", "without", "too short", "share", "score without"), table)


def _local(model: str, dtype: str | None, device: str | None) -> LocalModel:
    from .eval import open_local

    return open_local(model, None, dtype, device, 32)


def _flips(parent: Path, child: Path) -> list[dict[str, Any]]:
    """Items that only one of the two has right, task by task, where both were evaluated."""
    from ..evals.compare import compare
    from ..evals.results import read_evaluation

    if not (parent / "summary.json").is_file() or parent.resolve() == child.resolve():
        return []
    found = compare([read_evaluation(folder) for folder in (parent, child)]).differences
    return [
        {"task": d.task, "won": d.gained, "lost": d.lost, "n": d.n} for d in found if d.unit == "fraction"
    ]


def _values(evaluation: Evaluation, row: TaskResult) -> dict[str, float]:
    return {item.id: item.value for item in evaluation.items(row)}


def _with(row: TaskResult, record: dict[str, Any] | None) -> TaskResult:
    """The row with the overlap in its headline's detail."""
    if record is None:
        return row
    first, *others = row.scores
    return dataclasses.replace(
        row, scores=[{**first, "detail": {**first["detail"], "contamination": record}}, *others]
    )
