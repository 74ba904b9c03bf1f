"""`herd eval ladder`: the score of models on one task with 0, 1 and 5 worked examples in the prompt.

A model that learns from examples climbs the ladder. A tuned model should stand on its top without any.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import DataError
from .common import MODEL, Device, Dtype, Json, Threads, print_json, print_table
from .eval_model import DataOption, Limit, data_source, open_local, results_folder


def ladder_command(
    task: Annotated[str, typer.Argument(help="A task of `herd eval list`.")],
    models: Annotated[list[str], typer.Argument(help="Models to compare: base, instruct, tuned. " + MODEL)],
    shots: Annotated[str, typer.Option(help="Numbers of worked examples.")] = "0,1,5",
    limit: Limit = None,
    data: DataOption = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score models on one task with more and more worked examples."""
    from ..evals.harness import evaluate
    from ..evals.tasks import make_task

    numbers = _numbers(shots)
    source = data_source(data)
    steps: list[dict[str, Any]] = []
    for name in models:
        opened = open_local(name, None, dtype, device)
        tasks = [make_task(task, n, opened.mode) for n in numbers]
        found = evaluate(opened, tasks, source, results_folder(opened), limit=limit)
        for n, row in zip(numbers, found.tasks, strict=True):
            if row.status != "done":
                raise DataError(f"{name}, {n} shots: {row.reason}")
            score = row.scores[0]
            steps.append(
                {"model": name, "shots": n} | {key: score[key] for key in ("name", "value", "lo", "hi", "n")}
            )
    if as_json:
        print_json({"task": task, "steps": steps})
        return
    rows = []
    for name in models:
        own = {step["shots"]: step for step in steps if step["model"] == name}
        rows.append([name, *(_cell(own[n]) for n in numbers), _climb([own[n]["value"] for n in numbers])])
    print_table((f"{task}, {steps[0]['name']}", *(f"{n} shots" for n in numbers), "climbs"), rows)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise DataError(f"--shots {text}: give numbers, e.g. 0,1,5")
    return sorted({int(part) for part in parts})


def _cell(step: dict[str, Any]) -> str:
    return f"{100 * step['value']:.1f} % [{100 * step['lo']:.1f}, {100 * step['hi']:.1f}]"


def _climb(values: list[float]) -> str:
    """Return a small drawing of the scores, from 0 to 1 in eight heights."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, max(0, int(8 * value)))] for value in values)
