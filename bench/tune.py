"""Tune a real model, SmolLM2-135M-Instruct, and measure what it gained and lost, row by row.

    HERD_TEST_DATA=../shared/data python bench/tune.py ROW [--limit N] [--commit]

Each row is one command and one receipt (tune-ROW). Finished parts are kept in --work, so the same command continues
after an interruption. Minutes are for two quiet cores:

    tools      60   teach it to call tools: generated dialogs in its own template, then 400 held-out dialogs, bits per
                    byte of two kinds of text that are not in the replay, and HellaSwag, each before and after
    merge      15   the adapters of `arms`, merged to fp32, bf16, Q8_0, Q4_K and Q4_0: KL to base + adapter
    arms       40   full, LoRA 16, LoRA 64 and QLoRA at equal tokens, each with the best of two learning rates
    speed      10   LoRA 16 at T 512: tokens per second and peak memory, peft + transformers in turns
    packed      3   packed rows against padded ones: losses and tokens per second

``--limit N`` makes a row small: N items of evaluation and 1,000 N tokens of training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from common import DATA, WORK, bench_parser, save_receipt
from herd import checkpoint
from herd.data.builtin import read_stdlib
from herd.data.tool_dialogs import openai_record, tool_dialogs
from herd.evals.bpb import Compression, compare_compression, compression
from herd.evals.harness import run_task
from herd.evals.local import CheckpointModel
from herd.evals.tasks import make_task
from herd.evals.tasks.data import Data
from herd.evals.tooluse import tool_use
from herd.evals.windows import from_texts
from herd.files import write_atomically, write_json
from herd.machine import cores
from herd.report.receipt import Value
from herd.text.tool_support import with_tool_support
from herd.tune.options import TuneOptions
from herd.tune.run import open_run, tune

FILE = DATA / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TOOL_TOKENS, TOOL_LR = 200_000, 4e-4
N_DIALOGS, N_TOOL_ITEMS, N_HELLASWAG = 420, 400, 500
TEXT_BYTES = 60_000
REPLAY = ("oasst1_en/en-validation.jsonl", "debian_docs/handbook.en.txt")
"""What is mixed in against forgetting. Forgetting is measured on an encyclopedia and on Python code."""


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return the JSON value in a file, or make and write it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())


# Tools ------------------------------------------------------------------------------------------------------


def tools_row(args: argparse.Namespace) -> None:
    work = args.work / "tools"
    data = work / "dialogs.jsonl"
    if not data.exists():
        work.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(openai_record(dialog)) + "\n" for dialog in islice(tool_dialogs(0), N_DIALOGS))
        write_atomically(data, "".join(lines))
    options = TuneOptions(
        model=str(FILE), data=(str(data),), out=str(work / "run"),
        tokens=1000 * args.limit if args.limit else TOOL_TOKENS,
        replay=tuple(str(DATA / name) for name in REPLAY), replay_share=0.25, method="full",
        lr=TOOL_LR, other=(str(DATA / "wikitext2" / "valid.txt"),),
    )  # fmt: skip
    open_run(options)
    tuned = tune(options, Data(), on_step=_printed)
    before, after = (
        kept(work / f"{name}.json", lambda source=source: _measured_tools(source, args))
        for name, source in (("before", str(FILE)), ("after", str(tuned.folder)))
    )
    gain = {
        name: compare_compression(name, _bits(after["text"][name]), _bits(before["text"][name]))
        for name in before["text"]
    }
    values = {
        "right": Value(
            after["right"]["value"], "fraction", bar=">= 0.9", passed=after["right"]["value"] >= 0.9
        ),
        "right_untuned": Value(before["right"]["value"], "fraction"),
        "tokens": Value(tuned.result.tokens, "tokens"),
        "seconds": Value(tuned.result.seconds, "s"),
    }
    for name in ("hellaswag",):
        lo, hi = before[name]["lo"], before[name]["hi"]
        passed = lo <= after[name]["value"] <= hi
        values[name] = Value(
            after[name]["value"], "fraction", bar=f"within [{lo:.3f}, {hi:.3f}]", passed=passed
        )
        values[f"{name}_untuned"] = Value(before[name]["value"], "fraction")
    for name, difference in gain.items():
        total = sum(before["text"][name]["bits"]) / sum(before["text"][name]["n_bytes"])
        relative = difference.value / total
        values[f"bits_{name}"] = Value(relative, "relative change", bar="<= 0.02", passed=relative <= 0.02)
        values[f"bits_{name}_untuned"] = Value(total, "bits/byte")
    save_receipt(
        "tune-tools", commit=args.commit, what="SmolLM2-135M-Instruct taught to call tools", values=values, seed=0,
        notes=f"{N_DIALOGS} dialogs, replay {', '.join(REPLAY)} at 25 % of the rows; {after['right']['detail']}",
    )  # fmt: skip


def _measured_tools(source: str, args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = checkpoint.load_tokenizer(source)
    assert tokenizer is not None
    model, tokenizer = checkpoint.load_model(source), with_tool_support(tokenizer)
    n = args.limit or N_TOOL_ITEMS
    items = (d for d in tool_dialogs(7, split="test", tasks=("arithmetic", "dates", "strings")) if d.call)
    found: dict[str, Any] = {"text": {}}
    used = tool_use(model, tokenizer, list(islice(items, min(n, N_TOOL_ITEMS))), max_batch=64)
    found["right"] = used.score().record()
    found["examples"] = [[dict(m) for m in a.produced] for a in used.answered[:5]]
    texts = {
        "encyclopedia": _wikitext(),
        "code": (d.text for d in read_stdlib(Path(json.__file__).parents[1])),
    }
    for name, documents in texts.items():
        held_out = from_texts(documents, tokenizer, max_bytes=TEXT_BYTES)
        measured = compression(model, held_out, 1024)
        found["text"][name] = {
            key: getattr(measured, key).tolist() for key in ("bits", "n_bytes", "n_tokens")
        }
    return found | {"hellaswag": _hellaswag(source, args.work / "tools" / "evals", args.limit or N_HELLASWAG)}


def _hellaswag(source: str, folder: Path, n: int) -> dict[str, Any]:
    """Return the score on the first ``n`` items, from the packed or bf16 weights as they are."""
    model, tokenizer = checkpoint.load_model(source), checkpoint.load_tokenizer(source)
    assert tokenizer is not None
    judged = CheckpointModel(
        model, tokenizer, name=Path(source).name, hash=checkpoint.checkpoint_hash(source)[:12]
    )
    row = run_task(judged, make_task("hellaswag"), Data(DATA), folder / Path(source).name, limit=n)
    if row.status != "done":
        raise SystemExit(f"hellaswag: {row.reason}")
    return {key: row.scores[0][key] for key in ("value", "lo", "hi", "n", "name")}


def _wikitext() -> list[str]:
    text = next((DATA / "wikitext2").rglob("*test*")).read_text(encoding="utf-8")
    return [part for part in text.split("\n = ") if len(part) > 2000]


def _bits(record: dict[str, Any]) -> Compression:
    import numpy as np

    arrays = (np.array(record[key]) for key in ("bits", "n_bytes", "n_tokens"))
    return Compression(*arrays, [""] * len(record["bits"]), [""] * len(record["bits"]))


def _printed(record: dict[str, Any]) -> None:
    if record["step"] % 5 == 0:
        print(
            f"step {record['step']}: loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s",
            flush=True,
        )


def main() -> None:
    rows: dict[str, Callable[[argparse.Namespace], None]] = {"tools": tools_row}
    parser = bench_parser(__doc__)
    parser.add_argument("row", choices=rows)
    parser.add_argument("--limit", type=int, help="a small version: items, and thousands of tokens")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--work", type=Path, default=WORK / "tune")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows[args.row](args)


if __name__ == "__main__":
    main()
