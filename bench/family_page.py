"""Evaluate a family of models in four suites and put all of them on one page.

    HERD_TEST_DATA=../shared/data python bench/family_page.py runs/full     # some minutes, can be resumed

Only verbs are used: `herd quantize` makes RUN/instruct-q8 and -q4 if they are missing. `herd eval` runs the
suites tools (its own templates and calls), long and multilingual on every model. `herd eval fidelity`
compares them with instruct. `herd eval compare` shows everything in RUN/evals/compare.html. The receipt has
the main figures.
"""

from __future__ import annotations

from pathlib import Path

from common import DATA, bench_parser, exactly, save_receipt
from herd.cli import run as herd
from herd.evals.compare import compare
from herd.evals.results import read_evaluation
from herd.evals.score import Score
from herd.report.receipt import Value

MODELS = ("instruct", "teacher", "student", "control", "instruct-q8", "instruct-q4")
"""The others are compared with the first."""
SUITES = {"tools": 40, "long": 10, "multilingual": 30}
"""Number of items of each task, by suite."""
TEXTS = 20
SHOWN = ("tool_calls", "tool_answers", "needle_single", "bpb_sentences", "fidelity")


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("run", type=Path, help="A folder that herd raise has filled.")
    args = parser.parse_args()
    run, data = args.run, ["--data", str(DATA)]
    for bits in ("q8", "q4"):
        if not (run / f"instruct-{bits}").exists():
            must(["quantize", str(run / "instruct"), "--to", bits, "--no-measure"])
    for name in MODELS:
        model, out = str(run / name), ["--out", str(run / "evals" / name)]
        for suite, limit in SUITES.items():
            # a task that does not fit a model's context becomes a row that says so
            herd(["eval", model, "--suite", suite, "--shots", "0", "--limit", str(limit), *data, *out])
        if name != MODELS[0]:
            parent = ["--parent", str(run / MODELS[0])]
            must(["eval", "fidelity", model, *parent, "--limit", str(TEXTS), *data, *out])
    folders = [run / "evals" / name for name in MODELS]
    must(["eval", "compare", *map(str, folders), "--out", str(run / "evals")])
    receipt(folders)


def must(args: list[str]) -> None:
    if code := herd(args):
        raise SystemExit(f"herd {' '.join(args)}: exit code {code}")


def receipt(folders: list[Path]) -> None:
    """Record the main figures with their intervals, and how many differences hold."""
    evaluations = [read_evaluation(folder) for folder in folders]
    comparison = compare(evaluations)
    asked = [row for evaluation in evaluations for row in evaluation.tasks]
    done = sum(row.status == "done" for row in asked)
    values = {
        "models": exactly(len(MODELS), len(folders), "models"),
        "tasks_done": Value(done, f"of {len(asked)} rows; the others say why not"),
        "differences_that_stand": Value(
            sum(d.stands for d in comparison.differences),
            f"of {len(comparison.differences)}, by Holm's procedure",
        ),
    }
    for evaluation, name in zip(evaluations, MODELS, strict=True):
        for row in evaluation.tasks:
            if row.task in SHOWN and (score := row.score):
                values[f"{name.replace('-', '_')}_{row.task}"] = value(score)
    save_receipt(
        "eval-family",
        what="a family with its q8 and q4: tools, long, multilingual, fidelity to instruct",
        values=values,
        seed=0,
        notes="; ".join(f"{suite}: first {limit} items of each task" for suite, limit in SUITES.items())
        + f"; fidelity: {TEXTS} texts; no worked examples, which a context of 256 tokens does not hold",
    )


def value(score: Score) -> Value:
    return Value(score.value, score.unit, score.lo, score.hi)


if __name__ == "__main__":
    main()
