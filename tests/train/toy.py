"""A model, streams and configurations small enough to train in milliseconds."""

import torch

from herd.data.batch import Batch
from herd.llama.config import ModelConfig
from herd.llama.model import LlamaLM
from herd.train import AdamW, Cosine, TrainConfig

MODEL = ModelConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_context=64)
TIMES = ("seconds", "tokens_per_s", "mfu")


class Counting:
    """Rows that count upwards from a start of their own: easy to learn, every row different."""

    def __init__(self, context: int = 16, vocab: int = 96) -> None:
        self.context, self.vocab = context, vocab

    def batch(self, position: int, count: int) -> Batch:
        starts = torch.arange(position, position + count)[:, None] * 7
        tokens = (starts + torch.arange(self.context + 1)[None]) % self.vocab
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class Masked(Counting):
    """The same rows, packed as two documents, where row r trains only its last r mod 4 + 1 tokens."""

    def batch(self, position: int, count: int) -> Batch:
        plain = super().batch(position, count)
        targets = plain.targets_BT.clone()
        for row in range(count):
            targets[row, : self.context - ((position + row) % 4 + 1)] = -100
        documents = (torch.arange(self.context) >= self.context // 2).long().expand_as(targets)
        positions = torch.arange(self.context) % (self.context // 2)
        return Batch(
            plain.tokens_BT, targets, positions.expand_as(targets).contiguous(), documents.contiguous()
        )


def model(seed: int = 0, **changes) -> LlamaLM:
    return LlamaLM(MODEL.replace(**changes)).init_weights(seed)


def config(**changes) -> TrainConfig:
    fields = {"steps": 6, "batch_size": 4, "context": 16, "lr": 1e-2, "warmup_steps": 2, "decay_steps": 3}
    return flat(**(fields | {"average_every": 1} | changes))


def flat(**fields) -> TrainConfig:
    """A configuration of fields by name alone, given to the section that has them."""
    optimizer = {name: fields.pop(name) for name in AdamW.model_fields if name in fields}
    schedule = {name: fields.pop(name) for name in Cosine.model_fields if name in fields}
    return TrainConfig(
        optimizer={"kind": "adamw"} | optimizer, schedule={"kind": "cosine"} | schedule, **fields
    )


def bits(lm: LlamaLM) -> dict[str, bytes]:
    """Every weight as bytes: equal means equal to the bit."""
    return {name: value.detach().numpy().tobytes() for name, value in lm.named_parameters()}


def base_bits(lm: LlamaLM) -> dict[str, bytes]:
    """The same of a model with adapters, without these."""
    found = {name.replace(".base.", "."): value for name, value in bits(lm).items()}
    return {name: value for name, value in found.items() if "lora_" not in name}


def timeless(records: list[dict]) -> list[dict]:
    """Records without what the clock wrote."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]
