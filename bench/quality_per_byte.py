"""Measure the KL divergence from the original by bytes, beside files of llama.cpp's own quantizer.

    make rivals                                            # llama-cpp-python from its source, in .venv-rivals
    python bench/quality_per_byte.py smollm2 --text FILE   # half an hour on two cores

For every file type, Herd and llama.cpp write a file with and without importance of columns. Both get the same
importance, which Herd measures on the training part of the text. For the sizes of three of llama.cpp's
mixtures, Herd also writes a file of the same size with the formats it has chosen itself, and one with GPTQ.
Herd runs all files, on the same held-out text, and each difference has an interval over documents.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from common import ROOT, bench_parser, save_receipt
from contestant import Contestant
from herd import checkpoint
from herd.checkpoint.names import gguf_name
from herd.data.corpus import load_corpus
from herd.evals.bootstrap import ratio_interval
from herd.evals.fidelity import Fidelity, fidelity
from herd.evals.quantized import first_tokens
from herd.evals.windows import from_texts
from herd.quant.allocate import allocate, measure_sensitivity, predicted_losses
from herd.quant.calibration import load_plain, measure_importance
from herd.quant.gptq import Gptq
from herd.quant.mixtures import FILE_TYPES, mixture
from herd.report.receipt import Value

CONTEXT = 512
TYPES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
SIZES = ("Q3_K_M", "Q4_K_M", "Q5_K_M")
"""Types of llama.cpp whose sizes Herd's own choices of formats are compared at."""


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("model", help="an unquantized checkpoint, best with rows that divide by 256")
    parser.add_argument(
        "--text", help="training and held-out text: splits of this corpus; Python's own if none"
    )
    parser.add_argument("--tokens", type=int, default=20_000, help="held-out tokens that are compared")
    parser.add_argument("--calib", type=int, default=16_384, help="tokens that importance is measured on")
    parser.add_argument("--gptq", action="store_true", help="also fit one file of each size with GPTQ")
    parser.add_argument(
        "--rivals", type=Path, default=ROOT / ".venv-rivals", help="the environment of `make rivals`"
    )
    args = parser.parse_args()
    source = checkpoint.open_source(args.model)
    config, tokenizer = source.config, source.tokenizer()
    if tokenizer is None:
        parser.error(f"{args.model} has no tokenizer")
    corpus = load_corpus(args.text, max_bytes=20_000_000)
    documents = first_tokens(from_texts(corpus.splits["heldout"], tokenizer), args.tokens)
    ids = [
        i for document in corpus.splits["teacher"][:2000] for i in tokenizer.encode(document.text, bos=True)
    ]
    windows = torch.tensor(ids[: args.calib // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    batches = list(windows.split(4))
    importance = measure_importance(config, source.get, batches)
    sensitivity = measure_sensitivity(load_plain(config, source.get), list(windows[:16].split(1)))
    losses = predicted_losses(config, source.get, sensitivity)
    parent = load_plain(config, source.get)
    found: dict[str, Fidelity] = {}
    bits: dict[str, float] = {}
    python = args.rivals / "bin" / "python"
    worker = Contestant([str(python), str(Path(__file__).with_name("llamacpp_worker.py"))], quiet=True)
    with worker as rival, tempfile.TemporaryDirectory() as work:
        plain = Path(work) / "plain.gguf"
        checkpoint.export_hf(args.model, Path(work) / "plain", dtype=torch.float32)
        checkpoint.export_gguf(Path(work) / "plain", plain, "f32")
        saved = Path(work) / "importance.npz"
        np.savez(saved, **{gguf_name(name): mean_D.numpy() for name, mean_D in importance.items()})

        def judge(name: str, path: Path, nbytes: int) -> None:
            found[name] = fidelity(parent, checkpoint.load_model(path), documents, CONTEXT)
            bits[name] = 8 * nbytes / config.n_params
            print(
                f"{name}: {bits[name]:.3f} bits per weight, KL {found[name].scores()[0].value:.4g}",
                file=sys.stderr,
            )

        for kind in TYPES:
            for label, weights in (("", None), (" imatrix", importance)):
                plan = mixture(kind, config, with_importance=weights is not None)
                checkpoint.quantize_folder(source, Path(work) / "ours", plan, importance=weights)
                judge(f"herd {kind}{label}", Path(work) / "ours", plan.nbytes(config))
                theirs = Path(work) / "theirs.gguf"
                job = {"do": "quantize", "file": str(plain), "out": str(theirs), "ftype": FILE_TYPES[kind]}
                rival.ask(job | {"pure": False} | ({} if weights is None else {"imatrix": str(saved)}))
                judge(f"llama.cpp {kind}{label}", theirs, plan.nbytes(config))
        for kind in SIZES:
            size = bits[f"llama.cpp {kind} imatrix"]
            plan, _ = allocate(config, losses, size)
            columns = {name: one.columns_D for name, one in sensitivity.items()}
            checkpoint.quantize_folder(source, Path(work) / "ours", plan, importance=columns)
            judge(f"herd chosen at {kind}", Path(work) / "ours", plan.nbytes(config))
            if args.gptq:
                rows_of = Gptq(config, source.get, plan, batches).rows
                checkpoint.quantize_folder(source, Path(work) / "ours", plan, rows_of=rows_of)
                judge(f"herd chosen at {kind}, gptq", Path(work) / "ours", plan.nbytes(config))
        version = rival.ask({"do": "version"})
    save_receipt(
        "quality-per-byte",
        what="KL from the original by bytes, beside llama.cpp's quantizer",
        values=_values(found, bits),
        seed=0,
        rivals={"llama-cpp-python": version},
        notes=f"{config.n_params:,} parameters, D {config.dim}, F {config.ffn_dim}; {len(documents)} held-out "
        f"documents, context {CONTEXT}; all files run by Herd; differences are of paired documents",
    )


def _values(found: Mapping[str, Fidelity], bits: Mapping[str, float]) -> dict[str, Value]:
    """Return KL and bits of every file, and differences from llama.cpp's file of the same type and size."""
    values: dict[str, Value] = {}
    for name, one in found.items():
        kl = one.scores()[0]
        values[f"{name}: bits per weight"] = Value(bits[name], "bits")
        values[f"{name}: KL"] = Value(kl.value, "nats/token", lo=kl.lo, hi=kl.hi)
    for name, one in found.items():
        ours, _, rest = name.partition(" ")
        if ours != "herd":
            continue
        chosen = rest.startswith("chosen at ")
        kind = rest.removeprefix("chosen at ").removesuffix(", gptq") + " imatrix" if chosen else rest
        rival = found[f"llama.cpp {kind}"]
        gap = ratio_interval(rival.kl - one.kl, one.n_tokens)
        passed, bar = (gap.lo > 0, "> 0") if chosen else (gap.hi > 0, "not below 0")
        values[f"KL of llama.cpp {kind} less that of {name}"] = Value(
            gap.value, "nats/token", lo=gap.lo, hi=gap.hi, bar=bar, passed=passed
        )
    return values


if __name__ == "__main__":
    main()
