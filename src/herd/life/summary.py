"""The summary at the end of a run: a table of scores and the commands to try next."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .. import units
from ..report.run import load_run
from ..report.verdicts import findings
from .measure import MODELS
from .run import RaiseRun

# Name, heading, factor, format of the value and of its interval. The table fits into 80 columns, because a
# narrower terminal would truncate numbers.
COLUMNS: tuple[tuple[str, str, float, str, str], ...] = (
    ("bpb", "bits/byte", 1.0, ".3f", ".2f"),
    ("kl", "KL, nats", 1.0, ".3f", ".2f"),
    ("top1", "top-1 %", 100.0, ".1f", ".0f"),
    ("needle", "needle %", 100.0, ".0f", ".0f"),
    ("tool_use", "tools %", 100.0, ".1f", ".0f"),
    ("code_pass", "code %", 100.0, ".0f", ".0f"),
)


def print_summary(run: RaiseRun, console: Console) -> None:
    """Print what the models can do, their scores with 95 % intervals, and commands to try next."""
    console.print()
    for finding in findings(load_run(run.folder)):
        mark = "[green]✓[/green]" if finding.good else "[red]✕[/red]"
        console.print(f"{mark} {finding.text}", highlight=False)
    scores = {(s["model"], s["name"]): s for s in json.loads((run.folder / "scores.json").read_text())}
    title = f"\n[bold]{run.plan.name}[/bold]: scores on held-out items, each with its 95 % interval below"
    console.print(title, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1))
    table.add_column("model", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for _, heading, *_ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in MODELS:
        n_params = run.record(model)["n_params"]
        cells = [_cell(scores.get((model, name)), factor, *forms) for name, _, factor, *forms in COLUMNS]
        table.add_row(model, units.si(n_params), *cells)
    console.print(table)
    console.print()
    gap = scores.get(("student", "bpb_vs_control"))
    if gap is not None:
        known = gap["lo"] is not None
        bounds = f"[{gap['lo']:+.3f}, {gap['hi']:+.3f}]" if known else "(too little text for an interval)"
        text = f"student minus control (equal tokens): {gap['value']:+.3f} bits/byte {bounds}"
        console.print(text, highlight=False)
    console.print("\nNext:", highlight=False)
    for command in ("herd chat {}/instruct", "herd chat {}/student", "open {}/report.html"):
        console.print(f"  [bold]{command.format(run.folder)}[/bold]", highlight=False)


def _cell(score: dict[str, Any] | None, factor: float, form: str, bounds: str) -> str:
    if score is None:
        return "–"
    value = format(score["value"] * factor, form)
    if score["lo"] is None:
        return value
    return f"{value}\n[dim]{score['lo'] * factor:{bounds}}–{score['hi'] * factor:{bounds}}[/dim]"
