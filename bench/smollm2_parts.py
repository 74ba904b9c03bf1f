"""The files, the rival and the receipts that the rows of `bench/smollm2.py` share."""

from __future__ import annotations

import argparse
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common import DATA, save_receipt
from contestant import Contestant
from herd import checkpoint
from herd.evals.rival import find_python

FILE = DATA / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PARIS = "What is the capital of France? Answer in one short sentence."


def receipt(args: argparse.Namespace, what: str, values: dict[str, Any], **more: Any) -> None:
    if args.limit is not None and args.commit:
        sys.exit("--commit needs the full row: leave out --limit")
    save_receipt(
        f"smollm2-{args.row}",
        commit=args.commit,
        what=f"SmolLM2-135M-Instruct: {what}",
        values=values,
        **more,
    )


def unpacked_folder(work: Path) -> Path:
    """Return the folder with the file's weights in fp32, in Hugging Face's layout, making it if it is missing."""
    folder = work / "fp32"
    if not folder.exists():
        checkpoint.import_gguf(FILE, folder, dtype=torch.float32, name="smollm2-fp32")
    return folder


def unpacked_file(work: Path) -> Path:
    """Return the same weights as an F32 GGUF."""
    file = work / "fp32.gguf"
    if not file.exists():
        checkpoint.export_gguf(unpacked_folder(work), file, "f32")
    return file


@cache
def tokenizer() -> Any:
    return checkpoint.load_tokenizer(FILE)


def rival() -> Contestant:
    """Return llama.cpp, ready for jobs."""
    return Contestant([str(find_python()), str(Path(__file__).with_name("llamacpp_worker.py"))])


def chat_ids(question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return tokenizer().chat.render(messages, generation_prompt=True).ids


def bounds(low: float, high: float) -> tuple[float | None, float | None]:
    return (None, None) if math.isnan(low) else (low, high)
