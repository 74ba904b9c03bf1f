"""`herd bench`: how fast a model runs on this machine, or would, and how far that is from what the memory gives."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError, ConfigError, EngineError
from .common import Json, print_json, print_table
from .convert import progress_bar

if TYPE_CHECKING:
    from ..evals.rival import LlamaCpp
    from ..evals.speed import Work
    from ..llama.config import ModelConfig
    from ..llama.model import LlamaLM
    from ..quant.formats import Scheme

OVERHEAD_MEMORY = 1_500_000_000
"""Bytes beside weights and cache: the process, activations, the buffer that the bandwidth is measured on."""


def bench_command(
    folder: Annotated[
        Path | None, typer.Argument(help="A checkpoint folder; or --size for random weights.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="8B, 70B, 405B, 3B or 1B: random weights of that shape.")
    ] = None,
    quant: Annotated[
        str | None, typer.Option(help="With --size: q4 (if not given), q8, q4k, q6k or bf16.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache when decoding is measured.")] = 128,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt whose prefill is measured.")] = 512,
    batch: Annotated[str, typer.Option(help="How many sequences decode at once, e.g. 1,16.")] = "1",
    kv: Annotated[
        str, typer.Option(help="What keys and values are kept in: fp32, bf16, int8 or auto.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(help="Rounds of which medians are taken.")] = 5,
    steps: Annotated[int, typer.Option(help="Tokens decoded in a round.")] = 8,
    layers: Annotated[int | None, typer.Option(help="With --size: only so many of its layers.")] = None,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="llama.cpp on the same weights, taking turns (make rivals).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of random weights and prompts.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode on this machine, beside the speed of its memory.

    With --size no weights are needed: random ones of the true shape are made, a matrix at a time, and run as fast.
    """
    batches = _batches(batch)
    for option, value, least in (
        ("--context", context, 1),
        ("--prompt", prompt, 1),
        ("--rounds", rounds, 1),
        ("--steps", steps, 1),
        ("--seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{option}={value} must be at least {least}")
    if (folder is None) == (size is None):
        raise ConfigError("give a checkpoint folder or --size, one of the two: herd bench --size 8B")
    if folder is not None and (quant is not None or layers is not None):
        raise ConfigError(
            "--quant and --layers are for --size; a folder is measured as it is (see herd quantize)"
        )
    from ..engine.memory import require_kind

    require_kind(kv)
    source = _Random(size, quant or "q4", layers, seed) if size is not None else _Stored(folder or Path())
    config = source.config
    from ..evals.speed import Work, longest_sequence, scheme_of
    from ..plan import compare

    works = [Work("decode", context, n) for n in batches] + [Work("prefill", prompt)]
    longest = longest_sequence(works, rounds, steps)
    if longest > config.max_context:
        raise ConfigError(
            f"--prompt {prompt}, --context {context} and {rounds + 1} rounds of {steps} steps take {longest} tokens; "
            f"the model's context is {config.max_context}"
        )
    source.require_memory(_beside(config, kv, longest, max(batches), source.nbytes if rivals else 0))
    if rivals:
        from ..evals.rival import find_python

        find_python()  # before minutes of work
    with ExitStack() as stack:
        model, load_seconds = source.load()
        rival = None
        if rivals:
            rival = stack.enter_context(_rival(source, stack, longest, max(batches)))
        result = _measured(model, works, rounds, steps, kv, seed, rival)
        compare.bench(config, scheme_of(model).linears.name, result["rows"], source.name)
    result = {"model": source.name, "n_params": config.n_params, "load_seconds": load_seconds} | result
    print_json(result) if as_json else _say(result)


# Where the weights come from -----------------------------------------------------------------------------------------


class _Random:
    """A published shape with random weights."""

    def __init__(self, size: str, quant: str, layers: int | None, seed: int) -> None:
        import torch

        from ..llama.config import SIZES
        from ..quant import scheme

        if size not in SIZES:
            raise ConfigError(f"--size {size!r} is not known: choose {', '.join(SIZES)}")
        config = SIZES[size]
        if layers is not None and not 1 <= layers <= config.n_layers:
            raise ConfigError(f"--layers={layers} must be between 1 and the {config.n_layers} of {size}")
        self.config: ModelConfig = config if layers is None else config.replace(n_layers=layers)
        self.plan: Scheme = scheme(quant)
        self.size, self.quant, self.seed = size, quant, seed
        self.nbytes = self.plan.nbytes(self.config)
        self.dtype = torch.float32 if self.plan.linears.packed else torch.bfloat16
        some = "" if layers is None else f", {layers} layers"
        self.name = f"{size}{some}, random {self.plan.linears.name}, seed {seed}"

    def require_memory(self, beside: int) -> None:
        """`CheckpointError` with the numbers and what would fit."""
        from ..checkpoint.memory import fitting_formats, free_bytes
        from ..llama.config import SIZES

        free = free_bytes()
        if self.nbytes + beside <= free:
            return
        fitting = [
            f"--quant {name}" for name in fitting_formats(self.config, free - beside) if name != self.quant
        ]
        if not fitting:
            smaller = [n for n, c in SIZES.items() if self.plan.nbytes(c) + beside <= free]
            fitting = [f"--size {name}" for name in smaller[:1]]
        cure = (
            f"{' or '.join(fitting)} would fit"
            if fitting
            else "make memory free, or lower --batch and --context"
        )
        raise CheckpointError(
            f"{self.name}: weights of {self.nbytes / 1e9:.1f} GB and {beside / 1e9:.1f} GB beside them need "
            f"{(self.nbytes + beside) / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; {cure}"
        )

    def load(self) -> tuple[LlamaLM, float]:
        """The model, and how long it took."""
        from ..quant.random import random_quantized

        start = time.perf_counter()
        with progress_bar(f"make {self.name}") as progress:
            model = random_quantized(self.config, self.plan, self.seed, dtype=self.dtype, progress=progress)
        return model, time.perf_counter() - start

    def gguf(self, folder: Path) -> Path:
        """The same weights as a file."""
        from ..checkpoint import write_random

        with progress_bar(f"write {self.name}") as progress:
            write_random(folder / "random.gguf", self.config, self.plan, self.seed, progress=progress)
        return folder / "random.gguf"


class _Stored:
    """A checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        from .. import checkpoint

        self.folder, self.config, self.name = folder, checkpoint.load_config(folder), str(folder)
        files = [*folder.glob("*.safetensors"), *folder.glob("model.gguf")]
        self.nbytes = sum(file.stat().st_size for file in files)

    def require_memory(self, beside: int) -> None:
        """`CheckpointError` with the numbers and what would fit."""
        from ..checkpoint.memory import require_memory

        require_memory(self.config, self.nbytes + beside, self.folder)

    def load(self) -> tuple[LlamaLM, float]:
        """The model, and how long it took."""
        from .. import checkpoint

        start = time.perf_counter()
        return checkpoint.load_model(self.folder), time.perf_counter() - start

    def gguf(self, folder: Path) -> Path:
        """The same weights as a file: the folder's own, or an export in bf16."""
        from .. import checkpoint

        own = self.folder / "model.gguf"
        if own.exists():
            return own
        with progress_bar(f"export {self.folder}") as progress:
            checkpoint.export_gguf(self.folder, folder / "exported.gguf", "bf16", progress=progress)
        return folder / "exported.gguf"


def _beside(config: ModelConfig, kv: str, context: int, batch: int, rival: int) -> int:
    """Bytes beside the weights; ``rival`` are those of its file, mapped or repacked (the pages of a file give way)."""
    from ..engine.memory import nbytes
    from ..kernels.page_layout import BYTES

    return OVERHEAD_MEMORY + nbytes(config, batch, context, BYTES.get(kv, BYTES["bf16"])) + rival


# Measuring and printing -----------------------------------------------------------------------------------------------


def _measured(
    model: LlamaLM, works: list[Work], rounds: int, steps: int, kv: str, seed: int, rival: LlamaCpp | None
) -> dict[str, Any]:
    import psutil
    import torch

    from ..evals.speed import measure_speed, overhead_seconds, scheme_of
    from ..kernels.bandwidth import MemoryReader

    with _steps_shown() as progress:
        reader = MemoryReader()
        records = measure_speed(
            model,
            works,
            rounds=rounds,
            steps=steps,
            bandwidth=reader.measure,
            rival=rival,
            progress=progress,
            kv=kv,
            seed=seed,
        )
        resident = psutil.Process().memory_info().rss - reader.words.nbytes
        for record in records:
            if record["work"] == "decode":
                between = overhead_seconds(model.config, scheme_of(model), model.dtype, record["batch"])
                record["share_between_kernels"] = min(1.0, between / record["seconds"])
    return {
        "threads": torch.get_num_threads(),
        "resident_nbytes": resident,
        "rows": records,
        "rival": None
        if rival is None
        else {"name": "llama.cpp", "version": rival.version, "system": rival.system},
    }


@contextmanager
def _rival(source: _Random | _Stored, stack: ExitStack, context: int, batch: int) -> Iterator[LlamaCpp]:
    import torch

    from ..evals.rival import LlamaCpp

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="herd-bench-")))
    with LlamaCpp(
        source.gguf(folder), threads=torch.get_num_threads(), context=context, batch=batch
    ) as rival:
        yield rival


@contextmanager
def _steps_shown() -> Iterator[Callable[[str, int, int], None]]:
    """What is being measured, on stderr in a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def _say(result: dict[str, Any]) -> None:
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    print(
        f"{result['model']}: {result['n_params']:,} parameters on {threads}; ready in {result['load_seconds']:.1f} s, "
        f"{result['resident_nbytes'] / 1e9:.1f} GB resident"
    )
    header = ["", "tokens/s", "ms/step", "GOP/s", "GB/step", "GB/s", "of memory", "between"]
    rival = result["rival"]
    header += ["llama.cpp", "ratio"] if rival else []
    rows = []
    for row in result["rows"]:
        decodes = row["work"] == "decode"
        cells = [
            row["name"],
            f"{row['tokens_per_second']:,.1f}",
            f"{1e3 * row['seconds']:,.1f}",
            f"{row['gops']:,.0f}",
        ]
        if decodes:
            cells += [f"{row['nbytes'] / 1e9:.2f}", f"{row['bytes_per_second'] / 1e9:.1f}"]
            cells += [
                f"{100 * row['share_of_bandwidth']:.0f} %",
                f"{100 * row['share_between_kernels']:.1f} %",
            ]
        else:
            cells += [""] * 4
        if rival:
            cells += [f"{row['rival']['tokens_per_second']:,.1f}", f"{row['rival']['ratio']:.2f}"]
        rows.append(cells)
    print_table(header, rows)
    bandwidth = next((row["read_bandwidth"] for row in result["rows"] if "read_bandwidth" in row), None)
    if bandwidth is not None:
        print(
            f"Memory is read at {bandwidth / 1e9:.1f} GB/s in the same rounds. Between: Python and dispatch, at most."
        )
    if told := [row for row in result["rows"] if "predicted_seconds" in row]:
        said = ", ".join(
            f"{row['name']} {1e3 * planned:,.1f} ms ({100 * (planned / row['seconds'] - 1):+.0f} %)"
            for row in told
            for planned in [row["predicted_seconds"]]
        )
        print(f"herd plan would have said: {said}; see herd plan score.")
    if rival:
        print(
            f"llama.cpp {rival['version']} on the same weights, taking turns; ratio above 1: Herd takes less time."
        )


def _batches(text: str) -> list[int]:
    try:
        out = [int(part) for part in text.split(",")]
    except ValueError:
        out = []
    if not out or min(out) < 1 or len(set(out)) < len(out):
        raise EngineError(f"--batch {text!r} is not a list of positive numbers, each once, such as 1,16")
    return out
