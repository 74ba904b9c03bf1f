"""Damage checkpoint files ten thousand times. Each must be refused, or still give the same model.

    python bench/mutations.py             # about ten minutes on one core, can be interrupted and resumed

Seeded damage (flipped bits, numbers that overflow, bytes removed, inserted or copied:
`tests/checkpoint/damage.py`) is done to a Q4_0 GGUF and a safetensors file, half of it in the header. Each
file is loaded from its folder, whose lineage has the hash: it must be refused, or give exactly the same
model. The GGUF is also imported as a single file: it must be refused, or be finite. This runs in little
memory, so that a false size cannot allocate much, and in processes of a few hundred files, so that a crash or
a hang is seen and named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from common import WORK, bench_parser, exactly, save_receipt
from herd import checkpoint
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM
from herd.quant import scheme
from herd.report.receipt import Value
from herd.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "checkpoint"))
from damage import fuzz

FILES = {"gguf": "model.gguf", "safetensors": "model.safetensors"}
CHUNK = 250
PATIENCE = 600
"""Seconds allowed for a chunk, of which a file takes some hundredths."""


def folder_of(kind: str, work: Path) -> Path:
    """Make the folder of a small model with a tokenizer, and return it."""
    model = LlamaLM(ModelConfig(540, 64, 1, 2, 1, 96, max_context=512)).init_weights(0, std=0.25)
    tokenizer = Tokenizer.train(
        ["The quick brown fox jumps over the lazy dog, again and again. " * 3], 512 + 20
    )
    plain = work / "plain"
    checkpoint.save_model(plain, model, tokenizer, lineage=checkpoint.Lineage(name="toy", stage="teacher"))
    if kind == "safetensors":
        return plain
    checkpoint.quantize_folder(checkpoint.ImportSource(plain), work / "q", scheme("q4"))
    return work / "q"


def chunk(kind: str, first: int) -> None:
    """Damage one chunk of files in this process and print the counts."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        counts = fuzz(folder_of(kind, Path(work)), FILES[kind], range(first, first + CHUNK), Path(work))
    print(json.dumps(counts))


def main() -> None:
    """Run all chunks that are not known yet, then write the receipt."""
    parser = bench_parser(__doc__)
    parser.add_argument("--n", type=int, default=5000, help="mutations of each of the two files")
    parser.add_argument("--chunk", nargs=2, metavar=("KIND", "FIRST"), help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, default=WORK / "mutations.json")
    args = parser.parse_args()
    if args.chunk:
        chunk(args.chunk[0], int(args.chunk[1]))
        return
    known = json.loads(args.state.read_text()) if args.state.exists() else {}
    total: dict[str, Counter[str]] = {kind: Counter() for kind in FILES}
    slowest = 0
    for kind in FILES:
        for first in range(0, args.n, CHUNK):
            name = f"{kind} {first}"
            if name not in known:
                command = [sys.executable, __file__, "--chunk", kind, str(first)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
                if done.returncode:
                    sys.exit(f"{name} to {first + CHUNK}: exit code {done.returncode}\n{done.stderr[-2000:]}")
                known[name] = json.loads(done.stdout)
                args.state.parent.mkdir(parents=True, exist_ok=True)
                args.state.write_text(json.dumps(known))
                print(name, known[name], flush=True)
            slowest = max(slowest, known[name].pop("slowest"))
            total[kind].update(known[name])
    values: dict[str, Value] = {}
    for kind, counts in total.items():
        right = counts["refused"] + counts["the same model"]
        values[f"{kind}: refused, or the same model"] = exactly(args.n, right, f"of {args.n}", shown="all")
        for what, n in sorted(counts.items()):
            values[f"{kind}: {what}"] = Value(n, "files")
    values["slowest file"] = Value(slowest, "ms")
    save_receipt(
        "mutations",
        what="randomly damaged checkpoint files, half in the header: refused, or the same model",
        values=values,
        seed=0,
        notes=f"processes of {CHUNK} files with 2 GiB of addresses each; a single GGUF file has no hash, so "
        "changed weights are imported as long as they are finite",
    )
    args.state.unlink()


if __name__ == "__main__":
    main()
