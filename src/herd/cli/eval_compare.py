"""`herd eval compare`, `fidelity` and `contamination`: compare evaluations, models, items and a corpus."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from .common import MODEL, Device, Dtype, Json, Threads, print_json, print_table
from .eval_model import DataOption, Limit, Out, data_source, open_local, results_folder

if TYPE_CHECKING:
    from ..evals.results import TaskResult


def compare_command(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of herd eval; the others are compared with the first.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for compare.html, .json, .csv and .md.")] = Path(
        "runs/evals"
    ),
    as_json: Json = False,
) -> None:
    """Compare the evaluations of several models.

    Writes paired differences, flipped items, published scores and claims.
    """
    from ..evals.compare import compare
    from ..evals.compare_page import as_markdown, write_comparison
    from ..evals.results import read_evaluation

    comparison = compare([read_evaluation(folder) for folder in folders])
    paths = write_comparison(comparison, out)
    if as_json:
        print_json(comparison.record() | {"files": {kind: str(path) for kind, path in paths.items()}})
    else:
        print(as_markdown(comparison))
        print(f"page: {paths['html']}")


def fidelity_command(
    model: Annotated[str, typer.Argument(help="The child. " + MODEL)],
    parent: Annotated[str, typer.Option(help="The checkpoint to compare with, e.g. the unquantized one.")],
    data: DataOption = None,
    limit: Limit = None,
    out: Out = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure how close a model is to its parent.

    Prints KL divergence, top-1 agreement, overlap and flipped items.
    """
    from ..evals.closeness import measure_fidelity

    child, elder = (open_local(folder, None, dtype, device) for folder in (model, parent))
    folder = out or results_folder(child)
    row = measure_fidelity(elder, child, data_source(data), folder, limit)
    flips = _flips(results_folder(elder), folder)
    if as_json:
        print_json(dataclasses.asdict(row) | {"folder": str(folder), "flips": flips})
        return
    scores = [
        (s["name"], f"{s['value']:.4g}", s["unit"], f"{s['lo']:.4g} to {s['hi']:.4g}") for s in row.scores
    ]
    print_table(("score", "value", "unit", "95 % interval"), scores)
    print(f"{child.name} was compared with {elder.name} on {row.n_items} texts. Results are in {folder}")
    if flips:
        print()
        print_table(
            ("items flipped", "won", "lost", "of"), [tuple(map(str, flip.values())) for flip in flips]
        )
    else:
        print(f"To count flipped items, evaluate both models: herd eval {parent}, herd eval {model}")


def contamination_command(
    folder: Annotated[Path, typer.Argument(help="A folder of herd eval.")],
    corpus: Annotated[str, typer.Option(help="Training text: a file, a folder, hf:NAME, or builtin.")],
    data: DataOption = None,
    as_json: Json = False,
) -> None:
    """Find test items that occur in a training corpus.

    An item counts if it shares 13 words in a row with the corpus.

    Their number is noted next to the scores.
    """
    from ..data.corpus import read_corpus
    from ..evals.contamination import overlaps
    from ..evals.results import read_evaluation, write_summary
    from ..evals.tasks import make_task

    evaluation, source = read_evaluation(folder), data_source(data)
    if source.label != evaluation.summary.get("data"):
        raise DataError(f"{folder} was measured on {evaluation.summary.get('data')}: give the same --data")
    done = {row.task: row for row in evaluation.tasks if row.status == "done" and row.task != "fidelity"}
    own = {name: row.data for name, row in done.items() if row.source == "own questions"}
    tests = {
        name: make_task(own.get(name, name), 0, row.settings.get("mode", "base")).items(source)[: row.n_items]
        for name, row in done.items()
    }
    documents = read_corpus(None if corpus == "builtin" else corpus)
    found = overlaps(tests, (document.text for document in documents), corpus)
    values = {name: {item.id: item.value for item in evaluation.items(row)} for name, row in done.items()}
    records = {name: found[name].record(values[name]) for name in done}
    rows = [_with_overlap(row, records.get(row.task)) for row in evaluation.tasks]
    written = ("schema", "model", "model_hash", "tasks")
    about = {key: value for key, value in evaluation.summary.items() if key not in written}
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


def _flips(parent: Path, child: Path) -> list[dict[str, Any]]:
    """Count, for each task that both models have done, the items that only one of them answers correctly."""
    from ..evals.compare import compare
    from ..evals.results import read_evaluation

    if not (parent / "summary.json").is_file() or parent.resolve() == child.resolve():
        return []
    found = compare([read_evaluation(folder) for folder in (parent, child)]).differences
    return [
        {"task": d.task, "won": d.gained, "lost": d.lost, "n": d.n} for d in found if d.unit == "fraction"
    ]


def _with_overlap(row: TaskResult, record: dict[str, Any] | None) -> TaskResult:
    """Return the row with the overlap noted in the detail of its first score."""
    if record is None:
        return row
    first, *others = row.scores
    detail = {**first["detail"], "contamination": record}
    return dataclasses.replace(row, scores=[{**first, "detail": detail}, *others])
