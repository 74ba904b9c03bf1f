"""Check that one process, two replicas and two shards compute the same losses from the same tokens.

    python bench/ranks.py

A Llama of 1.3M parameters is trained in fp32 for 8 steps three times: in one process, and in two under
``torchrun`` as DDP and as FSDP2 (gloo, CPU), with packed rows that have different numbers of trained tokens,
gradient accumulation, clipping, and decay to zero.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common import at_most, bench_parser, save_receipt
from herd.data.batch import Batch
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM
from herd.train import AdamW, Cosine, TrainConfig, metrics, parallel, sft, train

SEED = 0
MODEL = ModelConfig(
    vocab_size=2048, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=352, max_context=128
)
CONFIG = TrainConfig(
    steps=8,
    batch_size=8,
    micro_batch_size=2,
    context=128,
    optimizer=AdamW(lr=3e-3),
    schedule=Cosine(warmup_steps=2, decay_steps=3, average_every=1),
    seed=SEED,
)


class Rows:
    """Rows that count upwards. Each is two packed documents and trains its last 16 to 128 tokens."""

    def batch(self, position: int, count: int) -> Batch:
        start = torch.arange(position, position + count)[:, None] * 37
        tokens = (start + torch.arange(129)[None]) % 256
        targets = tokens[:, 1:].clone()
        for index in range(count):
            targets[index, : 16 * ((position + index) % 8)] = -100
        documents = (torch.arange(128) >= 50).long().expand(count, 128).contiguous()
        positions = torch.where(documents.bool(), torch.arange(128) - 50, torch.arange(128))
        return Batch(tokens[:, :-1].contiguous(), targets, positions, documents)


def rank(folder: str, shard: int) -> None:
    """What one process does."""
    ranks = parallel.start(shard)
    train(LlamaLM(MODEL).init_weights(SEED), Rows(), sft, CONFIG, folder, mesh=ranks.mesh)
    parallel.stop()


def losses(n_ranks: int, shard: int, folder: Path) -> list[float]:
    """Losses of a run in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    command += [__file__, str(folder), str(shard)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, stderr=subprocess.DEVNULL)
    return [record["loss"] for record in metrics.read(folder)]


def main() -> None:
    """Run all three ways, print and write the receipt."""
    bench_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as base:
        runs = {
            name: losses(n_ranks, shard, Path(base) / name)
            for name, n_ranks, shard in (("one", 1, 1), ("ddp", 2, 1), ("fsdp2", 2, 2))
        }
    print(json.dumps(runs, indent=1))
    difference = {
        name: max(abs(a - b) for a, b in zip(runs["one"], runs[name], strict=True))
        for name in ("ddp", "fsdp2")
    }
    save_receipt(
        "ranks",
        what="1 rank vs 2 ranks, same tokens, fp32: largest difference of the loss over the steps",
        values={
            **{name: at_most(1e-5, d, "nats/token", shown="≤ 1e-5") for name, d in difference.items()},
            "steps": (CONFIG.steps, "steps"),
            "parameters": (MODEL.n_params, "parameters"),
            "first_loss": (runs["one"][0], "nats/token"),
            "last_loss": (runs["one"][-1], "nats/token"),
        },
        seed=SEED,
    )
    if max(difference.values()) > 1e-5:
        sys.exit("the losses differ by more than 1e-5")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        rank(sys.argv[1], int(sys.argv[2]))
    else:
        main()
