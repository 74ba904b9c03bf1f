"""`herd train RECIPE --rehearse`: real steps at the recipe's layer shapes, then what the whole run will
take."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from .common import long_time, print_json, print_table

if TYPE_CHECKING:
    from ..plan.rehearse import Outlook, Rehearsal


def rehearse_recipe(path: Path, recipe: Any, machine: str | None, script: Path | None, as_json: bool) -> None:
    """Rehearse, predict, print; write the script where one is asked for."""
    from ..kernels.memory import keep_freed_memory
    from ..plan import machines, rehearse

    keep_freed_memory()  # as training does
    if script is not None and machine is None:
        raise PlanError("--script needs to know the machine: give --machine, e.g. 64xH100")
    target = None if machine is None else machines.find_machine(machine)
    outlooks = [] if target is None else [rehearse.target(recipe, target)]  # refuses before anything is run
    shown = not as_json and sys.stderr.isatty()
    found = rehearse.rehearse(recipe, (lambda line: print(f"  {line}", file=sys.stderr)) if shown else None)
    outlooks.insert(0, rehearse.here(recipe, found))
    text = None if target is None else rehearse.script(recipe, path, target, outlooks[-1].hours)
    if script is not None and text is not None:
        from ..files import write_atomically

        write_atomically(script, text)
    if as_json:
        print_json(_record(path, found, outlooks, text))
        return
    _print(recipe, found, outlooks)
    if script is not None:
        print(f"\nScript: {script} (sbatch {script})")
    elif text is not None:
        print(f"\n{text}", end="")


def _record(path: Path, found: Rehearsal, outlooks: list[Outlook], script: str | None) -> dict[str, Any]:
    piece = found.piece
    return {
        "recipe": str(path),
        "rehearsed": {
            "dim": piece.config.dim,
            "slices": piece.slices,
            "vocab_parts": piece.vocab_parts,
            "rows": piece.rows,
            "context": piece.context,
            "flops_per_s": found.flops_rate,
            "predicted_bytes": found.predicted_bytes,
            "measured_bytes": found.measured_bytes,
            "loss": found.loss,
        },
        "outlook": [
            {
                "machine": outlook.machine,
                "step_seconds": outlook.step_seconds,
                "tokens_per_s": outlook.tokens_per_s,
                "mfu": outlook.mfu,
                "bytes": outlook.nbytes.total,
                "peak_bytes": outlook.peak,
                "fits": outlook.fits,
                "hours": outlook.hours,
            }
            for outlook in outlooks
        ],
        "script": script,
    }


def _print(recipe: Any, found: Rehearsal, outlooks: list[Outlook]) -> None:
    from ..report import units

    piece, train = found.piece, recipe.train
    cuts = [f"1/{piece.slices} of its heads and FFN"] if piece.slices > 1 else []
    cuts += [f"1/{piece.vocab_parts} of the vocabulary"] if piece.vocab_parts > 1 else []
    print(
        f"{recipe.name}: blocks of width {piece.config.dim:,} trained for real here in {train.dtype}"
        f"{', ' + ' and '.join(cuts) if cuts else ''}, {piece.rows} x {piece.context:,} tokens."
    )
    print(f"First loss {found.loss:.2f}; of chance {math.log(piece.config.vocab_size):.2f}.")
    print(f"A block runs at {units.si(found.flops_rate, 'FLOP/s')}.")
    if found.measured_bytes is not None:
        print(
            f"Memory of the piece: {units.nbytes(found.measured_bytes)} measured, "
            f"{units.nbytes(found.predicted_bytes)} by the formula."
        )
    print()
    print_table(
        ["the whole run on", "step", "tokens/s", "MFU %", "GB a device", "fits", "time"],
        [
            [
                outlook.machine,
                f"{outlook.step_seconds:.3g} s"
                if outlook.step_seconds < 10
                else units.duration(outlook.step_seconds),
                f"{outlook.tokens_per_s:,.0f}",
                "–" if outlook.mfu is None else f"{100 * outlook.mfu:.1f}",
                f"{outlook.peak / 1e9:,.1f}",
                "yes" if outlook.fits else "no",
                long_time(outlook.hours),
            ]
            for outlook in outlooks
        ],
    )
    if recipe.parallel.ranks > 1:
        print(f"“{outlooks[0].machine}”: the work of all {recipe.parallel.ranks:,} ranks on one.")
