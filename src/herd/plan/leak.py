"""The news about Llama 3.1, July 2024, claim by claim: verdict, arithmetic, source, and how to see for oneself.

A torrent of "820 GB" appeared the day before the release, with one table of benchmarks and no explanation, and half of
what was written about it was arithmetic that nobody did. It is done here, from the shapes in `llama.config`, published
scores and prices, and Meta's tokenizer measured on parallel text; nothing in an answer is typed that can be computed.
Neither weights nor torch are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..llama.config import SIZES
from ..quant.formats import scheme
from ..report.published import find, read_yaml, score
from ..report.units import MINUS, NBSP, duration, fixed, language, nbytes, short, si
from . import files, prices
from .machines import find as machine
from .ops import Weights, decode_seconds
from .published import GPU_HOURS, LLAMA2, TOKENS

Verdict = Literal["true", "half true", "misread", "false"]

AZURE_TASKS = 13
MODEL_CARD = "Llama 3.1 model card, meta-llama/llama-models MODEL_CARD.md"
AZURE = "Azure/azureml-assets, assets/evaluation_results (published 2024-08-14; GPT-4o also as first run)"
PAPER = "The Llama 3 Herd of Models, arXiv 2407.21783"
LICENCE = "Llama 3.1 Community License, 2024-07-23"
POTTER_WORDS = 76_944
"""Words of "Harry Potter and the Philosopher's Stone" (harrypotterkids.com, wandwisdom.com)."""
YEAR_HOURS, MONTH_HOURS = 8_760, 720
NAMES = {"zh": "Chinese"}
"""Languages of the parallel text that are not of Llama's eight."""


@dataclass(frozen=True)
class Claim:
    """What the news said, whether it is so, the sum, where the figures come from, and what to type.

    ``arithmetic``: (what, value) rows; ``values``: the same numbers unrounded, for programs."""

    key: str
    said: str
    verdict: Verdict
    answer: str
    arithmetic: Sequence[tuple[str, str]]
    sources: Sequence[str]
    see: str
    values: dict[str, float]


def claims() -> list[Claim]:
    """All claims in the order in which the news made them."""
    return [
        _size(),
        _three_times(),
        _words(),
        _gpu_hours(),
        _small_near_large(),
        _beats_gpt4o(),
        _code_and_truth(),
        _compute_saved(),
        _cheaper(),
        _membership(),
    ]


def _gb(value: float) -> str:
    return f"{fixed(value / 1e9, 1)}{NBSP}GB"


def _size() -> Claim:
    config, computed, published = SIZES["405B"], files.computed_405b(), files.PUBLISHED_405B
    model, fp8, mp16 = (computed[name] for name in ("BF16", "FP8", "MP16"))
    told = {"MP16": "for 16 ranks", "BF16": "for 8 ranks", "FP8": "in FP8"}
    return Claim(
        "820-gb",
        "The leaked model is 820 GB.",
        "misread",
        f"The model is {_gb(model)}. {nbytes(mp16)} is its file for 16 GPUs, which stores each of the "
        f"{config.n_kv_heads} KV heads twice, because 16 ranks cannot share {config.n_kv_heads} heads. In Meta's own "
        f"FP8 it is {_gb(fp8)}, in 4-bit blocks {_gb(scheme('q4').nbytes(config))}.",
        [
            (f"{config.n_params:,} parameters × 2 bytes", _gb(model)),
            (f"{mp16 // 2:,} with KV heads doubled × 2 bytes", _gb(mp16)),
            *(
                (
                    f"published {words}: {published[name].count} × {published[name].nbytes_each:,} bytes",
                    _gb(published[name].nbytes),
                )
                for name, words in told.items()
            ),
        ],
        [files.SOURCE, f"{PAPER}, table 3"],
        "herd sizes",
        {f"{name.lower()}_bytes": float(size) for name, size in computed.items()}
        | {f"published_{name.lower()}_bytes": float(shards.nbytes) for name, shards in published.items()}
        | {"n_params": float(config.n_params)},
    )


def _three_times() -> Claim:
    new, old, leaked = SIZES["405B"], LLAMA2["70B"], files.computed_405b()["MP16"]
    times = new.nbytes(2.0) / old.nbytes(2.0)
    return Claim(
        "three-times",
        "It needs three times the memory of Llama 2, which took 280 GB.",
        "misread",
        f"{_gb(old.nbytes(4.0))} is Llama 2 70B in fp32; Meta published it in 16 bits. Like with like, in bf16, 405B "
        f"is {short(times)} times Llama 2 70B; and the 70B of both families are of one size.",
        [
            (f"Llama 2 70B, {old.n_params:,} × 4 bytes", _gb(old.nbytes(4.0))),
            (f"Llama 2 70B, {old.n_params:,} × 2 bytes", _gb(old.nbytes(2.0))),
            (f"Llama 3.1 405B, {new.n_params:,} × 2 bytes", _gb(new.nbytes(2.0))),
            ("bf16 against bf16", f"× {short(times)}"),
            ("the 820 GB file against fp32, as the news had it", f"× {short(leaked / old.nbytes(4.0))}"),
            (f"Llama 3.1 70B, {SIZES['70B'].n_params:,} × 2 bytes", _gb(SIZES["70B"].nbytes(2.0))),
        ],
        ["Llama 2, arXiv 2307.09288", f"{PAPER}, table 3"],
        "herd sizes",
        {
            "llama2_fp32_bytes": float(old.nbytes(4.0)),
            "llama2_bf16_bytes": float(old.nbytes(2.0)),
            "ratio_bf16": times,
        },
    )


def words_per_window(window: int = 131_072) -> dict[str, dict[str, float]]:
    """English words' worth of text in a window, by kind of text and language: measured (``words.yaml``)."""
    table = read_yaml("herd.plan", "words.yaml")
    return {
        name: {
            code: window * text["english_words"] / row["tokens"] for code, row in text["languages"].items()
        }
        for name, text in table.items()
    }


def _words() -> Claim:
    window = SIZES["405B"].max_context
    news, legal = (words_per_window(window)[name] for name in ("pud", "udhr"))
    lowest = min(news, key=lambda code: news[code])
    rest = ("de", "fr", "it", "pt", "es")
    fitting = [NAMES.get(code, language(code)) for code in news if news[code] >= POTTER_WORDS]
    return Claim(
        "96000-words",
        "128k tokens are 96,000 words, a whole Harry Potter.",
        "half true",
        f"A rule of thumb, {0.75 * 128_000:,.0f} = 0.75 × 128,000, and in English it holds: {news['en']:,.0f} words of "
        f"news, {legal['en']:,.0f} of legal prose. In other languages the same content takes more tokens: what fits is "
        f"worth {min(news[c] for c in rest):,.0f} to {max(news[c] for c in rest):,.0f} English words in the other "
        f"European ones, {news[lowest]:,.0f} in {language(lowest)}. The first Harry Potter ({POTTER_WORDS:,} words) "
        f"fits in {' and '.join(fitting)} only.",
        [
            (
                f"{window:,} tokens of {NAMES.get(code, language(code))}, in words of the English original",
                f"{words:,.0f}",
            )
            for code, words in news.items()
        ],
        [
            "measured with Meta's tokenizer on 1,000 sentences in ten languages (Parallel Universal Dependencies) and "
            "on the Universal Declaration of Human Rights",
            f"{POTTER_WORDS:,} words: published counts of the book",
        ],
        "python bench/words_per_window.py",
        {f"{code}_english_words": words for code, words in news.items()}
        | {f"{code}_english_words_udhr": words for code, words in legal.items()},
    )


def _gpu_hours() -> Claim:
    hours, config = GPU_HOURS["405B"], SIZES["405B"]
    month = hours / MONTH_HOURS
    cost = 43_000 * 40_000
    card, fp8 = machine("8xH100"), files.fp8_nbytes(config)
    pair = machine("16xH100")
    desk, station = machine("2xDDR5-5600"), machine("8xDDR5-4800")
    q4 = scheme("q4").nbytes(config)
    packed = Weights(q4 / config.n_params, q4 / config.n_params)
    slow, slower = (
        1 / decode_seconds(config, where, context=1024, weights=packed) for where in (station, desk)
    )
    flops = 6 * config.n_params * TOKENS
    return Claim(
        "gpu-hours",
        "Running it takes 30.84M GPU-hours: 3,500 years on one card, or 43,000 H100s for $17 billion.",
        "false",
        f"That is what *training* took, once: {flops:.1e} FLOP on up to 16,384 GPUs. And 43,000 × $40,000 is "
        f"${cost / 1e9:.2f} billion, not 17. Running it takes {pair.count} H100s in bf16 or {card.count} in FP8; or "
        f"one computer with {_gb(q4)} of memory free, slowly: {short(slower, 2)} tokens/s on a desktop, "
        f"{short(slow, 2)} on a workstation.".replace("e+", "e"),
        [
            (f"{si(hours)} hours ÷ {YEAR_HOURS:,} a year, on one GPU", f"{hours / YEAR_HOURS:,.0f} years"),
            ("the same on 16,384 GPUs", f"{hours / 16_384 / 24:,.0f} days"),
            (f"to do it in {MONTH_HOURS} hours", f"{month:,.0f} GPUs"),
            ("43,000 × $40,000", f"${cost / 1e9:.2f} billion"),
            (
                "rented at $2, $2.85 or $4 an hour",
                ", ".join(f"${hours * usd / 1e6:.1f}M" for usd in (2, 2.85, 4)),
            ),
            (f"weights in bf16 {_gb(config.nbytes(2.0))}, memory of 16 H100s", _gb(pair.memory)),
            (f"weights in FP8 {_gb(fp8)}, memory of 8 H100s", _gb(card.memory)),
            *(
                (
                    f"weights in Q4_0 {_gb(q4)}, read once a token at {si(at.device.bandwidth, 'B/s')} peak",
                    f"{short(rate, 2)} tokens/s",
                )
                for at, rate in ((station, slow), (desk, slower))
            ),
        ],
        [
            f"{MODEL_CARD} (GPU hours)",
            "H100 prices: latent.space, October 2024; memory and bandwidth: data sheets",
        ],
        "herd plan run --size 405B --machine 8xH100",
        {
            "years": hours / YEAR_HOURS,
            "gpus_for_a_month": month,
            "usd": float(cost),
            "desktop_tokens_per_s": slow,
        },
    )


def azure_mean(model: str, kind: Any, source: str = "azure") -> float:
    """Mean of the thirteen tasks of the leaked table, percent."""
    rows = find(model=model, kind=kind, source=source)
    if len(rows) != AZURE_TASKS:
        raise AssertionError(f"{len(rows)} of {AZURE_TASKS} tasks for {model} ({kind})")
    return sum(row.score for row in rows) / len(rows)


def wins(
    model: str, rival: str, *, source: str = "azure", rival_source: str | None = None
) -> tuple[int, int]:
    """(tasks in which ``model`` is ahead of ``rival``, tasks both have), instruct models."""
    mine = {
        row.task: row.score for row in find(model=model, kind="instruct", source=source) if not row.starred
    }
    theirs = find(model=rival, kind="instruct", source=rival_source or source)
    both = [(mine[row.task], row.score) for row in theirs if row.task in mine and not row.starred]
    return sum(a > b for a, b in both), len(both)


def _small_near_large() -> Claim:
    small, base, large = (
        azure_mean("Llama 3.1 8B", "instruct"),
        azure_mean("Llama 3 70B", "base"),
        azure_mean("Llama 3 70B", "instruct"),
    )
    old = azure_mean("Llama 3 8B", "instruct")
    mmlu = [score("mmlu", model, kind="base", source="card") for model in ("Llama 3.1 8B", "Llama 3 70B")]
    return Claim(
        "8b-near-70b",
        "The new 8B comes near the old 70B.",
        "misread",
        "The table set an instruct model beside a base model. Instruct beside instruct, the new 8B is "
        f"{large - small:.1f} points behind the old 70B and {small - old:.1f} ahead of the old 8B.",
        [
            ("mean of 13 tasks, Llama 3.1 8B Instruct", f"{small:.1f}"),
            ("Llama 3 70B base, as the table had it", f"{base:.1f}"),
            ("Llama 3 70B Instruct, like with like", f"{large:.1f}"),
            ("Llama 3 8B Instruct", f"{old:.1f}"),
            ("MMLU of the base models, 3.1 8B against 3 70B", f"{mmlu[0]} against {mmlu[1]}"),
        ],
        [AZURE, MODEL_CARD],
        "herd eval FOLDER --suite leak",
        {"new_8b_instruct": small, "old_70b_base": base, "old_70b_instruct": large, "old_8b_instruct": old},
    )


def _beats_gpt4o() -> Claim:
    first, again = (
        wins("Llama 3.1 405B", "GPT-4o", rival_source="azure-leak"),
        wins("Llama 3.1 405B", "GPT-4o"),
    )
    paper, claude = (
        wins("Llama 3.1 405B", rival, source="paper-t2") for rival in ("GPT-4o", "Claude 3.5 Sonnet")
    )
    seventy = wins("Llama 3.1 70B", "GPT-4o", rival_source="azure-leak"), wins("Llama 3.1 70B", "GPT-4o")
    means = {
        "405b": azure_mean("Llama 3.1 405B", "instruct"),
        "70b": azure_mean("Llama 3.1 70B", "instruct"),
        "gpt4o_first": azure_mean("GPT-4o", "instruct", "azure-leak"),
        "gpt4o_again": azure_mean("GPT-4o", "instruct"),
    }
    return Claim(
        "beats-gpt-4o",
        "It beats GPT-4o.",
        "half true",
        f"Against GPT-4o's first run, the one in the leaked table, 405B leads in {first[0]} of {first[1]} tasks and "
        f"even 70B in {seventy[0][0]}. Azure then ran GPT-4o again, and it scored "
        f"{means['gpt4o_again'] - means['gpt4o_first']:.1f} points more: now 405B leads in {again[0]}, 70B in "
        f"{seventy[1][0]}. In Meta's own table 405B leads in {paper[0]} of {paper[1]}. So: level, and open.",
        [
            ("405B ahead of GPT-4o's first run", f"{first[0]} of {first[1]}"),
            ("405B ahead of GPT-4o, run again", f"{again[0]} of {again[1]}"),
            ("405B ahead of GPT-4o, Meta's settings", f"{paper[0]} of {paper[1]}"),
            ("405B ahead of Claude 3.5 Sonnet, Meta's settings", f"{claude[0]} of {claude[1]}"),
            (
                "70B ahead of GPT-4o, first run and again",
                f"{seventy[0][0]} and {seventy[1][0]} of {seventy[1][1]}",
            ),
            ("mean of 13: 405B, 70B", f"{means['405b']:.1f}, {means['70b']:.1f}"),
            (
                "mean of 13: GPT-4o first run, run again",
                f"{means['gpt4o_first']:.1f}, {means['gpt4o_again']:.1f}",
            ),
        ],
        [AZURE, f"{PAPER}, table 2"],
        "herd eval FOLDER --suite leak",
        {"wins_first_run": float(first[0]), "wins_rerun": float(again[0]), "wins_paper": float(paper[0])}
        | means,
    )


def _code_and_truth() -> Claim:
    rows: list[tuple[str, str]] = []
    values: dict[str, float] = {}
    for task in ("humaneval", "truthfulqa_mc1"):
        for size in ("8B", "70B"):
            base = score(task, f"Llama 3 {size}", kind="base", source="azure")
            old = score(task, f"Llama 3 {size}", kind="instruct", source="azure")
            new = score(task, f"Llama 3.1 {size}", kind="instruct", source="azure")
            rows.append(
                (f"{task}, {size}: 3 base → 3 Instruct → 3.1 Instruct", f"{base:.1f} → {old:.1f} → {new:.1f}")
            )
            values |= {f"{task}_{size}_base": base, f"{task}_{size}_old": old, f"{task}_{size}_new": new}

    def moved(key: str) -> str:
        return f"{round(values[f'{key}_new'] - values[f'{key}_old'], 1) + 0.0:+.1f}".replace("-", MINUS)

    return Claim(
        "code-and-truth",
        "human_eval and truthfulqa are up sharply.",
        "misread",
        "Most of the jump is instruction tuning: the table compared new instruct models with old base models. Between "
        f"instruct models, human_eval moves by {moved('humaneval_8B')} (8B) and {moved('humaneval_70B')} (70B) points, "
        f"truthfulqa by {moved('truthfulqa_mc1_8B')} and {moved('truthfulqa_mc1_70B')}.",
        rows,
        [AZURE],
        "herd eval FOLDER --suite leak",
        values,
    )


def _compute_saved() -> Claim:
    rows: list[tuple[str, str]] = []
    values: dict[str, float] = {}
    for size in ("8B", "70B"):
        config = SIZES[size]
        old, new = (azure_mean(f"Llama {family} {size}", "instruct") for family in ("3", "3.1"))
        flops, weights = config.flops_per_token(), config.nbytes(2.0)
        rows.append((f"{size} Instruct, mean of 13 tasks: 3 → 3.1", f"{old:.1f} → {new:.1f}"))
        rows.append(
            (
                f"{size}, points a GFLOP/token: 3 → 3.1",
                f"{short(old / flops * 1e9)} → {short(new / flops * 1e9)}",
            )
        )
        rows.append(
            (
                f"{size}, points a GB of bf16: 3 → 3.1",
                f"{short(old / weights * 1e9)} → {short(new / weights * 1e9)}",
            )
        )
        values |= {f"old_{size}": old, f"new_{size}": new, f"flops_{size}": flops}
    cheapest = {size: prices.of(f"Llama 3.1 {size}")[0] for size in SIZES if prices.of(f"Llama 3.1 {size}")}
    for size, price in sorted(cheapest.items(), key=lambda item: SIZES[item[0]].n_params):
        points = azure_mean(f"Llama 3.1 {size}", "instruct")
        rows.append(
            (
                f"{size}, points a blended dollar for 1M tokens ({price.host})",
                f"{short(points / price.blended)}",
            )
        )
        values[f"points_per_usd_{size}"] = points / price.blended
    times = SIZES["70B"].flops_per_token() / SIZES["8B"].flops_per_token()
    gains = [100 * (values[f"new_{size}"] / values[f"old_{size}"] - 1) for size in ("8B", "70B")]
    return Claim(
        "compute-saved",
        "The new models save compute.",
        "half true",
        "3.1 8B and 70B have the very shapes of Llama 3: a token costs the same FLOPs and bytes. What rose is the "
        f"score for them: by {gains[0]:.1f} % (8B) and {gains[1]:.1f} % (70B); and the context, 16 times. Compute is "
        f"saved by taking a smaller model: a token of 8B costs a {times:.0f}th of one of 70B.",
        rows,
        [AZURE, "prices: herd/plan/prices.yaml, with dates"],
        "herd plan",
        values,
    )


def _cheaper() -> Claim:
    rows: list[tuple[str, str]] = []
    for model in (
        "GPT-4o",
        "Claude 3.5 Sonnet",
        "Llama 3.1 405B",
        "GPT-4o mini",
        "Llama 3.1 70B",
        "Llama 3.1 8B",
    ):
        offers = prices.of(model)
        for price in (offers[0], offers[-1]) if len(offers) > 1 else offers:
            what = f"{model}, {price.host} ({price.date}): {price.input:g} in, {price.output:g} out"
            rows.append((what, f"${price.blended:.2f}"))
    large, rival = prices.of("Llama 3.1 405B"), prices.of("GPT-4o")
    small, mini = prices.of("Llama 3.1 70B"), prices.of("GPT-4o mini")
    launch = next(price for price in rival if price.date == "2024-07")
    return Claim(
        "cheaper",
        "It is cheaper per million tokens.",
        "half true",
        f"It depends on the host: blended 3:1, 405B costs ${large[0].blended:.2f} to ${large[-1].blended:.2f}, GPT-4o "
        f"${launch.blended:.2f} that month and ${rival[0].blended:.2f} soon after; a tenth, as some wrote, it never "
        f"was. And 70B at ${small[0].blended:.2f} costs more than GPT-4o mini at ${mini[0].blended:.2f}. What open "
        "weights give is the choice of host, one's own machine among them.",
        rows,
        sorted({price.source for price in prices.prices()}),
        "herd plan run --size 405B --machine 8xH100",
        {"405b_cheapest": large[0].blended, "405b_dearest": large[-1].blended, "gpt4o_launch": launch.blended,
         "gpt4o_later": rival[0].blended, "70b_cheapest": small[0].blended, "gpt4o_mini": mini[0].blended},
    )  # fmt: skip


def _membership() -> Claim:
    users, weights = 700e6, SIZES["8B"].nbytes(2.0)
    return Claim(
        "membership",
        "To use it one will need a paid membership.",
        "false",
        "The weights are free of charge, for use and for derivatives, under the Llama 3.1 Community License. It asks "
        "other things: show “Built with Llama”, begin the names of derived models with “Llama”, keep to the use "
        f"policy, and ask Meta first if one had more than {users:,.0f} monthly users on the day of the release. What "
        "costs is the machine.",
        [
            ("price of the weights", "$0"),
            ("monthly users above which one must ask", f"{users:,.0f}"),
            (f"time to download 8B in bf16, {_gb(weights)}, at 100{NBSP}Mbit/s", duration(weights / 12.5e6)),
        ],
        [LICENCE],
        "herd import --help",
        {"usd": 0.0, "monthly_users": users},
    )
