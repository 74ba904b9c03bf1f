"""What the terminal says at the end of a run: one table, and what to type next."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from .measure import MODELS
from .run import Run

COLUMNS = (
    ("bpb", "bits/byte", 1.0, ".3f"),
    ("kl", "KL to teacher, nats", 1.0, ".3f"),
    ("top1", "same first choice, %", 100.0, ".1f"),
    ("needle", "needles, %", 100.0, ".0f"),
    ("tool_use", "tool use, %", 100.0, ".1f"),
    ("code_pass", "functions pass, %", 100.0, ".0f"),
)


def print_summary(run: Run, console: Console) -> None:
    """Scores by model with 95 % intervals, the gates, and the next commands."""
    scores = {(s["model"], s["name"]): s for s in json.loads((run.folder / "scores.json").read_text())}
    table = Table(title=f"{run.plan.name}: held-out scores, 95 % intervals", title_justify="left")
    table.add_column("model")
    table.add_column("parameters", justify="right")
    for _, heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for model in MODELS:
        n_params = run.record(model)["n_params"]
        cells = [_cell(scores.get((model, name)), factor, form) for name, _, factor, form in COLUMNS]
        table.add_row(model, f"{n_params / 1e6:.2f} M", *cells)
    console.print(table)
    gap = scores.get(("student", "bpb_vs_control"))
    if gap is not None:
        console.print(
            f"student minus control at equal tokens: "
            f"{gap['value']:+.3f} bits/byte [{gap['lo']:+.3f}, {gap['hi']:+.3f}]",
            highlight=False,
        )
    folder = run.folder
    console.print("\nNext:", highlight=False)
    for line in (f"herd chat {folder}/instruct", f"herd chat {folder}/student", f"open {folder}/report.html"):
        console.print(f"  [bold]{line}[/bold]", highlight=False)


def _cell(score: dict[str, Any] | None, factor: float, form: str) -> str:
    if score is None:
        return "–"
    value = format(score["value"] * factor, form)
    if score["lo"] is None:
        return value
    return f"{value} [dim]{score['lo'] * factor:{form}}–{score['hi'] * factor:{form}}[/dim]"
