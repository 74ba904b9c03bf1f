"""Write the report page of a run: one HTML file for light and dark mode, phones and paper.

`build_page` reads the files of the run (listed in `run.py`), makes cards, charts and tables of them
(`cards.py`, `figures.py`, `tabulate.py`), lays them out with ``page.html.jinja`` and writes ``report.html``
into the run's folder. The page fetches no script, font or image, so it can be mailed or kept for years. The
same folder always gives the same bytes.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..files import write_atomically
from ..units import NOT_MEASURED, duration, fixed, nbytes
from . import cards, figures, tabulate, tree, verdicts
from .run import Run, finite_number, load_run
from .template import template


def build_page(run_folder: Path | str) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    Raises `ReportError` if it is not a run.
    """
    run = load_run(run_folder)
    path = run.folder / "report.html"
    write_atomically(path, template("herd.report", "page.html.jinja").render(_contents(run)))
    return path


def _contents(run: Run) -> dict[str, Any]:
    """Return the variables of the template."""
    root = tree.family(run)
    return {
        "run": run,
        "title": headline(run),
        "facts": facts(run),
        "findings": verdicts.findings(run),
        "cards": cards.cards(run),
        "tree_wide": Markup(tree.wide(root)) if root else None,
        "tree_narrow": Markup(tree.narrow(root)) if root else None,
        "loss_charts": [
            (title, Markup(log), Markup(linear)) for title, log, linear in figures.loss_charts(run)
        ],
        "copying_chart": Markup(figures.copying_chart(run)),
        "scores": tabulate.scores_table(run),
        "differences": tabulate.differences_table(run),
        "bpb_chart": Markup(figures.bpb_chart(run)),
        "needles": [(model, Markup(drawn)) for model, drawn in figures.needle_maps(run)],
        "languages": tabulate.language_table(run),
        "tools_chart": Markup(figures.tools_chart(run)),
        "tools_by_language": tabulate.tool_table(run, "by_lang"),
        "tools_otherwise": tabulate.tool_tables(run),
        "time_bar": Markup(figures.time_bar(run)),
        "cost": tabulate.cost_table(run),
        "gates": tabulate.gates_table(run),
        "notes": [(stage.name, note) for stage in run.stages for note in stage.notes],
        "provenance": _provenance(run),
        "lineage": _lineage(run),
        "not_measured": NOT_MEASURED,
    }


def headline(run: Run) -> str:
    """Return the title of the report page."""
    seconds = sum(stage.seconds or 0 for stage in run.stages)
    return f"A herd raised in {duration(seconds)}" if seconds else f"The herd “{run.name}”"


def facts(run: Run) -> list[str]:
    """Return the facts under the title: run, mode, seed, machine, date."""
    cores, cpu = run.machine.get("cores"), run.machine.get("cpu", "unknown processor")
    mode, seed = run.plan.get("mode"), run.plan.get("seed")
    found = [f"run {run.name}", mode and f"mode {mode}", "" if seed is None else f"seed {seed}"]
    found += [f"{cores} cores, {cpu}" if cores else "", str(run.plan.get("created") or "")[:10]]
    return [fact for fact in found if fact]


def _provenance(run: Run) -> list[tuple[str, str]]:
    """Return the names and values of the machine, the software and the command that repeats the run."""
    machine, commit = run.machine, run.commit
    memory = machine.get("memory_bytes")
    if (hashed := commit.get("hash")) and commit.get("dirty"):
        hashed += " with uncommitted changes"
    text = ", ".join(map(str, run.plan.get("text") or []))
    rows = [
        ("command", raise_command(run)),
        ("seed", run.plan.get("seed")),
        ("text", text or "Python's standard library and Herd's parallel sentences"),
        ("started", run.plan.get("created")),
        ("herd", run.plan.get("version")),
        ("commit", hashed),
        ("processor", machine.get("cpu")),
        ("cores", machine.get("cores")),
        ("instruction set used", machine.get("instruction_set")),
        ("vector instructions", ", ".join(map(str, machine.get("isa", []))) or None),
        ("memory", nbytes(memory) if isinstance(memory, int) else None),
        ("speed found by the probe", _probe(run)),
        ("system", machine.get("os")),
        ("python", machine.get("python")),
        ("torch", machine.get("torch")),
    ]
    return [(name, "not recorded" if value in (None, "") else str(value)) for name, value in rows]


def raise_command(run: Run) -> str | None:
    """Return the command that raises this family again."""
    if run.plan.get("command"):
        return str(run.plan["command"])
    mode, seed = run.plan.get("mode"), run.plan.get("seed")
    if mode is None or seed is None:
        return None
    words = ["herd", "raise", "--name", run.name, "--seed", str(seed)]
    words += [f"--{mode}"] if mode in ("full", "quick") else []
    for text in run.plan.get("text") or []:
        words += ["--text", str(text)]
    return shlex.join(words)


def _probe(run: Run) -> str | None:
    speeds = {
        shape: speed for shape, value in run.plan.get("speeds", {}).items() if (speed := finite_number(value))
    }
    return "; ".join(f"{shape}: {fixed(speed, 0)} tokens/s" for shape, speed in speeds.items()) or None


def _lineage(run: Run) -> list[tuple[str, str, str, str]]:
    """Return the name, number of parameters, hash of the weights, and parents of every model of the run."""
    rows = []
    for stage in run.stages:
        if stage.model_name is None:
            continue
        parents = [f"{role} {str(hash_)[:16]}" for role, hash_ in stage.lineage.get("parents", {}).items()]
        params = f"{stage.n_params:,}" if stage.n_params else "not recorded"
        hashed = str(stage.lineage.get("weights_hash") or "not recorded")
        rows.append((stage.model_name, params, hashed, ", ".join(parents) or "random weights"))
    return rows
