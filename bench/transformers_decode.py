"""Compare decoding with 4-bit weights with `transformers` in bf16, for the 1B shape on the CPU, alternately.

    python bench/transformers_decode.py            # about two minutes on two cores

Both have random weights of Llama 3.2 1B's shape. A turn of transformers is a `generate` call (greedy, with its
own cache) of some tokens, minus a call for one token, so that the prompt does not count. A turn of Herd is
the same number of steps of its engine.
"""

from __future__ import annotations

import statistics
import time
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import bench_parser, save_receipt
from herd.checkpoint import config_to_hf
from herd.evals.speed import Runner, Work, alternate, paired
from herd.llama.config import SIZES
from herd.quant import scheme
from herd.quant.random import random_quantized
from herd.report.receipt import Value

CONTEXT, STEPS, SEED = 128, 16, 0


def rival(size: str):
    """generate(n) -> seconds of n new tokens behind a prompt of `CONTEXT`."""
    config = LlamaConfig.from_dict(
        config_to_hf(SIZES[size], dtype="bfloat16", bos_token_id=0, eos_token_id=None)
    )
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for param in model.parameters():
        param.data.uniform_(-1, 1).mul_(param.shape[-1] ** -0.5) if param.ndim > 1 else param.data.fill_(1.0)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    prompt = torch.randint(config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(SEED))

    def generate(n: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        assert out.shape[1] == CONTEXT + n
        return time.perf_counter() - start

    return generate


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="1B", choices=list(SIZES))
    args = parser.parse_args()
    generate = rival(args.size)
    values: dict[str, Value] = {}
    for quant in ("q4", "q8"):
        runner = Runner(
            random_quantized(SIZES[args.size], scheme(quant), SEED),
            context=CONTEXT + STEPS * (args.rounds + 2) + 40,
            batch=1,
        )
        runner.start(Work("decode", CONTEXT), STEPS * (args.rounds + 1))
        times = alternate(
            {
                "herd": lambda runner=runner: sum(runner.steps(STEPS)) / STEPS,
                "transformers": lambda: (generate(1 + STEPS) - generate(1)) / STEPS,
            },
            args.rounds,
        )
        ratio, low, high = paired(times["herd"], times["transformers"])
        ours, theirs = (1 / statistics.median(times[name]) for name in ("herd", "transformers"))
        values[f"herd {quant}, decode at {CONTEXT}"] = Value(ours, "tokens/s")
        values[f"transformers bf16, next to {quant}"] = Value(theirs, "tokens/s")
        bar, passed = ("≥ 4", ratio >= 4) if quant == "q4" else (None, None)
        values[f"herd {quant} over transformers bf16"] = Value(
            ratio, "×", lo=low, hi=high, bar=bar, passed=passed
        )
        runner.stop()
    save_receipt(
        "transformers-decode",
        what=f"{args.size} shape on the CPU: decode in 4 and 8 bits compared with transformers in bf16",
        values=values,
        seed=SEED,
        rivals={"transformers": version("transformers")},
        notes=f"{torch.get_num_threads()} threads; medians of {args.rounds} rounds of {STEPS} tokens, "
        "ratios of paired rounds with their quartiles; transformers with SDPA attention, prefill subtracted",
    )


if __name__ == "__main__":
    main()
