"""Runs that others measured and published: what the planner is judged by, row by row, and may be fitted to half of.

Sources: "The Llama 3 Herd of Models" (arXiv 2407.21783) table 4, table 5, sections 3.3 and 3.4; Llama 3.1's model card;
torchtitan ``benchmarks/``: llama3_h100_202412, asyncTP_llama3_h100_2025-06 (figures of its chart),
llama3-8b_h200_202506 (Trainy); gpt-fast ``README.md`` at its Llama 3.1 rows. (Shard sizes: `files`.)"""

from __future__ import annotations

from dataclasses import dataclass

from ..llama.config import SIZES, ModelConfig
from .layout import Job, Layout
from .ops import BF16, INT4_G32, INT8, Weights

GPU_HOURS = {"8B": 1.46e6, "70B": 7.0e6, "405B": 30.84e6}
"""H100 hours of the model card."""
TOKENS = 15.6e12
"""Tokens 405B was pre-trained on; the model card says "15T+" of all three."""
DAYS, UNEXPECTED, PLANNED = 54, 419, 47
"""Days that were watched on 16,384 GPUs, and interruptions in them; "higher than 90 % effective training time"."""

LLAMA2 = {
    "7B": ModelConfig(32_000, 4096, 32, 32, 32, 11_008, rope_theta=10_000.0, max_context=4096),
    "70B": ModelConfig(32_000, 8192, 80, 64, 8, 28_672, rope_theta=10_000.0, max_context=4096),
}


@dataclass(frozen=True)
class MetaRow:
    """One row of the paper's table 4."""

    devices: int
    layout: Layout
    context: int
    batch: int
    mfu: float

    @property
    def job(self) -> Job:
        return Job(SIZES["405B"], self.batch, self.context)


def _meta(devices: int, shape: tuple[int, int, int, int], context: int, per_dp: int, mfu: float) -> MetaRow:
    """The paper: no recomputation at 8K (so every matmul's input is kept), gradients sharded, weights kept after
    forward; pieces a stage not published, here one for each of its 8 layers."""
    layout = Layout(*shape, micro=1, chunks=8, recompute="plain", precision="bf16", shard="gradients")
    return MetaRow(devices, layout, context, per_dp * shape[3], mfu)


META = (
    _meta(8_192, (8, 1, 16, 64), 8_192, 32, 0.43),
    _meta(16_384, (8, 1, 16, 128), 8_192, 16, 0.41),
    _meta(
        16_384, (8, 16, 16, 8), 131_072, 16, 0.38
    ),  # DP 8 as in later versions; 4 in the first does not multiply up
)


@dataclass(frozen=True)
class TitanRow:
    """One published torchtitan run: tokens a second and GPU, GiB reserved (0: not published)."""

    name: str
    size: str
    machine: str
    layout: Layout
    batch: int
    context: int
    tokens_per_s: float
    gib: float
    compiled: bool = True

    @property
    def job(self) -> Job:
        config = SIZES[self.size]
        return Job(
            config.replace(max_context=max(config.max_context, self.context)), self.batch, self.context
        )


def _titan(
    name: str, size: str, machine: str, layout: Layout, batch: int, context: int, measured: tuple[float, float],
    compiled: bool = True,
) -> TitanRow:  # fmt: skip
    return TitanRow(name, size, machine, layout, batch, context, *measured, compiled)


def _titan_rows() -> tuple[TitanRow, ...]:
    h100, k8 = "H100-500W", 8_192

    def fsdp(dp: int, precision: str = "bf16") -> Layout:
        return Layout(dp=dp, micro=2, recompute="selective", precision=precision)

    def long(cp: int) -> Layout:
        return Layout(cp=cp, dp=8 // cp, recompute="full", precision="fp8")

    def two_d(precision: str, async_tp: bool) -> Layout:
        return Layout(tp=8, dp=32, micro=16, recompute="full", precision=precision, async_tp=async_tp)

    def three_d(chunks: int, micro: int, cp: int = 1) -> Layout:
        # as many micro-batches as stages: torchtitan's default then
        return Layout(8, cp, 8, 8 // cp, micro, chunks, "full", "fp8", "gradients", True)

    rows = [
        _titan("8B, 8, eager", "8B", f"8x{h100}", fsdp(8), 16, k8, (5762, 82.4), compiled=False),
        _titan("8B, 8", "8B", f"8x{h100}", fsdp(8), 16, k8, (6667, 77.0)),
        _titan("8B, 8, fp8", "8B", f"8x{h100}", fsdp(8, "fp8"), 16, k8, (8532, 76.8)),
        _titan("8B, 128, eager", "8B", f"128x{h100}", fsdp(128), 256, k8, (5605, 67.0), compiled=False),
        _titan("8B, 128", "8B", f"128x{h100}", fsdp(128), 256, k8, (6514, 62.0)),
        _titan("8B, 128, fp8", "8B", f"128x{h100}", fsdp(128, "fp8"), 256, k8, (8380, 61.8)),
    ]
    for cp, measured in ((1, (3890, 83.9)), (2, (2540, 84.2)), (4, (1071, 84.0)), (8, (548, 84.5))):
        rows.append(
            _titan(f"8B, 8, CP {cp}, fp8", "8B", f"8x{h100}", long(cp), 8 // cp, 32_768 * cp, measured)
        )
    for name, precision, async_tp, measured in (
        ("70B, 256, TP 8, fp8", "fp8", False, (829, 71.9)),
        ("70B, 256, async TP, fp8", "fp8", True, (876, 67.6)),
        ("70B, 256, TP 8, 2025", "bf16", False, (597, 0.0)),
        ("70B, 256, async TP, 2025", "bf16", True, (652, 0.0)),
        ("70B, 256, TP 8, fp8, 2025", "fp8", False, (810, 0.0)),
        ("70B, 256, async TP, fp8, 2025", "fp8", True, (942, 0.0)),
    ):
        rows.append(_titan(name, "70B", f"256x{h100}", two_d(precision, async_tp), 512, k8, measured))
    rows.append(_titan("405B, 512, 1F1B", "405B", f"512x{h100}", three_d(1, 4), 256, k8, (100, 82.5)))
    rows.append(_titan("405B, 512, interleaved", "405B", f"512x{h100}", three_d(2, 4), 256, k8, (128, 72.7)))
    for cp, measured in ((1, (76, 75.3)), (2, (47, 75.9)), (4, (31, 77.1)), (8, (16, 84.9))):
        job = (64 // cp, 32_768 * cp)
        rows.append(_titan(f"405B, 512, CP {cp}", "405B", f"512x{h100}", three_d(1, 1, cp), *job, measured))
    for gpus, measured in ((32, (10_938, 47.96)), (64, (10_753, 46.97))):
        rows.append(
            _titan(f"8B, {gpus} H200, fp8", "8B", f"{gpus}xH200", fsdp(gpus, "fp8"), 2 * gpus, k8, measured)
        )
    return tuple(rows)


TITAN = _titan_rows()


@dataclass(frozen=True)
class FastRow:
    """One decode row of gpt-fast: one sequence, a prompt of 5 tokens and 200 new ones."""

    name: str
    config: ModelConfig
    machine: str
    tp: int
    weights: Weights
    tokens_per_s: float

    context = 105  # in the mean


def _fast(
    name: str, config: ModelConfig, tp: int, weights: Weights, measured: float, machine: str = "8xA100"
) -> FastRow:
    return FastRow(f"{name}{'' if tp == 1 else f', TP {tp}'}", config, machine, tp, weights, measured)


GPT_FAST = (
    _fast("Llama 2 7B bf16", LLAMA2["7B"], 1, BF16, 104.9),
    _fast("Llama 2 7B int8", LLAMA2["7B"], 1, INT8, 155.58),
    _fast("Llama 2 7B int4", LLAMA2["7B"], 1, INT4_G32, 196.80),
    _fast("Llama 2 70B int8", LLAMA2["70B"], 1, INT8, 19.13),
    _fast("Llama 2 70B int4", LLAMA2["70B"], 1, INT4_G32, 25.25),
    _fast("Llama 3.1 8B bf16", SIZES["8B"], 1, BF16, 93.89),
    _fast("Llama 3.1 8B int8", SIZES["8B"], 1, INT8, 137.64),
    _fast("Llama 3.1 70B int8", SIZES["70B"], 1, INT8, 18.04),
    _fast("Llama 2 7B bf16", LLAMA2["7B"], 2, BF16, 168.84),
    _fast("Llama 2 7B bf16", LLAMA2["7B"], 4, BF16, 254.02),
    _fast("Llama 2 7B bf16", LLAMA2["7B"], 8, BF16, 328.43),
    _fast("Llama 2 70B bf16", LLAMA2["70B"], 2, BF16, 21.32),
    _fast("Llama 2 70B bf16", LLAMA2["70B"], 4, BF16, 38.01),
    _fast("Llama 2 70B bf16", LLAMA2["70B"], 8, BF16, 62.50),
    _fast("Llama 3.1 8B bf16", SIZES["8B"], 2, BF16, 149.10),
    _fast("Llama 3.1 8B bf16", SIZES["8B"], 4, BF16, 217.21),
    _fast("Llama 3.1 8B bf16", SIZES["8B"], 8, BF16, 276.01),
    _fast("Llama 3.1 70B bf16", SIZES["70B"], 2, BF16, 16.03),
    _fast("Llama 3.1 70B bf16", SIZES["70B"], 4, BF16, 37.45),
    _fast("Llama 3.1 70B bf16", SIZES["70B"], 8, BF16, 58.78),
    _fast("Llama 2 70B int8", LLAMA2["70B"], 8, INT8, 80.44),
    _fast("Llama 2 70B int4", LLAMA2["70B"], 8, INT4_G32, 90.77),
    _fast("Llama 3.1 70B int8", SIZES["70B"], 8, INT8, 75.58),
    _fast("Llama 3.1 405B int8", SIZES["405B"], 8, INT8, 15.60),
    _fast("Llama 2 7B bf16, MI250X", LLAMA2["7B"], 1, BF16, 76.33, "MI250X-GCD"),
    _fast("Llama 2 7B int8, MI250X", LLAMA2["7B"], 1, INT8, 101.86, "MI250X-GCD"),
)
