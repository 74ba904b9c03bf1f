"""`herd synth`: make training data with a teacher, verified and without near-duplicates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DataError
from .common import MODEL, Json, print_json, progress_display


def synth_command(
    prompts: Annotated[
        Path | None,
        typer.Argument(help="Rows of prompts, with tests, expression, answer or schema to verify by."),
    ] = None,
    teacher: Annotated[str, typer.Option(help="Who answers. " + MODEL + " Or http://HOST:PORT.")] = "smollm2",
    documents: Annotated[
        str | None,
        typer.Option(help="Text instead of prompts: the teacher writes a question for each passage."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the work and its shards.")] = Path("runs/synth"),
    samples: Annotated[
        int, typer.Option(min=0, help="Answers to each prompt (default: 1, or 5 to agree).")
    ] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    agree: Annotated[
        float, typer.Option(min=0, max=1, help="Share of answers that must say the same.")
    ] = 0.4,
    similarity: Annotated[float, typer.Option(min=0, max=1, help="Similarity of near-duplicates.")] = 0.8,
    budget_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens, prompts included.")] = None,
    budget_usd: Annotated[float | None, typer.Option(min=0, help="Most to spend.")] = None,
    usd_per_mtok: Annotated[float, typer.Option(min=0, help="Price of a million tokens.")] = 0.0,
    name: Annotated[str | None, typer.Option("--model", help="Name of the model at an endpoint.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the answers.")] = 0,
    as_json: Json = False,
) -> None:
    """Let a teacher answer prompts, keep verified answers, and write them as dialogs for herd tune.

    Ctrl-C keeps what is done, and the same command continues.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    from ..data.corpus import read_corpus, require_apart
    from ..distill.synth import prompts_from_documents, read_prompts, synthesize
    from ..distill.teachers import SynthOptions, open_teacher

    if (prompts is None) == (documents is None):
        raise DataError("give either a file of prompts or --documents TEXT")
    if documents is not None:
        require_apart(out, [documents])
    if budget_usd is not None and not usd_per_mtok:
        raise DataError("--budget-usd needs --usd-per-mtok, the price of a million tokens")
    asked = (
        read_prompts(prompts) if prompts is not None else prompts_from_documents(list(read_corpus(documents)))
    )
    unverified = any(not prompt.check and not prompt.passage for prompt in asked)
    if unverified and samples == 1:
        raise DataError("--samples 1: answers that nothing verifies are compared; give at least --samples 3")
    options = SynthOptions(
        samples=samples or (5 if unverified else 1), temperature=temperature, max_tokens=max_tokens,
        agree=agree, similarity=similarity, budget_tokens=budget_tokens, budget_usd=budget_usd,
        usd_per_mtok=usd_per_mtok, seed=seed,
    )  # fmt: skip
    with progress_display("synth", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("synth", total=len(asked))

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done)
            if bar.disable:  # in a log file
                print(f"{done:,} of {total:,} prompts", file=sys.stderr, flush=True)

        found = synthesize(asked, open_teacher(teacher, name), out, options, show)
    if as_json:
        print_json(vars(found) | {"shards": [str(path) for path in found.shards], "finished": found.finished})
        return
    cost = f", {found.usd:.2f} USD" if usd_per_mtok else ""
    print(f"{found.n_done:,} of {found.n_prompts:,} prompts answered, {found.tokens:,} tokens{cost}")
    for method in sorted({*found.accepted, *found.rejected}):
        right, wrong = found.accepted[method], found.rejected[method]
        why = f", most often: {found.reasons[method].most_common(1)[0][0]}" if wrong else ""
        print(f"{method}: {right:,} answers accepted, {wrong:,} rejected{why}")
    if found.refused:
        print(f"{len(found.refused):,} prompts left out that the teacher refused, such as {found.refused[0]}")
    print(f"{found.n_lines:,} dialogs in {out / 'shards'}, {found.n_duplicates:,} near-duplicates left out")
    if not found.finished:
        print(
            "the next prompt may take more than the rest of the budget; the same command with more continues"
        )
