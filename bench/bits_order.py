"""Measure the loss of quality with 8 and 4 bits: KL divergence from the original, with and without GPTQ.

    python bench/bits_order.py                     # five minutes on two cores, three of them training
    python bench/bits_order.py FOLDER              # any trained model whose rows divide by 256

Expected order: Q8_0 far below Q4_K below Q4_0, and GPTQ below plain rounding. All formats are compared with
the original on the same held-out text, document by document, so each difference has its own interval
(bootstrap over documents). An order holds if the interval of the difference excludes zero. Embedding and head
always have 8 bits, so only the linear layers differ. GPTQ is calibrated on text of the training split.

Without FOLDER, `recipes/tiny-lm.yaml` is trained with rows of 256 and 768, as Q4_K needs them. An interrupted
training resumes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import yaml

from common import WORK, at_least, bench_parser, save_receipt
from herd import checkpoint
from herd.data.corpus import load_corpus
from herd.evals.bootstrap import ratio_interval
from herd.evals.fidelity import Fidelity, fidelity
from herd.evals.quantized import first_tokens
from herd.evals.windows import from_texts
from herd.quant import scheme
from herd.quant.gptq import Gptq
from herd.report.receipt import Value
from herd.train.recipe import parse_recipe
from herd.train.run import run_recipe

CONTEXT = 256
KINDS = {
    "Q8_0": ("q8", False),
    "Q4_K gptq": ("q4k", True),
    "Q4_K": ("q4k", False),
    "Q4_0 gptq": ("q4", True),
    "Q4_0": ("q4", False),
}
ORDER = (("Q8_0", "Q4_K gptq"), ("Q4_K", "Q4_0"), ("Q4_K gptq", "Q4_K"), ("Q4_0 gptq", "Q4_0"))
RECIPE = Path(__file__).parents[1] / "recipes" / "tiny-lm.yaml"
SHAPE = {"dim": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 768}
MUCH = 10
"""How many times less Q8_0 must cost than Q4_K to be far below (256 in theory, by steps 16 times finer)."""


def trained() -> Path:
    """Train the model, or resume its training, and return its folder."""
    data = yaml.safe_load(RECIPE.read_text())
    data["model"]["shape"] |= SHAPE
    data["out"] = str(WORK / "bits-order")
    recipe = parse_recipe(yaml.safe_dump(data), RECIPE.name)
    return run_recipe(recipe, on_step=lambda at: print(f"\rtraining: {at['step']}", end="", file=sys.stderr))[
        0
    ]


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="a trained checkpoint whose rows divide by 256")
    parser.add_argument(
        "--text", help="held-out and calibration text: splits of this corpus; Python's own if none"
    )
    parser.add_argument("--tokens", type=int, default=60_000, help="held-out tokens that are compared")
    parser.add_argument("--calib", type=int, default=32_768, help="tokens GPTQ is fitted to")
    args = parser.parse_args()
    folder = args.folder or trained()
    source = checkpoint.ImportSource(folder)
    tokenizer, config = source.tokenizer(), source.config
    if tokenizer is None:
        parser.error(f"{folder} has no tokenizer")
    corpus = load_corpus(args.text, max_bytes=20_000_000)
    documents = first_tokens(from_texts(corpus.splits["heldout"], tokenizer), args.tokens)
    ids = [
        i for document in corpus.splits["teacher"][:2000] for i in tokenizer.encode(document.text, bos=True)
    ]
    calibration = torch.tensor(ids[: args.calib // CONTEXT * CONTEXT]).view(-1, CONTEXT).split(8)
    parent = checkpoint.load_model(folder, dtype=torch.float32)
    found: dict[str, Fidelity] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, (short, fitted) in KINDS.items():
            plan = scheme(short, embeddings="q8", head="q8")
            rows = Gptq(config, source.get, plan, calibration).rows if fitted else None
            checkpoint.quantize_folder(source, Path(work) / short, plan, rows_of=rows)
            found[name] = fidelity(parent, checkpoint.load_model(Path(work) / short), documents, CONTEXT)
            print(name, *found[name].scores(), sep="\n  ")
    values: dict[str, Value] = {}
    for name, one in found.items():
        kl, top1, _ = one.scores()
        values[f"{name}: KL"] = Value(kl.value, "nats/token", lo=kl.lo, hi=kl.hi)
        values[f"{name}: KL, 99th percentile"] = Value(kl.detail["p99"], "nats/token")
        values[f"{name}: same first choice"] = Value(top1.value, "fraction", lo=top1.lo, hi=top1.hi)
    for less, more in ORDER:
        gap = ratio_interval(found[more].kl - found[less].kl, found[more].n_tokens)
        values[f"KL of {more} less that of {less}"] = Value(
            gap.value, "nats/token", lo=gap.lo, hi=gap.hi, bar="> 0", passed=gap.lo > 0
        )
    times = float(found["Q4_K"].kl.sum() / found["Q8_0"].kl.sum())
    values["KL of Q4_K over that of Q8_0"] = at_least(MUCH, times, "×")
    save_receipt(
        "bits-order",
        what="KL from the original by format and rounding, on a trained model",
        values=values,
        seed=0,
        notes=f"{config.n_params:,} parameters, D {config.dim}, F {config.ffn_dim}; {len(documents)} "
        f"held-out documents, context {CONTEXT}; embedding and head Q8_0 everywhere; differences are of "
        "paired documents",
    )


if __name__ == "__main__":
    main()
