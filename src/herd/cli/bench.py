"""`herd bench`: measure how fast a model runs here, compared with the speed of the memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import units
from ..errors import CheckpointError, ConfigError
from .common import MODEL, Json, Kv, Threads, print_json, print_table, progress_bar, progress_display

if TYPE_CHECKING:
    from ..evals.rival import LlamaCpp
    from ..evals.speed import Work
    from ..llama.config import ModelConfig
    from ..llama.model import LlamaLM

OVERHEAD_MEMORY = 1_500_000_000
"""Bytes of everything but weights and cache: the process, activations, the buffer that measures memory."""
TO = "With --size: the weights, as in herd quantize (default: Q4_0)."


def bench_command(
    folder: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL + " Or give --size.")] = None,
    size: Annotated[str | None, typer.Option(help="Random weights of 405B, 70B, 8B, 3B or 1B shape.")] = None,
    to: Annotated[str | None, typer.Option("--to", "--quant", help=TO)] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache when decoding is measured.")] = 128,
    prompt: Annotated[int, typer.Option(min=1, help="Length of the prompt when prefill is measured.")] = 512,
    batch: Annotated[str, typer.Option(help="Numbers of sequences to decode at once, e.g. 1,16.")] = "1",
    kv: Kv = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are reported.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Tokens to decode in a round.")] = 8,
    layers: Annotated[int | None, typer.Option(min=1, help="With --size: only the first N layers.")] = None,
    rivals: Annotated[bool, typer.Option("--rivals", help="Compare with llama.cpp (make rivals).")] = False,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights and prompts.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode on this machine, compared with the speed of its memory.

    --size needs no checkpoint: it makes random weights of the same shape, and these run at the same speed.
    """
    batches = _batches(batch)
    if (folder is None) == (size is None):
        raise ConfigError("give either a model or --size, e.g. herd bench --size 8B")
    if folder is not None and (to is not None or layers is not None):
        raise ConfigError("--to and --layers need --size: stored models are measured as they are")
    source = _Random(size, to or "Q4_0", layers, seed) if size is not None else _Stored(folder or "")
    config = source.config
    from ..evals.speed import Work, longest_sequence, scheme_of
    from ..plan import compare

    works = [Work("decode", context, n) for n in batches] + [Work("prefill", prompt)]
    longest = longest_sequence(works, rounds, steps)
    if longest > config.max_context:
        raise ConfigError(
            f"--prompt {prompt}, --context {context} and {rounds + 1} rounds of {steps} steps take {longest} "
            f"tokens, but the model's context is {config.max_context}: lower one of them"
        )
    # llama.cpp maps its file or repacks it, so its weights need memory a second time
    source.require_memory(_overhead(config, kv, longest, max(batches)) + (source.nbytes if rivals else 0))
    if rivals:
        from ..evals.rival import find_python

        find_python()  # raises now rather than after minutes of work
    with ExitStack() as stack:
        start = time.perf_counter()
        model = source.load()
        load_seconds = time.perf_counter() - start
        rival = stack.enter_context(_rival(source, longest, max(batches))) if rivals else None
        result = _measured(model, works, rounds, steps, kv, seed, rival)
        compare.compare_bench(config, scheme_of(model).linears.name, result["rows"], source.name)
    result = {"model": source.name, "n_params": config.n_params, "load_seconds": load_seconds} | result
    print_json(result) if as_json else _print(result)


class _Random:
    """A published shape with random weights."""

    def __init__(self, size: str, to: str, layers: int | None, seed: int) -> None:
        import torch

        from ..llama.config import SIZES
        from ..quant.mixtures import named_scheme

        if size not in SIZES:
            raise ConfigError(f"--size {size!r} is not known: choose {', '.join(SIZES)}")
        config = SIZES[size]
        if layers is not None and layers > config.n_layers:
            raise ConfigError(f"--layers={layers}: {size} has only {config.n_layers} layers")
        self.config: ModelConfig = config if layers is None else config.replace(n_layers=layers)
        self.plan, self.to, self.seed = named_scheme(to, self.config), to, seed
        self.nbytes = self.plan.nbytes(self.config)
        self.dtype = torch.float32 if self.plan.linears.packed else torch.bfloat16
        depth = "" if layers is None else f", {layers} layer{'s' if layers > 1 else ''}"
        self.name = f"{size}{depth}, random {self.plan.label.upper()}, seed {seed}"

    def require_memory(self, overhead: int) -> None:
        """Raise `CheckpointError` if memory is too small. The message says what would fit."""
        from ..checkpoint.memory import fitting_formats
        from ..llama.config import SIZES
        from ..machine import available_memory
        from ..quant.mixtures import named_scheme

        needed, free = self.nbytes + overhead, available_memory()
        if needed <= free:
            return
        fitting = [f"--to {name}" for name in fitting_formats(self.config, free - overhead)]
        if not fitting:
            room = free - overhead
            smaller = [name for name, c in SIZES.items() if named_scheme(self.to, c).nbytes(c) <= room]
            fitting = [f"--size {name}" for name in smaller[:1]]
        cure = (
            f"{' or '.join(fitting)} would fit" if fitting else "free memory, or lower --batch and --context"
        )
        raise CheckpointError(
            f"{self.name} needs {units.nbytes(needed)} of memory ({units.nbytes(self.nbytes)} of weights), "
            f"but only {units.nbytes(free)} are free; {cure}"
        )

    def load(self) -> LlamaLM:
        from ..quant.random import random_quantized

        with progress_bar(f"make {self.name}") as progress:
            return random_quantized(self.config, self.plan, self.seed, dtype=self.dtype, progress=progress)

    def gguf(self, folder: Path) -> Path:
        """Write the same weights as a GGUF file."""
        from ..checkpoint import write_random

        with progress_bar(f"write {self.name}") as progress:
            write_random(folder / "random.gguf", self.config, self.plan, self.seed, progress=progress)
        return folder / "random.gguf"


class _Stored:
    """A checkpoint on disk."""

    def __init__(self, model: str) -> None:
        from .. import checkpoint
        from ..checkpoint.gguf import gguf_file, gguf_parts

        self.folder, self.name = checkpoint.resolve_model(model), model
        self.config = checkpoint.load_config(self.folder)
        self.file = gguf_file(self.folder)
        files = gguf_parts(self.file) if self.file else self.folder.glob("*.safetensors")
        self.nbytes = sum(file.stat().st_size for file in files)

    def require_memory(self, overhead: int) -> None:
        from ..checkpoint.memory import require_memory

        require_memory(self.config, self.nbytes + overhead, self.folder)

    def load(self) -> LlamaLM:
        from .. import checkpoint

        return checkpoint.load_model(self.folder)

    def gguf(self, folder: Path) -> Path:
        """Return the model's own GGUF file, or export one in bf16."""
        from .. import checkpoint

        if self.file:
            return self.file
        with progress_bar(f"export {self.folder}") as progress:
            checkpoint.export_gguf(self.folder, folder / "exported.gguf", "bf16", progress=progress)
        return folder / "exported.gguf"


def _overhead(config: ModelConfig, kv: str, context: int, batch: int) -> int:
    """Return the bytes of memory needed in addition to the weights."""
    from ..engine.memory import nbytes
    from ..kernels.page_layout import BYTES

    return OVERHEAD_MEMORY + nbytes(config, batch, context, BYTES.get(kv, BYTES["bf16"]))


def _measured(
    model: LlamaLM, works: list[Work], rounds: int, steps: int, kv: str, seed: int, rival: LlamaCpp | None
) -> dict[str, Any]:
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn

    from ..evals.speed import measure_speed, overhead_seconds, scheme_of
    from ..kernels.bandwidth import MemoryReader
    from ..machine import resident_memory

    with progress_display("{task.description}", BarColumn(), MofNCompleteColumn()) as bar:
        task = bar.add_task("", total=None)

        def progress(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        reader = MemoryReader()
        records = measure_speed(
            model, works, rounds=rounds, steps=steps, bandwidth=reader.measure, rival=rival,
            progress=progress, kv=kv, seed=seed,
        )  # fmt: skip
        resident = resident_memory() - reader.words.nbytes
        for record in records:
            if record["work"] == "decode":
                between = overhead_seconds(model.config, scheme_of(model), model.dtype, record["batch"])
                record["share_between_kernels"] = min(1.0, between / record["seconds"])
    about = rival and {"name": "llama.cpp", "version": rival.version, "system": rival.system}
    return {
        "threads": torch.get_num_threads(), "resident_nbytes": resident, "rows": records, "rival": about
    }  # fmt: skip


@contextmanager
def _rival(source: _Random | _Stored, context: int, batch: int) -> Iterator[LlamaCpp]:
    import torch

    from ..evals.rival import LlamaCpp

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="herd-bench-") as folder:
        file = source.gguf(Path(folder))
        with LlamaCpp(file, threads=threads, context=context, batch=batch) as rival:
            yield rival


def _print(result: dict[str, Any]) -> None:
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    print(
        f"{result['model']}: {result['n_params']:,} parameters on {threads}; ready after "
        f"{result['load_seconds']:.1f} s, {units.nbytes(result['resident_nbytes'])} of memory in use"
    )
    rival, records = result["rival"], result["rows"]
    header = ["", "tokens/s", "ms/step", "GOP/s", "GB/step", "GB/s", "of memory", "between"]
    print_table(header + (["llama.cpp", "ratio"] if rival else []), [_row(record) for record in records])
    bandwidth = next((row["read_bandwidth"] for row in records if "read_bandwidth" in row), None)
    if bandwidth is not None:
        print(f"of memory: share of the memory's speed, {units.si(bandwidth, 'B/s')} in the same rounds")
        print("between: upper bound of the share of time that is spent outside the kernels")
    if predicted := [row for row in records if "predicted_seconds" in row]:
        texts = []
        for row in predicted:
            error = 100 * (row["predicted_seconds"] / row["seconds"] - 1)
            texts.append(f"{row['name']} {1e3 * row['predicted_seconds']:,.1f} ms ({error:+.0f} %)")
        print(f"predicted by herd plan: {', '.join(texts)}; see herd plan score")
    if rival:
        print(f"llama.cpp {rival['version']} ran the same weights in turn; ratio above 1: Herd is faster")


def _row(record: dict[str, Any]) -> list[str]:
    rate, ms = f"{record['tokens_per_second']:,.1f}", f"{1e3 * record['seconds']:,.1f}"
    cells = [record["name"], rate, ms, f"{record['gops']:,.0f}"]
    if record["work"] == "decode":
        cells += [units.short(record[name] / 1e9) for name in ("nbytes", "bytes_per_second")]
        shares = (record["share_of_bandwidth"], record["share_between_kernels"])
        cells += [f"{100 * shares[0]:.0f} %", f"{100 * shares[1]:.1f} %"]
    else:
        cells += [""] * 4
    if rival := record.get("rival"):
        cells += [f"{rival['tokens_per_second']:,.1f}", f"{rival['ratio']:.2f}"]
    return cells


def _batches(text: str) -> list[int]:
    try:
        out = [int(part) for part in text.split(",")]
    except ValueError:
        out = []
    if not out or min(out) < 1 or len(set(out)) < len(out):
        raise ConfigError(f"--batch {text!r} is not a list of different positive numbers, such as 1,16")
    return out
