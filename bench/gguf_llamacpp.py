"""Check that llama.cpp and Herd give the same results with each other's GGUF files.

    make rivals                                              # llama-cpp-python from its source, in .venv-rivals
    python bench/gguf_llamacpp.py runs/full/teacher          # a minute

Herd exports a folder as F32, F16, Q8_0, Q4_0 and Q4_K_M. llama.cpp loads each, tokenizes the same texts, and
continues greedily for 64 tokens. llama.cpp writes its own files from Herd's (F32, Q8_0, Q4_0, Q4_K_M and
Q5_K_M, with its own quantizer), and Herd imports them. The content of such a file is compared without the
rounding of activations that both do: Herd runs its blocks by the reference (HERD_ISA), unpacks them and
exports them as F32, and llama.cpp's logits on that file must equal Herd's. Everything is repeated with Llama
3.1's RoPE scaling on the same weights.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import herd
from common import ROOT, at_most, bench_parser, exactly, save_receipt
from contestant import Contestant
from herd import checkpoint
from herd.checkpoint.gguf import GGUF
from herd.llama.config import RopeScaling
from herd.quant.linear import is_quantized
from herd.report.receipt import Value

N_TOKENS = 64
FORMATS = ("f32", "f16", "q8_0", "q4_0", "q4_k_m")
WRITTEN = {"F32": 0, "Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q5_K_M": 17}
"""llama.cpp's numbers of the file types it shall write."""
PROMPT = "def area(radius):\n    return"
TEXTS = [
    PROMPT,
    "Hello, world!  <|eot_id|> is text here.\n\n\tTabs, 12345 and 3.14159…",
    "Die Straße ist naß; l'été à Paris; ¿Cómo estás? नमस्ते สวัสดี こんにちは 🦙",
    " leading and trailing spaces   ",
    "don't can't I'LL we've\r\n\r\nCRLF",
]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Return Herd's greedy tokens. Stop tokens do not end them, as in llama.cpp's worker."""
    from herd.engine.engine import Engine
    from herd.engine.request import Request, Sampling

    return Engine(model, None).run([Request(prompt, Sampling(max_tokens=N_TOKENS, temperature=0))])[0].ids


def logits(model: Any, prompt: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model.logits(torch.tensor([prompt]))[0].numpy()


def same_start(a: list[int], b: list[int]) -> int:
    """Return the number of tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def measure(rival: Contestant, folder: Path, work: Path, label: str) -> dict[str, Value]:
    """Return all comparisons for a folder. Their keys end in ``label``."""
    values: dict[str, Value] = {}
    tokenizer = checkpoint.load_tokenizer(folder)
    if tokenizer is None:
        sys.exit(f"{folder} has no tokenizer")
    prompt = tokenizer.encode(PROMPT, bos=True)
    for name in FORMATS:
        checkpoint.export_gguf(folder, work / f"{name}.gguf", name)
    tokenized = rival.ask({"do": "tokenize", "file": str(work / "f16.gguf"), "texts": TEXTS})
    runs = [run_theirs(rival, work / f"{name}.gguf", prompt, N_TOKENS) for name in FORMATS]
    for name, ftype in WRITTEN.items():
        job = {"file": str(work / "f32.gguf"), "out": str(work / f"their-{name}.gguf"), "ftype": ftype}
        rival.ask({"do": "quantize", "pure": name[-1] != "M", **job})
    equal = [
        ours == theirs
        for ours, theirs in zip([tokenizer.encode(t, bos=True) for t in TEXTS], tokenized["ids"], strict=True)
    ]
    values[f"texts tokenized alike{label}"] = exactly(len(TEXTS), sum(equal), "texts")
    for name, (their_ids, their_logits) in zip(FORMATS, runs, strict=True):
        checkpoint.import_gguf(work / f"{name}.gguf", work / name)
        model = checkpoint.load_model(work / name, dtype=torch.float32)
        same = same_start(greedy(model, prompt), their_ids)
        must = name in ("f32", "f16", "q8_0")
        values[f"{name}: same greedy tokens{label}"] = Value(
            same, "tokens", bar=f"= {N_TOKENS}" if must else None, passed=same == N_TOKENS if must else None
        )
        far = float(np.abs(logits(model, prompt) - their_logits).max())
        exact = name == "f32"
        values[f"{name}: largest difference of logits{label}"] = Value(
            far, "logits", bar="≤ 1e-3" if exact else None, passed=far <= 1e-3 if exact else None
        )
    return values | imports(rival, work, prompt, label)


def run_theirs(rival: Contestant, file: Path, prompt: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """Return llama.cpp's greedy tokens and its logits of the prompt."""
    out = file.with_suffix(".npy")
    ids = rival.ask({"do": "run", "file": str(file), "prompt": prompt, "n": n, "out": str(out)})["ids"]
    return ids, np.load(out)


def imports(rival: Contestant, work: Path, prompt: list[int], label: str) -> dict[str, Value]:
    """Files of llama.cpp's own making: Herd's logits on them against llama.cpp's on what they unpack to."""
    values: dict[str, Value] = {}
    for name in WRITTEN:
        their = work / f"their-{name}.gguf"
        checkpoint.import_gguf(their, work / f"in-{name}")
        with mock.patch.dict(os.environ, HERD_ISA="reference"):
            model = checkpoint.load_model(work / f"in-{name}")
        if name != "F32":
            assert is_quantized(model)
        mine = logits(model, prompt)
        checkpoint.export_hf(work / f"in-{name}", work / f"plain-{name}", dtype=torch.float32)
        checkpoint.export_gguf(work / f"plain-{name}", work / f"plain-{name}.gguf", "f32")
        _, theirs = run_theirs(rival, work / f"plain-{name}.gguf", prompt, 1)
        far = float(np.abs(mine - theirs).max())
        values[f"llama.cpp's {name}: largest difference of logits{label}"] = at_most(
            1e-3, far, "logits", shown="≤ 1e-3"
        )
    for name in ("Q8_0", "Q4_0"):
        mine, theirs = GGUF(work / f"{name.lower()}.gguf"), GGUF(work / f"their-{name}.gguf")
        pairs = [
            (entry, theirs.tensors[key]) for key, entry in mine.tensors.items() if entry.format.name == name
        ]
        alike = sum(
            a.format == b.format and torch.equal(mine.rows(a.name), theirs.rows(b.name)) for a, b in pairs
        )
        values[f"{name} tensors with llama.cpp's very bytes{label}"] = exactly(
            len(pairs), alike, f"of {len(pairs)}"
        )
    return values


def scaled(folder: Path, out: Path) -> Path:
    """The same weights with Llama 3.1's scaling of frequencies, its original context a short one."""
    model, tokenizer = herd.load(folder)
    model.config = model.model.config = model.config.replace(rope_scaling=RopeScaling(original_context=64))
    checkpoint.save_model(out, model, tokenizer, lineage=checkpoint.Lineage(name="scaled", stage="test"))
    return out


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint whose rows divide by 32, best a trained one")
    parser.add_argument(
        "--rivals", type=Path, default=ROOT / ".venv-rivals", help="the environment of `make rivals`"
    )
    args = parser.parse_args()
    python = args.rivals / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python}: not there; run `make rivals` first, or name the environment with --rivals")
    warnings.simplefilter("ignore")
    config = checkpoint.load_config(args.folder)
    worker = Contestant([str(python), str(Path(__file__).with_name("llamacpp_worker.py"))])
    with worker as rival, tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        version = rival.ask({"do": "version"})
        values = measure(rival, args.folder, Path(first), "")
        more = measure(rival, scaled(args.folder, Path(second) / "scaled"), Path(second), " (scaled RoPE)")
    save_receipt(
        "gguf-llamacpp",
        what="GGUF between Herd and llama.cpp, both ways",
        values=values | more,
        rivals={"llama-cpp-python": version},
        notes=f"{config.n_params:,} parameters; both round activations to int8 in quantized products, each "
        "its own way, so logits of quantized files differ where both run the blocks; imported files run by "
        "Herd's reference, which does not round",
    )


if __name__ == "__main__":
    main()
