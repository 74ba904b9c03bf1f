"""Merge an adapter into its base, and measure the merged file, which may be worse than the trained model.

Training measures base + adapter in full precision. What people run is a merged model in fewer bits, whose
rounding may be larger than the whole update (a hundred steps at a small learning rate change no 4-bit code).
So the merged file is loaded and compared with base + adapter on held-out examples of the tuning data:

- the loss of the base, of base + adapter, and of the merged file on the answers
- the KL divergence of the merged file from base + adapter, and for comparison the divergence that the same
  rounding causes in the *untuned* base
- the *fraction that survived*: 1 - KL(tuned || merged) / KL(tuned || base). At 0 the file is as far from the
  tuned model as the untuned base is. Below `MIN_SURVIVED` the merge is refused.

The fast kernels for packed weights also round activations. Here they do not, so that only the rounding of the
weights is measured. Models run one layer at a time, so an adapter of 8B is merged in a few GB of memory.

Shapes: N tokens of the examples, D model dim.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..checkpoint import ModelSource, checkpoint_hash, load_trainable, weight_reader, write_checkpoint
from ..checkpoint.adapter_config import has_model_and_adapter, warn_of_other_base
from ..checkpoint.adapters import export_gguf_adapter, read_adapter
from ..checkpoint.gguf_folder import FileContent, encoded, write_gguf_folder
from ..checkpoint.lineage import Lineage, load_lineage, update_lineage
from ..checkpoint.paths import ADAPTER, require_replaceable
from ..checkpoint.verified import hash_file
from ..data.batch import IGNORE
from ..data.builtin import read_parallel
from ..data.tuning import Example, read_tuning
from ..dtypes import parse_dtype, torch_dtype
from ..errors import CheckpointError, ConfigError, DataError, QuantError, StorageError
from ..evals.bpb import chunk_tokens
from ..evals.fidelity import compare_logits
from ..evals.windows import from_texts
from ..files import folder_beside, put_in_place
from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from ..llama.streamed import StreamedModel
from ..quant import blocks
from ..quant.formats import Scheme
from ..quant.gptq import Gptq
from ..quant.mixtures import named_scheme
from ..text import Rendered, Tokenizer
from ..train.sources.tuning import TuningData
from .method import SMALL
from .repair import repaired_rows

MIN_SURVIVED = 0.5
"""Smallest fraction of the update that must survive rounding."""
MAX_TOKENS = 20_000
"""Most tokens of held-out examples that models are compared on: a fifth of it from `SMALL` parameters on."""
CALIBRATION_TOKENS = 16_384
"""Tokens of the tuning data that GPTQ fits the weights to."""
REPAIR_TOKENS = 100_000
"""Tokens that a repair trains on by default."""
CONTEXT = 1024
_Weights = Callable[[str], Tensor]
"""Returns a parameter by its name."""
_Rows = Callable[[str], Iterable[Tensor]]
"""Returns the blocks of a packed parameter by its name, some rows at a time."""


@dataclass(frozen=True)
class MergeReport:
    """A merged file and its measurements.

    Losses are in nats per token of held-out answers, KL divergences in nats per token. ``base_rounding_kl``
    is the KL divergence of the rounded untuned base from the untuned base.
    """

    folder: str
    to: str
    n_tokens: int
    base_loss: float | None
    tuned_loss: float | None
    merged_loss: float | None
    update_kl: float
    merged_kl: float
    base_rounding_kl: float
    survived: float
    written: bool
    examples: str


@dataclass(frozen=True)
class HeldOutExamples:
    """The examples that models are compared on. Those of Herd's own sentences have no answers."""

    examples: list[Rendered]
    name: str
    calibration: list[list[int]]
    """Token ids of up to `REPAIR_TOKENS` tokens of examples that are not held out, for GPTQ and repairs."""


def merge_adapter(
    folder: str | Path,
    to: str,
    out: Path,
    *,
    examples: Sequence[str] = (),
    gptq: bool = False,
    repair: int = 0,
    force: bool = False,
    least: float = MIN_SURVIVED,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> MergeReport:
    """Merge an adapter into its base, write it as ``to`` (a dtype or a file type), and measure it.

    ``examples`` are files to measure on (default: the held-out part of the tuning data). ``gptq`` fits packed
    weights to the part of the tuning data that was trained on. With ``repair``, they are trained on that
    number of its tokens (`repair.py`), and ``on_step`` receives the record of each step. If less than
    ``least`` of the update survives, nothing is written unless ``force``. ``say`` is told what is done, which
    may take minutes.
    """
    source = _adapter_source(folder)
    assert source.adapter is not None
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"{folder}: measuring needs a tokenizer, and the adapter and its base have none"
        )
    warn_of_other_base(source.adapter, source.path, checkpoint_hash)
    storage = _storage(to, source.config)
    out = Path(out).absolute()
    require_replaceable(out, source.path, source.adapter)
    if isinstance(storage, torch.dtype) and (gptq or repair):
        raise QuantError(f"--to {to}: --gptq and --repair are for packed formats only; leave them out")
    if gptq and repair:
        raise QuantError("--gptq and --repair: give only one of them")
    held_out = _held_out_examples(source.adapter, source.config, tokenizer, examples)
    read = weight_reader(source.path)
    base = StreamedModel(LlamaLM.on_meta(source.config), lambda name: read(name, torch.float32))
    tuned = StreamedModel(read_adapter(source.adapter).attach(LlamaLM.on_meta(source.config)), base.read)
    with folder_beside(out) as temporary:
        staging = temporary / out.name  # what writing it leaves beside it when it is killed is in there too
        rows_of: _Rows | None = None
        if repair and isinstance(storage, Scheme):
            with tempfile.TemporaryDirectory(prefix="herd-repair-") as state:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*ignoring adapter_model")  # it is merged here
                    model = load_trainable(source.path, torch.float32, "cpu")
                teacher = read_adapter(source.adapter).attach(model)
                rows_of = repaired_rows(
                    teacher, storage, held_out.calibration, Path(state), tokens=repair, on_step=on_step
                )
        elif gptq and isinstance(storage, Scheme):
            rows_of = _fitted_rows(source.config, tuned.merged, storage, held_out)
        say(f"rounding to {to}")
        made = {"gptq": gptq, "repair": repair}
        try:
            _write(staging, source, tuned.merged, storage, to, tokenizer, rows_of, made)
        except StorageError as error:  # name the folder that the user asked for
            raise StorageError(str(error).replace(str(staging), str(out))) from error
        say(f"comparing with base + adapter on {held_out.name}")
        report = _measured(staging, out, to, base, tuned, held_out, storage)
        if report.survived < least and not force:
            return report
        lineage = load_lineage(staging if isinstance(storage, torch.dtype) else staging / "model.gguf")
        if lineage is not None:
            update_lineage(staging, evals={"merge": {**vars(report), "written": True, "folder": out.name}})
        put_in_place(staging, out)
        return MergeReport(**{**vars(report), "written": True})


def export_adapter(folder: str | Path, out: Path) -> Path:
    """Write an adapter as a GGUF adapter for llama.cpp and return its path."""
    source = _adapter_source(folder)
    assert source.adapter is not None
    adapter = read_adapter(source.adapter)
    adapter.plain_layers("llama.cpp's GGUF adapter")
    export_gguf_adapter(out, adapter.attach(LlamaLM.on_meta(source.config)), source.adapter.parent.name)
    return out


def _adapter_source(folder: str | Path) -> ModelSource:
    """Return a model with an adapter on it, which may be in the folder of the model itself."""
    source = ModelSource(folder)
    if source.adapter is None and has_model_and_adapter(source.path):
        source.adapter = source.path
    if source.adapter is None:
        raise CheckpointError(f"{folder}: is not an adapter; give one that herd tune wrote, e.g. RUN/adapter")
    return source


def _held_out_examples(
    adapter: Path, config: ModelConfig, tokenizer: Tokenizer, files: Sequence[str]
) -> HeldOutExamples:
    """Return the held-out part of an adapter's tuning data, or the examples in ``files``.

    If there are none, warns and returns sentences that come with Herd.
    """
    train, held = _tuning_examples(adapter, tokenizer)
    limit = MAX_TOKENS if config.n_params < SMALL else MAX_TOKENS // 5
    name = "the held-out examples of the tuning data"
    if files:
        name, held = ", ".join(files), read_tuning(files, tokenizer, CONTEXT).require_examples()
    calibration = _first_tokens(train, REPAIR_TOKENS)
    if not held:
        note = f"{adapter}: no held-out examples; measured on Herd's own sentences (or give --data FILE)"
        warnings.warn(note, stacklevel=2)
        sentences = from_texts(read_parallel(), tokenizer, max_bytes=limit)
        examples = [Rendered(list(each.ids), [False] * len(each.ids)) for each in sentences]
        return HeldOutExamples(examples, "Herd's sentences", [each.ids for each in calibration])
    return HeldOutExamples(_first_tokens(held, limit), name, [each.ids for each in calibration])


def _tuning_examples(adapter: Path, tokenizer: Tokenizer) -> tuple[list[Example], list[Example]]:
    """Return the trained and the held-out examples of an adapter, or none if its data cannot be read."""
    lineage = load_lineage(adapter)
    recipe = (lineage.recipe if lineage else None) or {}
    if recipe.get("data", {}).get("kind") != "tuning":
        return [], []
    try:
        return TuningData(**recipe["data"]).divided(tokenizer, recipe["train"]["context"])
    except DataError as error:
        warnings.warn(f"the tuning data cannot be read again ({error})", stacklevel=3)
        return [], []


def _first_tokens(examples: Sequence[Example], n: int) -> list[Rendered]:
    """Return the first examples until they have ``n`` tokens."""
    out: list[Rendered] = []
    for example in examples:
        out.append(example.rendered)
        n -= len(example.rendered.ids)
        if n <= 0:
            break
    return out


# Writing ----------------------------------------------------------------------------------------------------


def _storage(to: str, config: ModelConfig) -> torch.dtype | Scheme:
    """Return the dtype or the scheme of formats that ``to`` names. Raises `QuantError` for an unknown one."""
    try:
        return torch_dtype(parse_dtype(to, ("fp32", "bf16", "fp16")))
    except ConfigError:
        chosen = named_scheme(to, config)
    chosen.plan(config)  # refuses rows with an incomplete block before anything is read
    return chosen


def _write(
    target: Path,
    source: ModelSource,
    merged: _Weights,
    storage: torch.dtype | Scheme,
    to: str,
    tokenizer: Tokenizer,
    rows_of: _Rows | None,
    options: dict[str, Any],
) -> None:
    """Write the merged model. Packed weights are those of ``rows_of``, or are rounded if it is None."""
    assert source.adapter is not None
    known = load_lineage(source.adapter)
    own = source.adapter / ADAPTER if source.adapter == source.path else None
    hashes = {
        "base": checkpoint_hash(source.path),
        "adapter": hash_file(own) if own else checkpoint_hash(source.adapter),
    }
    lineage = Lineage(
        name=f"{known.name if known else source.adapter.name}-{to.lower()}", stage="sft", parents=hashes,
        recipe={"merge": to} | options, licence=known.licence if known else None,
    )  # fmt: skip
    config = source.config
    if isinstance(storage, torch.dtype):
        write_checkpoint(target, config, merged, tokenizer, dtype=storage, lineage=lineage)
        return
    formats = storage.plan(config)

    def rounded(name: str) -> Iterable[Tensor]:
        return encoded(merged(name), formats[name], name)

    content = FileContent(config, formats, rows_of or rounded, tokenizer, lineage.name)
    write_gguf_folder(target, content, lambda: lineage)


def _fitted_rows(config: ModelConfig, merged: _Weights, storage: Scheme, held_out: HeldOutExamples) -> _Rows:
    """Return GPTQ's blocks of each parameter, fitted to the tuning data."""
    if not held_out.calibration:
        raise DataError("--gptq fits the weights to the tuning data, which cannot be read; leave it out")
    ends = accumulate(map(len, held_out.calibration))
    chosen = [
        ids
        for ids, end in zip(held_out.calibration, ends, strict=True)
        if end - len(ids) < CALIBRATION_TOKENS
    ]
    batches = [torch.as_tensor(ids)[None] for ids in chosen]
    return Gptq(config, merged, storage, batches).rows


# Measuring --------------------------------------------------------------------------------------------------


def _measured(
    staging: Path,
    out: Path,
    to: str,
    base: StreamedModel,
    tuned: StreamedModel,
    held_out: HeldOutExamples,
    storage: torch.dtype | Scheme,
) -> MergeReport:
    """Return the measurements of the file in ``staging``."""
    config, read = base.model.config, weight_reader(staging)
    formats = storage.plan(config) if isinstance(storage, Scheme) else {}

    def rounded(name: str) -> Tensor:
        weight = base.read(name)
        if isinstance(storage, torch.dtype):
            return weight.to(storage).float()
        rows = torch.cat(list(encoded(weight, formats[name], name)))
        return blocks.decode(rows, formats[name]).view(weight.shape)

    final = StreamedModel(LlamaLM.on_meta(config), lambda name: read(name, torch.float32))
    rounded_base = StreamedModel(LlamaLM.on_meta(config), rounded)
    batches = [torch.tensor(example.ids[:-1])[None] for example in held_out.examples]
    base_ND, tuned_ND, final_ND, rounded_ND = (
        torch.cat(model.hidden(batches), dim=1)[0] for model in (base, tuned, final, rounded_base)
    )
    targets_N = torch.tensor(
        [
            token if trained else IGNORE
            for example in held_out.examples
            for token, trained in zip(example.ids[1:], example.mask[1:], strict=True)
        ]
    )
    update_kl, merged_kl = _kl(tuned, tuned_ND, base, base_ND), _kl(tuned, tuned_ND, final, final_ND)
    if not math.isfinite(update_kl):
        raise QuantError(
            f"base + adapter gives probabilities that are not finite on {held_out.name}: train the adapter "
            "again with a lower learning rate"
        )
    survived = 1.0 if merged_kl == 0 else max(0.0, 1 - merged_kl / update_kl) if update_kl > 0 else 0.0
    return MergeReport(
        folder=str(out),
        to=to,
        n_tokens=len(targets_N),
        base_loss=_loss(base, base_ND, targets_N),
        tuned_loss=_loss(tuned, tuned_ND, targets_N),
        merged_loss=_loss(final, final_ND, targets_N),
        update_kl=update_kl,
        merged_kl=merged_kl,
        base_rounding_kl=_kl(base, base_ND, rounded_base, rounded_ND),
        survived=survived,
        written=False,
        examples=held_out.name,
    )


@torch.inference_mode()
def _kl(model: StreamedModel, states_ND: Tensor, other: StreamedModel, other_ND: Tensor) -> float:
    """Return KL(model || other) in nats per token, from the states of both after the last norm."""
    chunks = zip(
        *(each_ND.split(chunk_tokens(model.model)) for each_ND in (states_ND, other_ND)), strict=True
    )
    with model.loaded(["lm_head.weight"]) as p, other.loaded(["lm_head.weight"]) as q:
        total = sum(float(compare_logits(p.lm_head(x), q.lm_head(y))[0].double().sum()) for x, y in chunks)
    return total / len(states_ND)


@torch.inference_mode()
def _loss(model: StreamedModel, states_ND: Tensor, targets_N: Tensor) -> float | None:
    """Return the mean loss on the answers in nats per token, or None if there are none."""
    answers_N = targets_N != IGNORE
    if not answers_N.any():
        return None
    chunks = (each[answers_N].split(chunk_tokens(model.model)) for each in (states_ND, targets_N))
    with model.loaded(["lm_head.weight"]) as lm:
        total = sum(
            float(cross_entropy(lm.lm_head(x), y, reduction="sum")) for x, y in zip(*chunks, strict=True)
        )
    return total / int(answers_N.sum())
