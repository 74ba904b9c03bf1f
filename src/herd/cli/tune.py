"""`herd tune`: fine-tune a model on a user's files, show what it will see, and merge the result."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DataError, QuantError
from .common import MODEL, RUN, Json, RunFirst, checked, print_json, print_table
from .eval_model import DataOption, data_source
from .train import step_progress

app = typer.Typer(cls=RunFirst, add_completion=False, no_args_is_help=True, rich_markup_mode=None)
Files = Annotated[
    list[str], typer.Option("--data", help="A file, folder or pattern of examples; repeat it for more.")
]


@app.callback()
def _group() -> None:
    """Fine-tune a model on your files: herd tune MODEL --data FILE."""


@app.command(RUN)
def tune_command(
    model: Annotated[str, typer.Argument(help=MODEL)],
    data: Files,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/tune/NAME).")] = None,
    method: Annotated[str, typer.Option(help="auto, full, lora, or qlora (on a packed GGUF).")] = "auto",
    objective: Annotated[str, typer.Option(help="auto, sft, or dpo (pairs of answers).")] = "auto",
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA adapters.")] = 16,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale adapters by 32/sqrt(rank), not 32/rank (ranks above 64).")
    ] = False,
    dora: Annotated[
        bool, typer.Option("--dora", help="Train the lengths of weight rows too (DoRA).")
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Learning rate (default: by size and method).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of updates.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Number of tokens to read, instead.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead (default: 2).")] = None,
    context: Annotated[
        int | None, typer.Option(min=64, help="Tokens of a row (default: the longest).")
    ] = None,
    heldout: Annotated[
        str | None, typer.Option(help="Examples to measure on (default: 5 % of the data).")
    ] = None,
    replay: Annotated[
        list[str] | None, typer.Option(help="Other examples or text to mix in against forgetting.")
    ] = None,
    replay_share: Annotated[float, typer.Option(help="Share of the rows that are replay.")] = 0.2,
    beta: Annotated[float, typer.Option(help="DPO's beta.")] = 0.1,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks or files of questions to score before and after.")
    ] = None,
    other: Annotated[
        list[str] | None, typer.Option(help="Text to measure forgetting on (default: Herd's sentences).")
    ] = None,
    benchmarks: DataOption = None,
    seed: int = 0,
    check: Annotated[bool, typer.Option("--check", help="Show what would happen, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model, and compare it with the model that it started from.

    Ctrl-C saves the state of the run, and the same command resumes it.
    """
    from ..checkpoint.sources import model_name, resolve_model
    from ..train.recipe import read_recipe
    from ..tune.options import TuneOptions
    from ..tune.preflight import preflight, screen
    from ..tune.recipe import FILE
    from ..tune.run import lock_run, open_run, table, tune

    folder = out or Path("runs") / "tune" / model_name(resolve_model(model))
    if sum(value is not None for value in (steps, tokens, epochs)) > 1:
        raise DataError("--steps, --tokens and --epochs: give one of the three")
    options = checked(
        TuneOptions, method=method, objective=objective, model=model,
        data=tuple(data), out=str(folder), rank=rank, rslora=rslora, dora=dora, lr=lr, steps=steps,
        tokens=tokens, epochs=epochs, context=context,
        heldout=heldout, replay=tuple(replay or ()), replay_share=replay_share, beta=beta,
        tasks=tuple(map(str.strip, tasks.split(","))) if tasks else (), other=tuple(other or ()), seed=seed,
    )  # fmt: skip
    source = data_source(benchmarks)
    say = (lambda line: None) if as_json else print
    with lock_run(folder):
        run = open_run(options)
        found = None
        if run is not None:
            found = preflight(run, options.tasks, source)
            if not as_json:
                _print_lines(screen(found))
        else:
            say(f"resuming the run in {folder}")
        if check:
            if as_json:
                print_json(None if found is None else dataclasses.asdict(found) | {"seconds": found.seconds})
            return
        recipe = read_recipe(folder / FILE)
        with step_progress(recipe.name, recipe.train.steps, show=True) as on_step:
            tuned = tune(options, source, on_step=on_step, say=say)
    if as_json:
        record = {name: getattr(tuned.result, name) for name in ("step", "tokens", "seconds", "resumed_from")}
        changes = [dataclasses.asdict(change) for change in tuned.changes]
        print_json({"folder": str(tuned.folder), "changes": changes} | record)
        return
    print()
    print_table(("measured", "before", "after", "change", ""), table(tuned.changes))
    print(f"\n{tuned.folder}: {tuned.result.tokens:,} tokens in {tuned.result.seconds:,.0f} s")
    print(f"talk to it: {shlex.join(['herd', 'chat', str(tuned.folder)])}")
    if tuned.folder.name == "adapter":
        print(f"merge it:   {shlex.join(['herd', 'tune', 'merge', str(tuned.folder), '--to', 'Q4_0'])}")


def _print_lines(lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:>{width}}  {text}")


@app.command("merge")
def merge_command(
    adapter: Annotated[str, typer.Argument(help="The folder of an adapter, e.g. runs/tune/NAME/adapter.")],
    to: Annotated[str, typer.Option(help="fp32, bf16, Q8_0, Q4_K_M, Q4_0 …, or gguf-adapter for llama.cpp.")],
    out: Annotated[Path | None, typer.Option(help="Folder to create (default: beside the adapter).")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Examples to measure on (default: the held-out ones).")
    ] = None,
    gptq: Annotated[bool, typer.Option("--gptq", help="Fit packed weights to the examples.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Train the packed weights to answer like base + adapter.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write the model even if its update is lost.")
    ] = False,
    least: Annotated[float, typer.Option(min=0, max=1, help="Share of the update that must survive.")] = 0.5,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, and measure how much of the tuning the merged file has kept.

    Exits with 1, without writing, if less than --least of the update survived rounding.
    """
    from ..tune.merge import REPAIR_TOKENS, export_adapter, merge_adapter
    from ..tune.repair import repair_steps

    here = Path(adapter).absolute() if Path(adapter).exists() else Path("adapter").absolute()
    if to == "gguf-adapter":
        print(export_adapter(adapter, out or here.with_name(f"{here.name}.gguf")))
        return
    target = out or here.with_name(f"merged-{to.lower().replace('/', '-')}")
    tokens = REPAIR_TOKENS if repair else 0
    with step_progress("repair", repair_steps(tokens), show=repair) as on_step:
        found = merge_adapter(
            adapter, to, target, examples=data or (), gptq=gptq, repair=tokens, force=force, least=least,
            on_step=on_step, say=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        _print_lines(_merge_lines(found))
    if not found.written:
        fit = "" if gptq or repair else "--repair or --gptq, which fit the rounded weights to your data, or "
        raise QuantError(
            f"only {100 * found.survived:.0f} % of the update survived {to}, less than {100 * least:.0f} %: "
            f"nothing was written; try {fit}a format with more bits, or --force"
        )


def _merge_lines(report: Any) -> list[tuple[str, str]]:
    lines = [("measured on", f"{report.n_tokens:,} tokens of {report.examples}")]
    if report.tuned_loss is not None:
        losses = (report.base_loss, report.tuned_loss, report.merged_loss)
        text = "base {:.4f}, base + adapter {:.4f}, merged {:.4f} nats/token".format(*losses)
        lines.append(("loss of answers", text))
    alone = f"by rounding alone: {report.base_rounding_kl:.3g}"
    lines += [
        ("update", f"KL {report.update_kl:.3g} nats/token from the base"),
        ("rounding", f"KL {report.merged_kl:.3g} from base + adapter ({alone})"),
        ("survived", f"{100 * report.survived:.1f} % of the update"),
    ]
    return [*lines, ("written", report.folder)] if report.written else lines


@app.command("inspect")
def inspect_command(
    data: Annotated[list[str], typer.Argument(help="Files of examples, or the folder of a tuning run.")],
    model: Annotated[str | None, typer.Option(help="The model that will see them. " + MODEL)] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of packed rows to show.")] = 1,
    context: Annotated[
        int | None, typer.Option(min=64, help="Tokens of a row (default: as the run has).")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here instead of printing.")] = None,
    as_json: Json = False,
) -> None:
    """Show the tokens that a model will see, which of them are trained, and rows that are set aside."""
    from ..data.tuning import reasons_of
    from ..train.recipe import read_recipe
    from ..tune.inspect import as_text, seen_documents, write_page
    from ..tune.options import stored_options
    from ..tune.recipe import FILE, fitting_context, read_examples

    folder = Path(data[0])
    if (options := stored_options(folder)) is not None:
        data, model = list(options.data), model or options.model
        context = context or read_recipe(folder / FILE).train.context
    if model is None:
        raise DataError("--model MODEL is missing: which tokens a file becomes depends on the model")
    source, tokenizer, found = read_examples(model, data, context)
    context = context or fitting_context(found.examples or found.pairs, source.config.max_context)
    documents = seen_documents(found, tokenizer, context, rows)
    if as_json:
        aside = [dataclasses.asdict(row) for row in found.set_aside]
        print_json({"documents": [dataclasses.asdict(seen) for seen in documents], "set_aside": aside})
        return
    if html is None:
        print(as_text(documents, colour=sys.stdout.isatty()))
    else:
        write_page(html, documents, model)
        print(html)
    for reason in reasons_of(found.set_aside):
        print(f"set aside: {reason}", file=sys.stderr)


@app.command("language")
def language_command(
    language: Annotated[str, typer.Argument(help="The language's code, e.g. ja.")],
    text: Annotated[list[str], typer.Option("--text", help="Text in the language; repeat it for more.")],
    model: Annotated[str, typer.Option(help=MODEL)] = "smollm2",
    add: Annotated[int, typer.Option(min=1, help="Most tokens to add to the vocabulary.")] = 4096,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on.")] = 500_000,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Learning rate (default: by size).")] = None,
    replay: Annotated[
        list[str] | None, typer.Option(help="Other text to mix in (default: Herd's sentences).")
    ] = None,
    replay_share: Annotated[float, typer.Option(help="Share of the rows that are replay.")] = 0.2,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/tune/LANGUAGE).")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only show bytes per token and what is not replayed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Teach a model a language: extend its vocabulary, train the new tokens, and measure the changes.

    Ctrl-C saves the state of the run, and the same command resumes it.
    """
    from ..tune.language import LanguageOptions, measure_fertility, steps_of, teach_language, without_replay
    from ..tune.run import table

    if not language.replace("-", "").isalnum():
        raise DataError(f"{language!r} is no code of a language; write one such as ja or pt-BR")
    folder = out or Path("runs") / "tune" / language
    options = checked(
        LanguageOptions, model=model, language=language, text=tuple(text), out=str(folder), add=add,
        tokens=tokens, rank=rank, lr=lr, replay=tuple(replay or ()), replay_share=replay_share,
    )  # fmt: skip
    if check:
        fertility = measure_fertility(options)
        if as_json:
            print_json(vars(fertility))
        else:
            print(f"{language}: {fertility}")
            print(without_replay(options) or "the replay has text in every language of the report")
        return
    with step_progress(language, steps_of(options), show=True) as on_step:
        say = (lambda line: None) if as_json else print
        found = teach_language(options, on_step=on_step, say=say)
    if as_json:
        changes = [dataclasses.asdict(change) for change in found.changes]
        print_json({"folder": str(found.folder), "fertility": vars(found.fertility), "changes": changes})
        return
    print()
    print_table(("measured", "before", "after", "change", ""), table(found.changes))
    print(f"\n{found.folder}\ntalk to it: {shlex.join(['herd', 'chat', str(found.folder)])}")
    smaller = shlex.join(["herd", "quantize", str(found.folder), "--to", "Q4_K_M"])
    print(f"store it in fewer bits: {smaller}")
