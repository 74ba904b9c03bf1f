"""Ten seconds that decide the size of a herd: how many tokens a second this machine trains at each rung.

A rung is measured by training it for real, forward, backward and Adam, on random tokens. Speeds are never carried over
from one shape to another: small matrices run far below the peak of large ones, by a factor machines differ in.
"""

from __future__ import annotations

import time

import torch

from ..llama.config import ModelConfig
from ..llama.model import LlamaLM
from .plan import Rung, rung

ROWS, CONTEXT = 16, 256


LADDER: tuple[Rung, ...] = ((128, 3), (192, 4), (256, 5), (384, 6), (512, 8))
"""(dim, layers) of the rungs, smallest first."""


def training_speed(config: ModelConfig, seconds: float) -> float:
    """Tokens per second of real training steps of ``config`` on this machine, over about ``seconds``."""
    model = LlamaLM(config).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (ROWS, CONTEXT + 1), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        (model.loss(tokens[:, :-1], tokens[:, 1:]) / tokens.numel()).backward()
        optimizer.step()

    step()  # the first one allocates
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < seconds:
        step()
        steps += 1
    return steps * ROWS * CONTEXT / (time.perf_counter() - began)


def probe(vocab_size: int, wanted: float, seconds: float = 10.0) -> dict[Rung, float]:
    """Training speed in tokens/s of each rung, climbing until one is slower than ``wanted`` tokens/s."""
    speeds: dict[Rung, float] = {}
    for dim, n_layers in LADDER:
        speeds[dim, n_layers] = training_speed(rung(dim, n_layers, vocab_size, CONTEXT), seconds / 4)
        if speeds[dim, n_layers] < wanted:
            break
    return speeds
