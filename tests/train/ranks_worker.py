"""One rank of `test_ranks.py`: trains as told and writes what it saw. Started by ``torchrun``, or alone."""

import json
import sys
from pathlib import Path

import torch
import toy
from torch.distributed.tensor import DTensor

from herd.train import distil, lm, metrics, parallel, sft, train
from herd.train.heldout import heldout_loss


class Recorder(toy.Masked):
    """Remembers the rows it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def batch(self, position, count):
        self.rows.extend(range(position, position + count))
        return super().batch(position, count)


def full_weights(model) -> dict[str, torch.Tensor]:
    """All weights whole and on the CPU, on every rank."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in model.state_dict().items()
    }


def job(name: str, folder: Path, shard: int | None, **changes) -> dict:
    """One run: its losses, evaluations, rows of this rank and, on all ranks together, its weights."""
    ranks = parallel.start(shard)
    model, stream = toy.model(tie_embeddings=name == "tied"), Recorder()
    objective = {"distil": distil(toy.model(seed=1, dim=48, n_heads=6)), "lm": lm}.get(name, sft)
    config = toy.config(
        **({"steps": 6, "batch_size": 8, "micro_batch_size": 2, "eps": 1e-4, "eval_every": 3} | changes)
    )
    batch = toy.Counting().batch(1000, 2)

    def evaluate(model, step):
        if changes.get("stop") == step:
            raise KeyboardInterrupt
        return {"loss": heldout_loss(model, [batch])}

    train(model, stream, objective, config, folder, mesh=ranks.mesh, evaluate=evaluate)
    weights = full_weights(model)
    if ranks.first:
        torch.save(weights, folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps(toy.timeless(metrics.read(folder))))
    (folder / f"rows-{ranks.world}-{ranks.rank}.json").write_text(json.dumps(stream.rows))
    return weights


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.argv[1:]:
        name, folder, shard, *rest = json.loads(line)
        job(name, Path(folder), shard, **(rest[0] if rest else {}))
    parallel.stop()
