"""`herd quantize`: store a model with fewer bits per weight and measure how much it loses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import units
from ..errors import CheckpointError, DataError, QuantError
from .common import MODEL, Json, print_json, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from ..llama.config import ModelConfig
    from ..quant.mixtures import TensorScheme

CALIBRATION_CONTEXT = 512
MEASURED_CONTEXT = 512
MAX_WINDOWS = 16
"""Windows of text for the gradients of a size in bits: each needs a backward pass."""


def quantize_command(
    folder: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    to: Annotated[
        str,
        typer.Option(
            help="llama.cpp's file type (Q4_K_M, IQ4_XS …), one format (q8, q4k …), or a size (4.2bpw)."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to create (default: NAME-q4 and so on).")] = None,
    gptq: Annotated[
        bool, typer.Option("--gptq", help="Fit the codes to text as well: more accurate, slower.")
    ] = False,
    calib: Annotated[
        str | None, typer.Option(help="Text that shows which weights matter: a file, folder or hf:NAME.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Use a file of llama-imatrix instead of --calib.")
    ] = None,
    save_imatrix: Annotated[
        Path | None, typer.Option(help="Write what --calib has measured, for llama.cpp or another run.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Format of the embeddings (default: --to's).")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Format of the head (default: --to's).")] = None,
    text: Annotated[str | None, typer.Option(help="Text to measure the loss on (default: Herd's).")] = None,
    measure: Annotated[bool, typer.Option(help="Compare the result with the original on --text.")] = True,
    as_json: Json = False,
) -> None:
    """Make a smaller copy of a model with 2 to 8 bits per weight, in GGUF's block formats.

    The new folder's herd.json says how close it is to the original: KL divergence, top-1 agreement,
    perplexity.
    """
    from .. import checkpoint
    from ..checkpoint.imatrix import read_importance, write_importance
    from ..checkpoint.paths import require_replaceable
    from ..checkpoint.sources import model_name
    from ..plan import compare
    from ..quant.mixtures import named_scheme, target_bits, with_parts

    bits = target_bits(to)
    if gptq and calib is None:
        raise QuantError("--gptq fits the weights to text: give --calib TEXT")
    if imatrix and (gptq or calib is not None or bits is not None):
        raise QuantError(
            "--imatrix replaces the text: leave out --calib and --gptq, and name a format (--to)"
        )
    if save_imatrix and (gptq or calib is None):
        raise QuantError("--save-imatrix writes what --calib measures: give --calib TEXT, without --gptq")
    source = checkpoint.open_source(folder)
    if out is not None:
        require_replaceable(out, source.folder)  # before text is read
    importance = read_importance(imatrix, source.config) if imatrix else None
    predicted = None
    if bits is None:
        with_importance = importance is not None or (calib is not None and not gptq)
        plan = named_scheme(to, source.config, with_importance=with_importance)
        plan.plan(source.config)  # refuses rows with an incomplete block before text is read
    batches = _batches(source, calib) if calib is not None or bits is not None else None
    if bits is not None:
        assert batches is not None
        plan, predicted, importance = _allocate(source, bits, batches)
    elif batches is not None and not gptq:
        from ..quant.calibration import measure_importance

        with progress_bar("measure importance", counts=True) as progress:
            importance = measure_importance(source.config, source.get, batches, progress)
    if embeddings or head:
        plan = with_parts(plan, source.config, embeddings, head)
    if save_imatrix and importance and batches:
        n_tokens = sum(ids.numel() for ids in batches)
        write_importance(save_imatrix, importance, n_tokens, batches[0].shape[1], calib or "")
    here = Path(folder).parent if Path(folder).name == "model.gguf" else Path(folder)
    place = here.parent if here.exists() else Path()
    target = out or place / f"{model_name(source.folder)}-{to.lower()}"
    formats = plan.summary(source.config)
    recipe: dict[str, Any] = {"formats": formats, "gptq": gptq, "calib": calib}
    recipe |= {"imatrix": str(imatrix)} if imatrix else {}
    rows_of = None
    if gptq and batches is not None:
        from ..quant.gptq import Gptq

        rows_of = Gptq(source.config, source.get, plan, batches).rows
    with progress_bar(f"quantize {folder}") as progress:
        began = time.perf_counter()
        weights_hash = checkpoint.quantize_folder(
            source, target, plan, rows_of=rows_of, importance=importance, recipe=recipe, progress=progress
        )
        seconds = time.perf_counter() - began
    width = sum(info.nbytes for info in source.wanted.values()) / source.config.n_params
    plain = importance is None and not gptq
    planned = compare.compare_quantizing(source.config, plan, width, seconds, target.name) if plain else None
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
        "predicted_kl": predicted,
        "fidelity": evals.get("fidelity"),
    }
    print_json(result) if as_json else _say(result)


def _say(result: dict[str, Any]) -> None:
    size = units.nbytes(result["nbytes"])
    print(f"{result['folder']}: {size}, {result['bits_per_weight']:.2f} bits per weight")
    matrices = result["formats"].get("matrices")
    if matrices:
        print("matrices: " + ", ".join(f"{count} in {name}" for name, count in matrices.items()))
    if result["predicted_kl"] is not None:
        print(
            f"predicted KL of these formats: {result['predicted_kl']:.3g} nats per token of calibration text"
        )
    found = result["fidelity"]
    if found:
        kl, top1, ppl = found["kl"], found["top1"], found["ppl"]
        detail, before = kl["detail"], ppl["detail"]["parent"]
        print(
            f"compared with the original: KL {kl['value']:.3g} nats per token (99th percentile "
            f"{detail['p99']:.3g}), same most likely token {100 * top1['value']:.1f} %, "
            f"perplexity {before:.4g} -> {ppl['value']:.4g} on {detail['n_tokens']:,} tokens"
        )


def _allocate(
    source: Any, bits: float, batches: Sequence[Tensor]
) -> tuple[TensorScheme, float, dict[str, Tensor]]:
    """Return the scheme of this size, its predicted KL divergence, and the importance of columns."""
    from ..machine import available_memory
    from ..quant.allocate import allocate, measure_sensitivity, predicted_losses
    from ..quant.calibration import load_plain

    needed, free = source.config.nbytes(4.0) * 1.2, available_memory()
    if needed > free:
        raise QuantError(
            f"a size in bits needs the whole model in memory ({units.nbytes(needed)}, "
            f"{units.nbytes(free)} are free); name a file type instead (--to Q4_K_M)"
        )
    windows = [window[None] for batch in batches for window in batch][:MAX_WINDOWS]
    with progress_bar("measure sensitivity", counts=True) as progress:
        found = measure_sensitivity(load_plain(source.config, source.get), windows, progress=progress)
    with progress_bar("try formats", counts=True) as progress:
        losses = predicted_losses(source.config, source.get, found, progress)
    plan, loss = allocate(source.config, losses, bits)
    return plan, loss, {name: one.columns_D for name, one in found.items()}


def _batches(source: Any, calib: str | None) -> Sequence[Tensor]:
    """Return windows of calibration tokens, four tokens per column of the widest matrix if possible.

    None: the sources of Python's standard library, with a warning.
    """
    import torch

    from ..data.corpus import read_corpus

    config: ModelConfig = source.config
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise CheckpointError(f"{source.folder} has no tokenizer, which the calibration text needs")
    if calib is None:
        _warn("calibrated on the sources of Python; give --calib TEXT of the kind that the model is for")
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
            f"not measured: the original and its copy together need {units.nbytes(needed)} of memory, "
            f"but only {units.nbytes(free)} are free; add --no-measure, or measure on a larger machine"
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
