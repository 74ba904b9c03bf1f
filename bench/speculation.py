"""Measure the speed-up by speculative decoding. There are two measurements, each with its receipt.

    python bench/speculation.py forced                     # 8B shape, a draft of 1B shape, q4, random weights
    python bench/speculation.py forced --size 1B --layers 8 --draft-layers 2              # a smaller one
    python bench/speculation.py student runs/demo/instruct runs/demo/student

forced: the speed-up over plain greedy decoding, compared with the formula. Random models never agree, so the
acceptance rate is forced: the draft model runs as usual, and then its token is replaced by the model's own
next token (known from plain decoding) or by a wrong one. Of every 20 verified draft tokens exactly the given
share is right, in shuffled order. Plain decoding, the draft's step, the verification of k + 1 rows and
speculation are measured alternately. The formula of Leviathan et al. assumes that verification costs one step. It is
printed next to ours, which takes the measured cost.

student: a real pair of models, sampled at temperature 1. The fraction of verified draft tokens that are accepted
should be 1 - TV(model, draft), averaged over their positions. TV is computed separately, from full forward
passes of both models over the finished answers.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common import add_commit, save_receipt
from herd.checkpoint import load_model, load_tokenizer
from herd.data.dialogs import make_dialogs
from herd.engine import Completion, Engine, Request, Sampling
from herd.engine.draft import ModelDraft
from herd.engine.generate import encode_prompt
from herd.engine.memory import n_pages
from herd.engine.sampling import distribution
from herd.engine.speculate import DraftTokens
from herd.engine.step_timer import tokens_per_round
from herd.engine.stream import Sequence
from herd.evals.speed import alternate, paired
from herd.llama import SIZES
from herd.llama.model import LlamaLM
from herd.quant import scheme
from herd.quant.random import random_quantized
from herd.report.receipt import Value
from herd.text.tokenizer import Tokenizer

PROMPT_TOKENS = 128
BAR = 0.10


# Forced acceptance ------------------------------------------------------------------------------------------


class ForcedDraft(ModelDraft):
    """A draft that runs as `ModelDraft` does, at its full cost, and then returns forced tokens."""

    def __init__(
        self, model: LlamaLM, context: int, answer: abc.Sequence[int], acceptance: float, seed: int
    ) -> None:
        super().__init__(model, model.config.vocab_size, n_pages(context), context, "bf16")
        self._answer, self._share, self._random = answer, round(20 * acceptance), random.Random(seed)
        self._verdicts: list[bool] = []
        self._right = True

    def _pick(self, hidden_BD: torch.Tensor, states: abc.Sequence) -> list:
        picked = super()._pick(hidden_BD, states)
        (state,) = picked
        place, first = state.sequence.n_new + len(state.draft.tokens) - 1, len(state.draft.tokens) == 1
        self._right = (first or self._right) and self._verdict()  # nothing after a wrong token is verified
        state.draft.tokens[-1] = self._answer[place] if self._right else self._answer[place] ^ 1
        return picked

    def _verdict(self) -> bool:
        if not self._verdicts:
            self._verdicts = [True] * self._share + [False] * (20 - self._share)
            self._random.shuffle(self._verdicts)
        return self._verdicts.pop()


class FreeDraft:
    """A draft that is always right at no cost, so that only verification is measured."""

    def __init__(self, answer: abc.Sequence[int]) -> None:
        self._answer = answer

    def propose(self, rows: abc.Sequence[Sequence], most: abc.Sequence[int]) -> list[DraftTokens | None]:
        """Return the answer itself."""
        return [
            DraftTokens(list(self._answer[row.n_new : row.n_new + n]))
            for row, n in zip(rows, most, strict=True)
        ]

    def forget(self, row: Sequence) -> None:
        """Do nothing: there is no state."""


def speed_up(acceptance: float, k: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Expected speed-up over plain decoding with k draft tokens per round (Leviathan et al., arXiv
    2211.17192).

    ``draft_cost`` is a draft's forward, ``verify_cost`` the forward over k + 1 tokens, both in plain decode
    steps. The paper assumes that the latter is 1.
    """
    return tokens_per_round(acceptance, k) / (verify_cost + k * draft_cost)


def forced(args: argparse.Namespace) -> None:
    """Measure the speed-up at a forced acceptance rate and compare it with the formula."""
    model = random_model(args.size, args.layers, args.quant, args.seed)
    small = random_model(args.draft_size, args.draft_layers, args.quant, args.seed + 1)
    prompt = torch.randint(
        10_000, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(args.seed)
    ).tolist()
    request, k = Request(prompt, Sampling(max_tokens=args.tokens, seed=args.seed)), args.draft_tokens
    context = PROMPT_TOKENS + args.tokens + 1
    plain = Engine(model, None, max_context=context)
    answer = plain.run([request])[0].ids
    found: dict[str, list[Completion]] = {}

    def turn(name: str, engine: Engine, *, a_round: bool = False) -> Callable[[], float]:
        def measure() -> float:
            stream = engine.submit(request)
            next(stream)  # the prompt, which is in the cache after the first turn
            start, rounds = time.perf_counter(), 0
            while not stream.done:
                engine.step()
                rounds += 1
            seconds = time.perf_counter() - start
            done = stream.completion()
            found.setdefault(name, []).append(done)
            return seconds / (rounds if a_round else len(done.ids))

        return measure

    def speculating(draft: ForcedDraft | FreeDraft) -> Engine:
        return Engine(model, None, max_context=context, draft=draft, draft_tokens=k)

    turns = {
        "plain": turn("plain", plain),
        "draft": turn("draft", Engine(small, None, max_context=context)),
        "check": turn("check", speculating(FreeDraft(answer)), a_round=True),
    }
    for a in args.acceptance:
        turns[f"{a:g}"] = turn(f"{a:g}", speculating(ForcedDraft(small, context, answer, a, args.seed)))
    seconds = alternate(turns, args.rounds, lambda done, of: print(f"\r{done}/{of}", end="", file=sys.stderr))
    print(file=sys.stderr)
    for name, completions in found.items():
        if name != "draft" and any(done.ids != answer[1:] for done in completions):
            sys.exit(f"{name}: speculation gave other tokens than plain decoding")

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    draft_cost, verify_cost = (1 / paired(seconds[name], seconds["plain"])[0] for name in ("draft", "check"))
    values: dict[str, Value | tuple[float, str]] = {
        "plain": (middle["plain"], "s/token"),
        "draft_step": (middle["draft"], "s"),
        "check_of_k_plus_1": (middle["check"], "s"),
        "k": (k, "draft tokens"),
        "c": (draft_cost, "plain steps"),
        "verify_cost": (verify_cost, "plain steps"),
    }
    print(
        f"k={k}, a draft's step {draft_cost:.3f} and the check of {k + 1} rows {verify_cost:.3f} plain steps"
    )
    for a in args.acceptance:
        measured, low, high = paired(seconds[f"{a:g}"], seconds["plain"])
        counted = found[f"{a:g}"][1:]  # the first round does not count
        kept = sum(d.speculated.accepted for d in counted if d.speculated)
        judged = sum(d.speculated.verified for d in counted if d.speculated)
        papers, ours = speed_up(a, k, draft_cost), speed_up(a, k, draft_cost, verify_cost)
        off = measured / ours - 1
        print(
            f"acceptance {a:g} (seen {kept / judged:.3f}): measured {measured:.3f}x, formula with the check "
            f"as measured {ours:.3f}x ({100 * off:+.1f} %), with the check as one step {papers:.3f}x"
        )
        values |= {
            f"speed_up_{a:g}": Value(measured, "x", low, high),
            f"acceptance_seen_{a:g}": (kept / judged, "1"),
            f"formula_{a:g}": (ours, "x"),
            f"formula_check_free_{a:g}": (papers, "x"),
            f"off_{a:g}": Value(off, "1", bar="within 0.10", passed=abs(off) <= BAR),
        }
    save_receipt(
        "speculation-forced",
        what=f"speculation, {shape(args.size, args.layers)}, draft of "
        f"{shape(args.draft_size, args.draft_layers)}, random {args.quant}: speed-up over plain greedy "
        "decoding at forced acceptance, medians of paired ratios",
        values=values,
        seed=args.seed,
        notes=f"{args.tokens} tokens per turn after a prompt of {PROMPT_TOKENS}, {args.rounds} rounds, "
        f"{torch.get_num_threads()} threads; the formula is (1 - a^(k+1)) / ((1 - a) (verify_cost + k c))",
    )


def random_model(size: str, layers: int | None, quant: str, seed: int) -> LlamaLM:
    """A published shape, or its first layers, with random blocks."""
    config = SIZES[size] if layers is None else SIZES[size].replace(n_layers=layers)
    return random_quantized(config, scheme(quant), seed)


def shape(size: str, layers: int | None) -> str:
    """Return the name of the shape."""
    return f"{size} shape" if layers is None else f"{size} shape with {layers} layers"


# A real pair ------------------------------------------------------------------------------------------------


class WatchedDraft(ModelDraft):
    """A draft that keeps its tokens as (number of the request, tokens known, draft tokens)."""

    def __init__(self, model: LlamaLM, n_tokens: int, pages: int, context: int, kind: str) -> None:
        super().__init__(model, n_tokens, pages, context, kind)
        self.seen: list[tuple[int, int, list[int]]] = []

    def propose(self, rows: abc.Sequence[Sequence], most: abc.Sequence[int]) -> list[DraftTokens | None]:
        """Propose tokens as `ModelDraft` does, and keep them."""
        drafts = super().propose(rows, most)
        self.seen += [(r.number, len(r.tokens), g.tokens) for r, g in zip(rows, drafts, strict=True) if g]
        return drafts


def student(args: argparse.Namespace) -> None:
    """Compare the acceptance rate of a real student with 1 - TV."""
    model, small = (
        load_model(folder).float().eval().requires_grad_(False) for folder in (args.model, args.draft)
    )
    tokenizer, context = load_tokenizer(args.model), model.config.max_context
    assert tokenizer is not None
    prompts = [
        encode_prompt(tokenizer, list(d.prompt)) for d in make_dialogs(args.n, args.seed, split="test")
    ]
    requests = [
        Request(prompt, Sampling(temperature=args.temperature, max_tokens=args.tokens, seed=args.seed + i))
        for i, prompt in enumerate(p for p in prompts if len(p) + args.tokens < context)
    ]
    found = measure_acceptance(model, small, tokenizer, requests, args.draft_tokens, args.temperature)
    save_receipt(
        "speculation-student",
        what="speculation with a real student as draft: acceptance rate compared with 1 - TV",
        values=found.values()
        | {"draft_parameters": (small.config.n_params / model.config.n_params, "of the model's")},
        seed=args.seed,
        notes=f"temperature {args.temperature:g}, {args.draft_tokens} draft tokens per round, held-out "
        "dialogs",
    )


@dataclass(frozen=True)
class Acceptance:
    """The fraction of verified draft tokens that were accepted, and what 1 - TV of the two models predicts."""

    measured: float
    expected: float
    sigma: float
    judged: int
    tokens_per_round: float

    @property
    def off(self) -> float:
        """How far the measured fraction is from the predicted one, in standard deviations."""
        return (self.measured - self.expected) / self.sigma

    def values(self) -> dict[str, Value | tuple[float, str]]:
        """Return the values of a receipt."""
        return {
            "acceptance": Value(
                self.measured,
                "1",
                self.measured - 1.96 * self.sigma,
                self.measured + 1.96 * self.sigma,
                bar="its 95 % interval holds 1 - TV",
                passed=abs(self.off) <= 1.96,
            ),
            "one_minus_tv": (self.expected, "1"),
            "judged": (self.judged, "draft tokens"),
            "tokens_per_round": (self.tokens_per_round, "tokens"),
        }


def measure_acceptance(
    model: LlamaLM,
    small: LlamaLM,
    tokenizer: Tokenizer,
    requests: list[Request],
    draft_tokens: int,
    temperature: float,
) -> Acceptance:
    """Answer ``requests`` with ``small`` as the draft of ``model``, and compare the acceptance with 1 - TV."""
    context = max(len(r.prompt_ids) + (r.sampling.max_tokens or 0) for r in requests) + draft_tokens + 1
    context = min(context, model.config.max_context)
    draft = WatchedDraft(small, tokenizer.vocab_size, 64 * n_pages(context), context, "fp32")
    done = Engine(model, tokenizer, draft=draft, draft_tokens=draft_tokens).run(requests)
    whole = [
        [*r.prompt_ids, *d.ids, *([] if d.stop_id is None else [d.stop_id])]
        for r, d in zip(requests, done, strict=True)
    ]
    places: dict[int, list[int]] = {}  # of the draft tokens that were verified
    kept = 0
    for number, start, drafted in draft.seen:
        followed = [a == b for a, b in zip(drafted, whole[number][start:], strict=False)]
        n_kept = (*followed, False).index(False)
        kept += n_kept
        places.setdefault(number, []).extend(range(start, start + min(n_kept + 1, len(followed))))
    judged = sum(map(len, places.values()))
    stated = [d.speculated for d in done if d.speculated]
    if (kept, judged) != (sum(s.accepted for s in stated), sum(s.verified for s in stated)):
        sys.exit("the engine's own counts are not what the answers show")

    overlaps = [
        x
        for number, at in places.items()
        for x in overlap(model, small, whole[number], at, tokenizer, temperature)
    ]
    # accepted tokens are independent draws with these probabilities
    sigma = sum(x * (1 - x) for x in overlaps) ** 0.5 / judged
    n_tokens, n_rounds = sum(len(d.ids) for d in done), len(draft.seen)
    found = Acceptance(kept / judged, statistics.fmean(overlaps), sigma, judged, n_tokens / max(1, n_rounds))
    print(
        f"{len(requests)} answers, {judged} draft tokens verified: accepted {found.measured:.4f}, 1 - TV "
        f"{found.expected:.4f} +- {1.96 * sigma:.4f} (95 %), {found.off:+.2f} sigma; {found.tokens_per_round:.2f} "
        "tokens per round"
    )
    return found


@torch.inference_mode()
def overlap(
    model: LlamaLM,
    draft: LlamaLM,
    ids: list[int],
    places: list[int],
    tokenizer: Tokenizer,
    temperature: float,
) -> list[float]:
    """Return 1 - TV of the two distributions of the token at each of these places."""
    rows = [place - 1 for place in places]
    sampling = Sampling(temperature=temperature)
    p, q = (
        distribution(m.logits(torch.tensor([ids]))[0, rows, : tokenizer.vocab_size], [sampling] * len(rows))
        for m in (model, draft)
    )
    return torch.minimum(p, q).sum(-1).tolist()


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("forced")
    one.add_argument("--size", default="8B", choices=SIZES)
    one.add_argument("--layers", type=int)
    one.add_argument("--draft-size", default="1B", choices=SIZES)
    one.add_argument("--draft-layers", type=int)
    one.add_argument("--quant", default="q4")
    one.add_argument("--acceptance", type=float, nargs="+", default=[0.6, 0.8])
    one.add_argument("--tokens", type=int, default=64)
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--threads", type=int, default=2)
    one.set_defaults(run=forced)
    two = verbs.add_parser("student")
    two.add_argument("model", help="folder of the model, e.g. runs/demo/instruct")
    two.add_argument("draft", help="folder of its student, e.g. runs/demo/student")
    two.add_argument("--n", type=int, default=5000, help="answers")
    two.add_argument("--tokens", type=int, default=64)
    two.add_argument("--temperature", type=float, default=1.0)
    two.add_argument("--threads", type=int, default=1)
    two.set_defaults(run=student)
    for verb in (one, two):
        verb.add_argument("--draft-tokens", type=int, default=4)
        verb.add_argument("--seed", type=int, default=0)
        add_commit(verb)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
