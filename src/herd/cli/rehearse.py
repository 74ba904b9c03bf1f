"""`herd train RECIPE --rehearse`: train a few steps at the recipe's shapes, and predict the whole run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import units
from ..errors import PlanError
from .common import picked, print_json
from .plan_options import print_rows

if TYPE_CHECKING:
    from ..plan.rehearse import Outlook, Rehearsal


def rehearse_recipe(path: Path, recipe: Any, machine: str | None, script: Path | None, as_json: bool) -> None:
    """Rehearse the recipe, print the prediction, and write the Slurm script if a path is given."""
    from ..plan import rehearse
    from ..plan.machines import find_machine

    if script is not None and machine is None:
        raise PlanError("--script needs to know the machine: give --machine, e.g. 64xH100")
    target = None if machine is None else find_machine(machine)
    # Another machine first: if the recipe does not fit there, this is known before anything runs.
    outlooks = [] if target is None else [rehearse.outlook_on(recipe, target)]
    shown = not as_json and sys.stderr.isatty()
    found = rehearse.run_rehearsal(
        recipe, lambda line: print(f"  {line}", file=sys.stderr) if shown else None
    )
    outlooks.insert(0, rehearse.outlook_here(recipe, found))
    text = None if target is None else rehearse.slurm_script(recipe, path, target, outlooks[-1].hours)
    if script is not None and text is not None:
        from ..files import write_atomically

        write_atomically(script, text)
    if as_json:
        print_json(_record(path, found, outlooks, text))
        return
    _print_rehearsal(recipe, found)
    _print_outlooks(outlooks)
    if recipe.parallel.ranks > 1:
        print(f"“{outlooks[0].machine}”: the work of all {recipe.parallel.ranks:,} ranks on one device.")
    if script is not None:
        print(f"\nScript: {script} (sbatch {script})")
    elif text is not None:
        print(f"\n{text}", end="")


def _record(path: Path, rehearsal: Rehearsal, outlooks: list[Outlook], script: str | None) -> dict[str, Any]:
    rehearsed = (
        "dim=piece.config.dim slices=piece.slices vocab_parts=piece.vocab_parts rows=piece.rows "
        "context=piece.context flops_per_s=flops_rate predicted_bytes measured_bytes loss"
    )
    outlook = "machine step_seconds tokens_per_s mfu bytes=nbytes.total peak_bytes=peak fits hours"
    return {
        "recipe": str(path),
        "rehearsed": picked(rehearsal, rehearsed),
        "outlook": [picked(each, outlook) for each in outlooks],
        "script": script,
    }


def _print_rehearsal(recipe: Any, rehearsal: Rehearsal) -> None:
    piece = rehearsal.piece
    cuts = [f"1/{piece.slices} of the heads and FFN"] if piece.slices > 1 else []
    cuts += [f"1/{piece.vocab_parts} of the vocabulary"] if piece.vocab_parts > 1 else []
    what = ", ".join([f"layers of width {piece.config.dim:,}", *cuts])
    print(
        f"{recipe.name}: trained {what} here in {recipe.train.dtype}, {piece.rows} x {piece.context:,} "
        "tokens."
    )
    chance = math.log(piece.config.vocab_size)
    print(f"The first loss is {rehearsal.loss:.2f}; uniform guessing gives {chance:.2f}.")
    print(f"One decoder layer ran at {units.si(rehearsal.flops_rate, 'FLOP/s')}.")
    sizes = [units.nbytes(value) for value in (rehearsal.measured_bytes, rehearsal.predicted_bytes)]
    print(f"Memory of the rehearsed part: {sizes[0]} measured, {sizes[1]} predicted.\n")


def _print_outlooks(outlooks: list[Outlook]) -> None:
    rows = []
    for outlook in outlooks:
        seconds = outlook.step_seconds
        step = f"{seconds:.3g} s" if seconds < 10 else units.duration(seconds)
        mfu = "–" if outlook.mfu is None else f"{100 * outlook.mfu:.1f}"
        fits, peak = "yes" if outlook.fits else "no", f"{outlook.peak / 1e9:,.1f}"
        time = units.duration(3600 * outlook.hours)
        rows.append(f"{outlook.machine}|{step}|{outlook.tokens_per_s:,.0f}|{mfu}|{peak}|{fits}|{time}")
    print_rows("the whole run on|step|tokens/s|MFU %|GB per device|fits|time", rows)
