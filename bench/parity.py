"""Compare Herd with transformers, number for number: logits, folders, and a real checkpoint's stories.

    python bench/parity.py            # about a minute on one core

There are three receipts:

* ``parity-logits``: the largest difference of any logit, in fp32 with the same random weights, over shapes (odd head
  counts, one KV head, head_dim not D / H, tied and untied, plain and scaled RoPE), lengths from 1 to 3,000, and five
  ways of running: full, packed documents compared with one run per document, ragged batches, the engine's cache, and
  positions far beyond the context.
* ``parity-folders``: folders written by Herd and loaded by ``AutoModelForCausalLM.from_pretrained``, and folders
  written by transformers and loaded by Herd: bits of every tensor, and greedy tokens.
* ``parity-stories260k``: a pre-trained model (llama2.c's stories260K, converted with its own vocabulary).

The random weights are so large that logits spread over several nats: a wrong rotation or mask then shows as a
difference of order 1, not 1e-6. The reference code is that of the tests.
"""

# ruff: noqa: E402 (the tests' oracle is found by path)

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / room) for room in ("llama", "checkpoint")]

import torch
import transformers
from llama2c import read_llama2c, read_vocabulary
from llama_oracle import in_transformers, random_model
from torch import Tensor

import herd.checkpoint as checkpoint
from common import DATA, at_most, bench_parser, save_receipt
from herd.engine import Engine, Request, Sampling
from herd.engine.cache import PagedCache
from herd.llama.attention import packed, packed_positions
from herd.llama.config import ModelConfig, RopeScaling
from herd.llama.model import LlamaLM
from herd.report.receipt import Value

BAR = 1e-4
SEED = 0
NEAR = RopeScaling(original_context=64)
LLAMA_31: dict = {"rope_scaling": RopeScaling(), "max_context": 131_072}
LENGTHS = (1, 2, 3, 5, 17, 64, 65, 333, 1000, 2048, 3000)
SHAPES = {
    "6 heads, 3 KV": ModelConfig(499, 96, 3, 6, 3, 200, rope_scaling=NEAR),
    "6 heads, 3 KV, tied": ModelConfig(499, 96, 3, 6, 3, 200, rope_scaling=NEAR, tie_embeddings=True),
    "5 heads, 1 KV": ModelConfig(499, 80, 3, 5, 1, 144, rope_scaling=NEAR),
    "5 heads, 1 KV, tied": ModelConfig(499, 80, 3, 5, 1, 144, rope_theta=10_000.0, tie_embeddings=True),
    "7 heads, 7 KV": ModelConfig(499, 112, 3, 7, 7, 208, rope_theta=10_000.0),
    "3 heads of 40 in D 96": ModelConfig(499, 96, 3, 3, 3, 200, head_dim=40, rope_scaling=NEAR),
    "1 head": ModelConfig(499, 16, 3, 1, 1, 40),
    "3 heads of 128, Llama 3.1 scaling": ModelConfig(499, 96, 2, 3, 1, 200, head_dim=128, **LLAMA_31),
    "8 layers of D 512": ModelConfig(2048, 512, 8, 8, 4, 1408, **LLAMA_31),
    "one layer as wide as 8B's": ModelConfig(2048, 4096, 1, 32, 8, 14_336, **LLAMA_31),
}


class Differences:
    """The largest difference by kind of case, and how many logits were compared."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = defaultdict(float)
        self.of_shape = 0.0
        self.n_logits = 0
        self.spread = float("inf")

    def compare(self, kind: str, ours: Tensor, theirs: Tensor) -> None:
        assert ours.dtype == theirs.dtype == torch.float32
        assert ours.shape == theirs.shape
        diff = float((ours - theirs).abs().max())
        assert diff == diff, f"{kind}: NaN"
        self.largest[kind] = max(self.largest[kind], diff)
        self.of_shape = max(self.of_shape, diff)
        self.n_logits += ours.numel()
        self.spread = min(self.spread, float(theirs.std()))


def draw(config: ModelConfig, *shape: int, seed: int = SEED) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def full(
    seen: Differences, model: LlamaLM, reference: transformers.LlamaForCausalLM, lengths: tuple[int, ...]
) -> None:
    for T in lengths:
        tokens_BT = draw(model.config, 2 if T < 100 else 1, T, seed=T)
        kind = "lengths 1 to 65" if T <= 65 else "lengths 333 to 3000"
        seen.compare(kind, model.logits(tokens_BT), reference(tokens_BT).logits)


def positions(seen: Differences, model: LlamaLM, reference: transformers.LlamaForCausalLM) -> None:
    tokens_BT = draw(model.config, 2, 60)
    positions_BT = torch.stack((torch.arange(60) + 131_000, torch.arange(60) * 37))
    theirs = reference(tokens_BT, position_ids=positions_BT).logits
    seen.compare("positions up to 131,059", model.logits(tokens_BT, positions_BT), theirs)


def packed_rows(seen: Differences, model: LlamaLM, reference: transformers.LlamaForCausalLM) -> None:
    rows = ([40, 1, 150, 109], [300], [1] * 10 + [290])
    documents_BT = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    tokens_BT = draw(model.config, *documents_BT.shape)
    ours_BTV = model.logits(tokens_BT, packed_positions(documents_BT), packed(documents_BT))
    for b, row in enumerate(rows):
        start = 0
        for length in row:
            alone = tokens_BT[b : b + 1, start : start + length]
            seen.compare(
                "packed documents", ours_BTV[b : b + 1, start : start + length], reference(alone).logits
            )
            start += length


def ragged(seen: Differences, model: LlamaLM, reference: transformers.LlamaForCausalLM) -> None:
    lengths = (1, 9, 33, 200)
    tokens_BT = draw(model.config, len(lengths), max(lengths))
    real_BT = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths])
    positions_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
    ours_BTV = model.logits(tokens_BT, positions_BT, packed(real_BT.long()))
    theirs_BTV = reference(tokens_BT, attention_mask=real_BT.long(), position_ids=positions_BT).logits
    right_BTV = model.logits(tokens_BT)
    for b, n in enumerate(lengths):
        seen.compare("ragged, padded left", ours_BTV[b, -n:], theirs_BTV[b, -n:])
        seen.compare("ragged, padded right", right_BTV[b, :n], reference(tokens_BT[b : b + 1, :n]).logits[0])


def cached(seen: Differences, model: LlamaLM, reference: transformers.LlamaForCausalLM) -> None:
    """The engine's cache: a ragged prefill in two chunks, then one token a row, each at its own place."""
    lengths, n_new, half = (5, 171, 64), 8, 90
    tokens_BT = draw(model.config, len(lengths), max(lengths) + n_new)
    theirs_BTV = reference(tokens_BT).logits
    cache = PagedCache(model.config, "fp32", 64 << 20)
    rows = [cache.open() for _ in lengths]
    stops = [
        [min(n, half) for n in lengths],
        list(lengths),
        *([n + i for n in lengths] for i in range(1, n_new + 1)),
    ]
    for ends in stops:
        parts = [(row, end - row.length) for row, end in zip(rows, ends, strict=True)]
        spans = [(b, row.length, end) for b, (row, end) in enumerate(zip(rows, ends, strict=True))]
        for row, n in parts:
            cache.grow(row, row.length + n)
        fed = torch.cat([tokens_BT[b, start:end] for b, start, end in spans])[None]
        live = [part for part in parts if part[1]]
        ours = model.logits(fed, *cache.step(live))[0].split([n for _, n in parts])
        kind = "cached, decode" if ends[0] > lengths[0] else "cached, prefill"
        for (b, start, end), part in zip(spans, ours, strict=True):
            if end > start:
                seen.compare(kind, part, theirs_BTV[b, start:end])


def rounding(
    model: LlamaLM, references: dict[str, transformers.LlamaForCausalLM], T: int = 1000
) -> dict[str, float]:
    """Return the largest differences that rounding alone makes.

    Compared are Herd and transformers with transformers in float64, and transformers' two kinds of attention with each
    other. A bar below these differences would say nothing about the model.
    """
    tokens_1T = draw(model.config, 1, T, seed=T)
    sdpa, eager = (references[way](tokens_1T).logits for way in ("sdpa", "eager"))
    truth = copy.deepcopy(references["eager"]).double()(tokens_1T).logits
    apart = {"Herd": model.logits(tokens_1T), "transformers, sdpa": sdpa, "transformers, eager": eager}
    differences = {f"rounding: {who} from float64": logits - truth for who, logits in apart.items()}
    differences["rounding: transformers, sdpa from eager"] = sdpa - eager
    return {name: float(difference.abs().max()) for name, difference in differences.items()}


@torch.no_grad()
def logits_receipt() -> None:
    seen, rounded = Differences(), dict[str, float]()
    for name, config in SHAPES.items():
        seen.of_shape = 0.0
        model = random_model(config, SEED)
        wide = config.dim >= 512
        ways = ("sdpa",) if config.dim > 512 else ("sdpa", "eager")
        references = {way: in_transformers(model, way) for way in ways}
        for attention, reference in references.items():
            full(
                seen,
                model,
                reference,
                (1, 65, 333) if wide else LENGTHS if attention == "sdpa" else LENGTHS[:-2],
            )
            for case in (positions, packed_rows, ragged, cached):
                case(seen, model, reference)
        if config.dim <= 512:
            for who, distance in rounding(model, references).items():
                rounded[who] = max(rounded.get(who, 0.0), distance)
        print(f"  {name}: {seen.of_shape:.1e}", flush=True)
    values = {kind: at_most(BAR, diff, "logit", shown="≤ 1e-4") for kind, diff in seen.largest.items()}
    worst = max(seen.largest.values())
    values["largest difference"] = at_most(BAR, worst, "logit", shown="≤ 1e-4")
    values |= {who: Value(distance, "logit") for who, distance in rounded.items()}
    values["logits compared"] = Value(seen.n_logits, "1")
    values["smallest spread of logits"] = Value(seen.spread, "logit (standard deviation)")
    write(
        "parity-logits",
        "Logits of the one forward against transformers' Llama, same random weights, fp32",
        values,
        "Shapes: " + "; ".join(SHAPES),
    )


def greedy_here(model: LlamaLM, prompts: list[list[int]], n: int) -> list[list[int]]:
    answers = Engine(model, None).run([Request(prompt, Sampling(max_tokens=n)) for prompt in prompts])
    return [answer.ids for answer in answers]


def greedy_there(model: transformers.LlamaForCausalLM, prompts: list[list[int]], n: int) -> list[list[int]]:
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
        out.append(answer[0, len(prompt) :].tolist())
    return out


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    """Number of tensors that are equal, bit for bit."""
    return sum(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))
        for name in ours
    )


def folder_cases() -> Iterator[tuple[ModelConfig, torch.dtype, int]]:
    for name in (
        "6 heads, 3 KV",
        "6 heads, 3 KV, tied",
        "5 heads, 1 KV, tied",
        "3 heads of 40 in D 96",
        "8 layers of D 512",
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shard_bytes in (10**9, 300_000):
                yield SHAPES[name], dtype, shard_bytes


@torch.no_grad()
def folders_receipt() -> None:
    counts: dict[str, int] = defaultdict(int)
    n_tokens = 64
    for config, dtype, shard_bytes in folder_cases():
        model = random_model(config, SEED).to(dtype)
        params = {name: param.detach() for name, param in model.named_parameters()}
        prompts = [draw(config, n, seed=n).tolist() for n in (1, 7, 30)]
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
            checkpoint.save_model(ours, model, max_shard_bytes=shard_bytes)
            there = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype="auto").eval()
            there.save_pretrained(theirs, max_shard_size=shard_bytes)
            back = checkpoint.load_model(theirs)
            counts["tensors"] += len(params)
            counts["there"] += same_bits(params, {n: t.detach() for n, t in there.state_dict().items()})
            counts["back"] += same_bits(params, {n: p.detach() for n, p in back.named_parameters()})
            counts["hash"] += checkpoint.checkpoint_hash(ours) == checkpoint.checkpoint_hash(theirs)
            counts["config"] += back.config == config
            counts["folders"] += 1
            # Greedy in fp32 on the stored (rounded) weights: half-precision sums depend on the order of
            # adding.
            here = checkpoint.load_model(ours, dtype=torch.float32)
            expected = greedy_there(there.float(), prompts, n_tokens)
            counts["sequences"] += len(prompts)
            counts["same tokens"] += sum(
                a == b for a, b in zip(greedy_here(here, prompts, n_tokens), expected, strict=True)
            )

    def share(key: str, of: str) -> Value:
        return Value(f"{counts[key]} of {counts[of]}", "count", bar="all", passed=counts[key] == counts[of])

    write(
        "parity-folders",
        "folders written by Herd, loaded by transformers, and back",
        {
            "tensors bit-exact in transformers": share("there", "tensors"),
            "tensors bit-exact back here": share("back", "tensors"),
            "configurations equal after the round trip": share("config", "folders"),
            "checkpoint hashes equal after the round trip": share("hash", "folders"),
            f"greedy sequences of {n_tokens} tokens equal": share("same tokens", "sequences"),
        },
        "fp32, bf16 and fp16; tied and untied; one file and many shards; "
        "AutoModelForCausalLM.from_pretrained(folder)",
    )


@torch.no_grad()
def stories_receipt(data: Path) -> None:
    config, tensors = read_llama2c(data / "stories260K.bin")
    vocabulary = read_vocabulary(data / "tok512.bin")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_checkpoint(Path(folder, "stories"), config, tensors.__getitem__, dtype=torch.float32)
        model = checkpoint.load_model(Path(folder, "stories"))
        reference = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "stories")).eval()
    prompts = [[1]]
    ours, theirs = greedy_here(model, prompts, 256)[0], greedy_there(reference, prompts, 256)[0]
    tokens_BT = torch.tensor([[1, *ours]])
    diff = float((model.logits(tokens_BT) - reference(tokens_BT).logits).abs().max())
    sampled = Engine(model, None).run(
        [Request([1], Sampling(max_tokens=200, temperature=0.8, seed=i)) for i in range(2)]
    )
    stories = [vocabulary.decode(ids) for ids in (ours, *(answer.ids for answer in sampled))]
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    write(
        "parity-stories260k",
        "llama2.c's pre-trained stories260K, converted: greedy tokens against transformers on the same "
        "weights",
        {
            "greedy tokens equal": Value(f"{equal} of 256", "count", bar="256", passed=equal == 256),
            "largest difference of logits": at_most(BAR, diff, "logit", shown="≤ 1e-4"),
            "greedy story": Value(stories[0], "text"),
            "sampled story 1": Value(stories[1], "text"),
            "sampled story 2": Value(stories[2], "text"),
        },
        "Sampled at temperature 0.8, seeds 0 and 1, 200 tokens.",
    )


def write(name: str, what: str, values: dict[str, Value], notes: str) -> None:
    rivals = {"transformers": version("transformers")}
    save_receipt(name, what=what, values=values, seed=SEED, rivals=rivals, notes=notes)
    if any(value.passed is False for value in values.values()):
        sys.exit(f"{name}: a bar was not reached")


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds stories260K/")
    args = parser.parse_args()
    data = args.data / "stories260K"
    transformers.utils.logging.disable_progress_bar()
    logits_receipt()
    folders_receipt()
    if data.exists():
        stories_receipt(data)
    else:
        print(f"  skipped stories260K: no {data}; set HERD_TEST_DATA or --data")


if __name__ == "__main__":
    main()
