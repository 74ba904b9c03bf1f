"""Check tuning of SmolLM2-135M-Instruct against exact references.

    HERD_TEST_DATA=../shared/data python bench/tune_exact.py ROW [--commit]

    gradients   2 min   QLoRA gradients through the packed blocks against LoRA on the unpacked weights in float64, and
                        the DPO loss of a batch of oasst1 pairs against TRL's trainer
    kill       10 min   herd tune, killed with kill -9 at random moments and started again: the bits of an undisturbed
                        run. Then its data are edited: refused, naming the file

Minutes are for two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common import DATA, bench_parser, save_receipt
from herd import checkpoint
from herd.data.batch import Batch
from herd.data.tuning import AnswerPair, read_tuning
from herd.llama.lora import add_lora, lora_layers
from herd.llama.model import LlamaLM
from herd.report.receipt import Value
from herd.text import Rendered
from oasst import pairs
from tune import tool_dialogs, tool_rows

FILE = DATA / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RANK, SCALE, SEED = 16, 2.0, 0
TOKENS = 64
N_PAIRS, PAIR_CONTEXT = 4, 512
KILLS, STEPS = 6, 8


# Gradients and losses ---------------------------------------------------------------------------------------


def gradients_row(args: argparse.Namespace) -> None:
    values = qlora_values() | dpo_values()
    save_receipt(
        "tune-exact", commit=args.commit, values=values, seed=SEED,
        what="SmolLM2-135M in Q4_1: QLoRA gradients against LoRA on the unpacked weights in float64, and the DPO loss "
        f"of {N_PAIRS} pairs of oasst1 against TRL's trainer in fp32",
        rivals={name: version(name) for name in ("trl", "transformers", "torch")},
        notes=f"gradients: {TOKENS} tokens of an encyclopedia, 210 adapters of rank {RANK}; the largest relative "
        "error of their 420 matrices. DPO: beta 0.1, without and with Llama 3.1's NLL term of 0.2",
    )  # fmt: skip


def qlora_values() -> dict[str, Value]:
    from herd.quant.linear import use_exact_products
    from herd.train import lm
    from herd.train.objectives import batch_loss

    packed = checkpoint.load_model(str(FILE), dtype=torch.float32)
    use_exact_products(packed)
    plain = checkpoint.load_trainable(str(FILE), torch.float64, torch.device("cpu"))
    tokenizer = checkpoint.load_tokenizer(str(FILE))
    assert tokenizer is not None
    text = next((DATA / "wikitext2").rglob("*test*")).read_text(encoding="utf-8")
    tokens = torch.tensor([tokenizer.encode(text[:2000])[: TOKENS + 1]])
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    grads: list[dict[str, torch.Tensor]] = []
    losses = []
    for model in (packed, plain):
        adapted = _adapted(model)
        if model is plain:
            adapted.double()
        loss = batch_loss(adapted, lm, batch).total / TOKENS
        loss.backward()
        losses.append(loss.item())
        grads.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    errors = {name: float((grads[0][name] - exact).norm() / exact.norm()) for name, exact in grads[1].items()}
    worst = max(errors.values())
    return {
        "qlora_error": Value(worst, "relative, worst of all matrices", bar="<= 1e-3", passed=worst <= 1e-3),
        "qlora_matrices": Value(len(errors), "matrices"),
        "qlora_loss_difference": Value(abs(losses[0] - losses[1]), "nats/token"),
    }


def _adapted(model: LlamaLM) -> LlamaLM:
    add_lora(model, RANK, SCALE, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.01, generator=generator)
    return model


def dpo_values() -> dict[str, Value]:
    from herd.data.pairs import PairStream
    from herd.train.objectives import batch_loss, dpo

    tokenizer = checkpoint.load_tokenizer(str(FILE))
    assert tokenizer is not None
    chosen = _chosen_pairs(tokenizer)
    batch = PairStream(chosen, PAIR_CONTEXT, SEED, pad_id=0).batch(
        0, PairStream(chosen, PAIR_CONTEXT, SEED, pad_id=0).n_rows
    )
    reference = checkpoint.load_trainable(str(FILE), torch.float32, torch.device("cpu"))
    policy = checkpoint.load_trainable(str(FILE), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name.endswith("_proj.weight"):
                weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("policy", policy), ("reference", reference)):
            checkpoint.save_model(Path(folder) / name, model, tokenizer)
        for label, nll in (("dpo", 0.0), ("dpo_nll", 0.2)):
            with torch.no_grad():
                loss = batch_loss(policy, dpo(reference, beta=0.1, nll_weight=nll), batch)
            # TRL's NLL is a mean over the tokens of all chosen answers, Herd's a mean over the pairs
            parts = [chosen] if not nll else [[pair] for pair in chosen]
            theirs = [_trl_loss(Path(folder), part, nll) for part in parts]
            ours = float(loss.total) / len(chosen)
            expected = sum(theirs) / len(theirs)
            difference = abs(ours - expected)
            values[f"{label}_loss"] = Value(ours, "per pair")
            values[f"{label}_difference"] = Value(
                difference, "from TRL's", bar="<= 1e-5", passed=difference <= 1e-5
            )
    return values


def _chosen_pairs(tokenizer: Any) -> list[AnswerPair]:
    """Return the first pairs of oasst1 that fit into a row."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs()))
        return read_tuning([file], tokenizer, PAIR_CONTEXT).require_pairs()[:N_PAIRS]


def _trl_loss(folder: Path, chosen: list[AnswerPair], nll: float) -> float:
    """Return the loss of TRL's trainer on one batch."""
    import datasets
    import transformers
    import trl

    load = transformers.AutoModelForCausalLM.from_pretrained
    rows = [
        {
            "prompt_ids": pair.chosen.ids[: pair.chosen.mask.index(True)],
            "chosen_ids": _trained(pair.chosen),
            "rejected_ids": _trained(pair.rejected),
        }
        for pair in chosen
    ]
    kinds: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, nll]} if nll else {}
    trainer = trl.DPOTrainer(
        model=load(folder / "policy", dtype=torch.float32),
        ref_model=load(folder / "reference", dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(folder / "out"), beta=0.1, report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False, **kinds,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "policy"),
    )  # fmt: skip
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))


def _trained(answer: Rendered) -> list[int]:
    """Return the ids from the first to the last trained token: TRL trains whole answers, without a line's end."""
    return answer.ids[answer.mask.index(True) : len(answer.mask) - answer.mask[::-1].index(True)]


# Kills ------------------------------------------------------------------------------------------------------


def kill_row(args: argparse.Namespace) -> None:
    randomness = random.Random(SEED)
    with tempfile.TemporaryDirectory(prefix="herd-kill-") as name:
        folder = Path(name)
        data, other = folder / "dialogs.jsonl", folder / "other.txt"
        data.write_text("".join(tool_rows(tool_dialogs(3), 40)))
        other.write_text("The cat is red and the dog is blue. " * 20)
        began = time.monotonic()
        _start(folder, "whole").wait()
        length = time.monotonic() - began
        expected = _bits(folder / "whole")
        print(f"undisturbed: {length:.0f} s", flush=True)
        kills = same = runs = 0
        phases: dict[str, int] = {}
        while kills < args.kills:
            runs += 1
            run = f"killed{runs}"
            for _ in range(2):
                process = _start(folder, run)
                try:
                    process.wait(randomness.uniform(0.1 * length, 0.9 * length))
                    continue
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                kills += 1
                phase = _phase(folder / run)
                phases[phase] = phases.get(phase, 0) + 1
            ended = _start(folder, run).wait()
            same += ended == 0 and _bits(folder / run) == expected
            print(f"{run}: {kills} kills, {same} of {runs} runs with the same bits", flush=True)
        data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
        refused = subprocess.run(_command(folder, "killed1"), capture_output=True, text=True, check=False)
        named = refused.returncode == 1 and str(data) in refused.stderr
        print(refused.stderr.strip(), flush=True)
    values = {
        "kills": Value(kills, "kill -9"),
        "same_bits": Value(same, f"of {runs} runs", bar=f"{runs}", passed=same == runs),
        "phases": Value(
            ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items())), "killed in"
        ),
        "edited_data": Value(
            "refused" if named else "not refused", "naming the file", bar="refused", passed=named
        ),
    }
    save_receipt(
        "tune-kill", commit=args.commit, values=values, seed=SEED,
        what="herd tune of SmolLM2-135M with LoRA, killed at random moments and started again with the same command",
        notes=f"{STEPS} steps, a state every 2; moments are uniform between 10 and 90 % of an undisturbed run's time",
    )  # fmt: skip


def _command(folder: Path, run: str) -> list[str]:
    words = [
        "--data",
        str(folder / "dialogs.jsonl"),
        "--other",
        str(folder / "other.txt"),
        "--method",
        "lora",
    ]
    words += ["--steps", str(STEPS), "--context", "512", "--out", str(folder / run)]
    return [sys.executable, "-m", "herd", "tune", str(FILE), *words]


def _start(folder: Path, run: str) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(_command(folder, run), stdout=quiet, stderr=quiet, start_new_session=True)


def _bits(run: Path) -> bytes:
    """Return the adapter's file and the measurements, which depend on every bit of the run."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes() + (run / "changes.json").read_bytes()


def _phase(run: Path) -> str:
    """Return what a killed run was doing."""
    if not (run / "before.json").exists():
        return "preparing"
    if not (run / "adapter").exists():
        return "training"
    return "comparing" if not (run / "changes.json").exists() else "done"


def main() -> None:
    rows: dict[str, Callable[[argparse.Namespace], None]] = {"gradients": gradients_row, "kill": kill_row}
    parser = bench_parser(__doc__)
    parser.add_argument("row", choices=rows)
    parser.add_argument("--kills", type=int, default=KILLS)
    args = parser.parse_args()
    rows[args.row](args)


if __name__ == "__main__":
    main()
