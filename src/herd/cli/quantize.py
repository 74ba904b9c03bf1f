"""`herd quantize`: store a model with fewer bits per weight and measure how much it loses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError, DataError, QuantError
from .common import MODEL, Json, print_json
from .convert import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from ..llama.config import ModelConfig

CALIBRATION_CONTEXT = 512
MEASURED_CONTEXT = 512


def quantize_command(
    folder: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    to: Annotated[str, typer.Option(help="Weight format: q8, q4, q4k or q6k.")],
    out: Annotated[Path | None, typer.Option(help="Folder to create (default: NAME-q4 and so on).")] = None,
    gptq: Annotated[
        bool, typer.Option("--gptq", help="Fit the weights to text: more accurate, slower.")
    ] = False,
    calib: Annotated[str | None, typer.Option(help="Text for --gptq: a file, folder or hf:NAME.")] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Format of the embeddings (default: --to's).")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Format of the head (default: q8 for 4 bits).")] = None,
    text: Annotated[str | None, typer.Option(help="Text to measure the loss on (default: Herd's).")] = None,
    measure: Annotated[bool, typer.Option(help="Compare the result with the original on --text.")] = True,
    as_json: Json = False,
) -> None:
    """Make a smaller copy of a model with 8, 6 or 4 bits per weight, in GGUF's block formats.

    The new folder's herd.json says how close it is to the original: KL divergence, top-1 agreement,
    perplexity.
    """
    from .. import checkpoint
    from ..checkpoint.sources import model_name
    from ..plan import compare
    from ..quant import scheme

    if gptq and calib is None:
        raise QuantError("--gptq fits the weights to text: give --calib TEXT")
    if calib is not None and not gptq:
        raise QuantError("--calib is for --gptq: add --gptq or leave it out")
    source = checkpoint.open_source(folder)
    plan = scheme(to, embeddings=embeddings, head=head)
    here = Path(folder).parent if Path(folder).name == "model.gguf" else Path(folder)
    place = here.parent if here.exists() else Path()
    target = out or place / f"{model_name(source.folder)}-{to.lower()}"
    formats = {part: getattr(plan, part).name for part in ("linears", "embeddings", "head")}
    recipe: dict[str, Any] = {"formats": formats, "gptq": gptq, "calib": calib}
    rows_of = None
    if gptq and calib is not None:
        from ..quant.gptq import Gptq

        plan.plan(source.config)
        rows_of = Gptq(source.config, source.get, plan, _batches(source, calib)).rows
    with progress_bar(f"quantize {folder}") as progress:
        began = time.perf_counter()
        weights_hash = checkpoint.quantize_folder(
            source, target, plan, rows_of=rows_of, recipe=recipe, progress=progress
        )
        seconds = time.perf_counter() - began
    width = sum(info.nbytes for info in source.wanted.values()) / source.config.n_params
    planned = None if gptq else compare.compare_quantizing(source.config, plan, width, seconds, target.name)
    evals = _measure(source, target, plan.nbytes(source.config), text) if measure else {}
    if evals:
        checkpoint.update_lineage(target, evals=evals)
    result = {
        "folder": str(target),
        "weights_hash": weights_hash,
        "nbytes": (target / "model.gguf").stat().st_size,
        "bits_per_weight": 8 * plan.nbytes(source.config) / source.config.n_params,
        "formats": formats,
        "seconds": seconds,
        "predicted_seconds": planned,
        "fidelity": evals.get("fidelity"),
    }
    print_json(result) if as_json else _say(result)


def _say(result: dict[str, Any]) -> None:
    size = f"{result['nbytes'] / 1e6:,.1f} MB"
    print(f"{result['folder']}: {size}, {result['bits_per_weight']:.2f} bits per weight")
    found = result["fidelity"]
    if found:
        kl, top1, ppl = found["kl"], found["top1"], found["ppl"]
        detail, before = kl["detail"], ppl["detail"]["parent"]
        print(
            f"compared with the original: KL {kl['value']:.3g} nats per token (99th percentile "
            f"{detail['p99']:.3g}), same most likely token {100 * top1['value']:.1f} %, "
            f"perplexity {before:.4g} -> {ppl['value']:.4g} on {detail['n_tokens']:,} tokens"
        )


def _batches(source: Any, calib: str) -> Sequence[Tensor]:
    """Return windows of calibration tokens, four tokens per column of the widest matrix if possible."""
    import torch

    from ..data.corpus import read_corpus

    config: ModelConfig = source.config
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise CheckpointError(f"{source.folder} has no tokenizer, but --gptq needs one to read --calib")
    context = min(CALIBRATION_CONTEXT, config.max_context)
    wanted = max(16_384, 4 * max(config.dim, config.ffn_dim))
    ids: list[int] = []
    for document in read_corpus(calib):
        ids += tokenizer.encode(document.text, bos=True)
        if len(ids) >= wanted:
            break
    windows = torch.tensor(ids[: min(len(ids), wanted) // context * context]).view(-1, context)
    if not len(windows):
        raise DataError(f"{calib}: {len(ids)} tokens are too few to calibrate with; give at least {context}")
    if len(ids) < max(config.dim, config.ffn_dim):
        _warn(f"{calib}: {len(ids):,} tokens are few for matrices of {config.ffn_dim:,} columns; give more")
    return windows.split(max(1, 2048 // context))


def _measure(source: Any, target: Path, nbytes: int, text: str | None) -> dict[str, Any]:
    """Return the measured comparison with the original.

    Empty, with a warning, if the two models do not fit in memory together or there is no tokenizer.
    """
    from .. import checkpoint
    from ..data.builtin import read_parallel
    from ..data.corpus import read_corpus
    from ..evals.quantized import affordable_tokens, cost_of_quantizing, first_tokens
    from ..evals.windows import from_texts
    from ..machine import available_memory

    tokenizer = source.tokenizer()
    if tokenizer is None:
        _warn(f"{source.folder}: without a tokenizer the loss cannot be measured")
        return {}
    needed, free = sum(info.nbytes for info in source.wanted.values()) + nbytes, available_memory()
    if needed > free:
        _warn(
            f"not measured: the original and its copy together need {needed / 1e9:.1f} GB of memory, "
            f"but only {free / 1e9:.1f} GB are free; add --no-measure, or measure on a larger machine"
        )
        return {}
    n_tokens = affordable_tokens(source.config)
    context = min(MEASURED_CONTEXT, source.config.max_context)
    documents = read_parallel() if text is None else read_corpus(text)
    held_out = from_texts(islice(documents, 2000), tokenizer, max_bytes=16 * n_tokens)
    parent, child = checkpoint.load_model(source.folder), checkpoint.load_model(target)
    found = cost_of_quantizing(parent, child, first_tokens(held_out, n_tokens), context)
    return {"fidelity": found | {"text": text or "the project's parallel sentences", "context": context}}


def _warn(message: str) -> None:
    import warnings

    warnings.warn(message, stacklevel=3)
