"""Ten claims of the news about Llama 3.1 in July 2024: verdict, arithmetic, sources, and a command for each.

A torrent of "820 GB" appeared the day before the release, with one table of benchmarks and no explanation.
Many articles drew conclusions without doing the arithmetic. This file does it, from the shapes in
`llama.config`, published scores and prices, and measurements of Meta's tokenizer on parallel text. The texts
are in ``leak.yaml``. Each function here computes the numbers that the texts of one claim name. Neither
weights nor torch are needed.
"""

from __future__ import annotations

import functools
import itertools
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import units
from ..llama.config import SIZES, ModelConfig
from ..package_yaml import package_yaml
from ..quant.formats import scheme
from ..report import languages, published
from ..report.template import template
from . import prices, shard_files
from .machines import find_machine
from .ops import Weights, decode_seconds

Verdict = Literal["true", "half true", "misread", "false"]
Facts = dict[str, Any]

GPU_HOURS = {"8B": 1.46e6, "70B": 7.0e6, "405B": 30.84e6}
"""H100 hours of training, from the model card of Llama 3.1."""
TRAINING_TOKENS = 15.6e12
"""Tokens that 405B was pre-trained on (arXiv 2407.21783). The model card says "15T+" for all three sizes."""
LLAMA2 = {
    "7B": ModelConfig(32_000, 4096, 32, 32, 32, 11_008, rope_theta=10_000.0, max_context=4096),
    "70B": ModelConfig(32_000, 8192, 80, 64, 8, 28_672, rope_theta=10_000.0, max_context=4096),
}
AZURE_TASKS = 13
POTTER_WORDS = 76_944
"""Words of "Harry Potter and the Philosopher's Stone" (harrypotterkids.com, wandwisdom.com)."""
TONES = {"true": "good", "half true": "other", "misread": "other", "false": "bad"}
"""Colours of the verdicts on the page, by their names in `report.palette`."""


@dataclass(frozen=True)
class Claim:
    """A claim of the news, and whether it is true.

    ``arithmetic`` has (description, value) rows for people, ``values`` the same numbers unrounded for
    programs, and ``see`` a command that shows the figures.
    """

    key: str
    said: str
    verdict: Verdict
    answer: str
    arithmetic: Sequence[tuple[str, str]]
    sources: Sequence[str]
    see: str
    values: dict[str, float]


def all_claims() -> list[Claim]:
    """Return all claims in the order of the news."""
    texts = package_yaml(__package__, "leak.yaml")["claims"]
    return [_claim(key, text, _FACTS[key]()) for key, text in texts.items()]


def claims_page(claims: Sequence[Claim]) -> str:
    """Return a self-contained HTML page of all claims, without scripts."""
    verdicts = Counter(claim.verdict for claim in claims)
    counts = [(verdict, count) for verdict in TONES if (count := verdicts[verdict])]  # type: ignore[index]
    return template("herd.plan", "leak.html.jinja").render(claims=claims, tones=TONES, counts=counts)


def _claim(key: str, text: dict[str, Any], facts: Facts) -> Claim:
    arithmetic: list[tuple[str, str]] = []
    for entry in text["arithmetic"]:
        items, row = ([None], entry) if isinstance(entry, list) else (facts[entry["each"]], entry["row"])
        arithmetic += [(_fill(row[0], facts, item), _fill(row[1], facts, item)) for item in items]
    answer, said, verdict, see = (text[name] for name in ("answer", "said", "verdict", "see"))
    sources = [_fill(source, facts) for source in text["sources"]] + facts.get("sources", [])
    values = {name: float(value) for name, value in facts.items() if isinstance(value, int | float)}
    return Claim(key, said, verdict, _fill(answer, facts), arithmetic, sources, see, values)


_SHAPES = {
    name: {"params": config.n_params, "bf16": config.nbytes(2.0), "config": config}
    for name, config in SIZES.items()
}
"""The published models, for texts such as {size[8B][bf16]:gb}."""


class _Formatter(string.Formatter):
    """``str.format`` with the units of ``leak.yaml``."""

    FORMATS: dict[str, Callable[[float], str]] = {  # noqa: RUF012
        "gb": lambda value: f"{units.fixed(value / 1e9, 1)} GB",
        "bytes": units.nbytes,
        "short": units.short,
        "short2": lambda value: units.short(value, 2),
        "si": units.si,
        "si_rate": lambda value: units.si(value, "B/s"),
        "time": units.duration,
        # + 0.0 turns minus zero into zero
        "change": lambda value: f"{round(value, 1) + 0.0:+.1f}".replace("-", units.MINUS),
    }

    def format_field(self, value: Any, spec: str) -> Any:
        shown = self.FORMATS.get(spec)
        return shown(value) if shown else super().format_field(value, spec)


def _fill(text: str, facts: Facts, item: Any = None) -> str:
    return _Formatter().vformat(text, (), facts | {"item": item, "size": _SHAPES})


# The numbers of each claim, and objects whose attributes leak.yaml names ------------------------------------


def _size() -> Facts:
    computed, files = shard_files.computed_405b(), shard_files.PUBLISHED_405B
    return {
        **{f"{name.lower()}_bytes": size for name, size in computed.items()},
        **{f"published_{name.lower()}_bytes": found.nbytes for name, found in files.items()},
        "n_params": SIZES["405B"].n_params,
        "mp16_params": computed["MP16"] // 2,
        "q4_bytes": scheme("q4").nbytes(SIZES["405B"]),
        "published": files,
    }


def _three_times() -> Facts:
    new, old = SIZES["405B"], LLAMA2["70B"]
    fp32, bf16 = old.nbytes(4.0), old.nbytes(2.0)
    return {
        "llama2": old,
        "llama2_fp32_bytes": fp32,
        "llama2_bf16_bytes": bf16,
        "ratio_bf16": new.nbytes(2.0) / bf16,
        "ratio_news": shard_files.computed_405b()["MP16"] / fp32,
    }


def words_per_window(window: int) -> dict[str, dict[str, float]]:
    """Return the English words of text that fit in a window of tokens, by kind of text and language.

    Measured with Meta's tokenizer by bench/words_per_window.py (``words.yaml``).
    """
    words = {}
    for kind, text in package_yaml(__package__, "words.yaml").items():
        english = window * text["english_words"]
        words[kind] = {code: english / row["tokens"] for code, row in text["languages"].items()}
    return words


def _words() -> Facts:
    window = SIZES["405B"].max_context
    news, legal = (words_per_window(window)[kind] for kind in ("pud", "udhr"))
    fewest = min(news, key=lambda code: news[code])
    european = [news[code] for code in ("de", "fr", "it", "pt", "es")]
    return {
        **{f"{code}_english_words": words for code, words in news.items()},
        **{f"{code}_english_words_udhr": words for code, words in legal.items()},
        "rule_of_thumb": 0.75 * 128_000,
        "european_min": min(european),
        "european_max": max(european),
        "fewest_words": news[fewest],
        "fewest_language": languages.language(fewest),
        "potter_words": POTTER_WORDS,
        "fitting": " and ".join(languages.language(code) for code in news if news[code] >= POTTER_WORDS),
        "languages": [(languages.language(code), words) for code, words in news.items()],
    }


def _gpu_hours() -> Facts:
    hours, config = GPU_HOURS["405B"], SIZES["405B"]
    q4 = scheme("q4").nbytes(config)
    packed = Weights(q4 / config.n_params, q4 / config.n_params)
    computers = [find_machine(name) for name in ("8xDDR5-4800", "2xDDR5-5600")]
    rates = [1 / decode_seconds(config, computer, packed, context=1024) for computer in computers]
    return {
        "gpu_hours": hours,
        "years": hours / 8_760,
        "days_on_16384": hours / 16_384 / 24,
        "gpus_for_a_month": hours / 720,
        "usd": 43_000 * 40_000,
        "billions": 43_000 * 40_000 / 1e9,
        "rents": [hours * usd / 1e6 for usd in (2, 2.85, 4)],
        "flops_scientific": f"{6 * config.n_params * TRAINING_TOKENS:.1e}".replace("e+", "e"),
        "fp8_bytes": shard_files.fp8_nbytes(config),
        "q4_bytes": q4,
        "memory": [find_machine(name).memory for name in ("16xH100", "8xH100")],
        "desktop_tokens_per_s": rates[0],
        "dual_tokens_per_s": rates[1],
        "computers": list(zip(computers, rates, strict=True)),
    }


def azure_mean(model: str, kind: published.Kind, source: str = "azure") -> float:
    """Return the mean score of a model over the thirteen tasks of the leaked table, in percent."""
    rows = published.find_published(model=model, kind=kind, source=source)
    if len(rows) != AZURE_TASKS:
        raise AssertionError(f"{len(rows)} of {AZURE_TASKS} tasks for {model} ({kind})")
    return sum(row.score for row in rows) / len(rows)


def wins(
    model: str, rival: str, *, source: str = "azure", rival_source: str | None = None
) -> tuple[int, int]:
    """Return (tasks in which ``model`` scores higher than ``rival``, tasks of both), for instruct models."""
    rows = published.find_published(model=model, kind="instruct", source=source)
    mine = {row.task: row.score for row in rows if not row.starred}
    theirs = published.find_published(model=rival, kind="instruct", source=rival_source or source)
    both = [(mine[row.task], row.score) for row in theirs if row.task in mine and not row.starred]
    return sum(a > b for a, b in both), len(both)


def _small_near_large() -> Facts:
    small, old_small = (azure_mean(f"Llama {family} 8B", "instruct") for family in ("3.1", "3"))
    large = azure_mean("Llama 3 70B", "instruct")
    models = ("Llama 3.1 8B", "Llama 3 70B")
    return {
        "new_8b_instruct": small,
        "old_70b_base": azure_mean("Llama 3 70B", "base"),
        "old_70b_instruct": large,
        "old_8b_instruct": old_small,
        "behind_70b": large - small,
        "ahead_of_8b": small - old_small,
        "mmlu": [published.published_score("mmlu", model, kind="base", source="card") for model in models],
    }


def _beats_gpt4o() -> Facts:
    large, small, rival = "Llama 3.1 405B", "Llama 3.1 70B", "GPT-4o"
    first, paper = wins(large, rival, rival_source="azure-leak"), wins(large, rival, source="paper-t2")
    gpt_first, gpt_again = azure_mean(rival, "instruct", "azure-leak"), azure_mean(rival, "instruct")
    return {
        "wins_first_run": first[0],
        "wins_rerun": wins(large, rival)[0],
        "wins_paper": paper[0],
        "claude": wins(large, "Claude 3.5 Sonnet", source="paper-t2"),
        "wins_70b_first_run": wins(small, rival, rival_source="azure-leak")[0],
        "wins_70b_rerun": wins(small, rival)[0],
        "tasks": first[1],
        "tasks_paper": paper[1],
        "405b": azure_mean(large, "instruct"),
        "70b": azure_mean(small, "instruct"),
        "gpt4o_first": gpt_first,
        "gpt4o_again": gpt_again,
        "gain_of_second_run": gpt_again - gpt_first,
    }


def _code_and_truth() -> Facts:
    facts: Facts = {"scores": []}
    for task, size in itertools.product(("humaneval", "truthfulqa_mc1"), ("8B", "70B")):
        score = functools.partial(published.published_score, task, source="azure")
        base, old = (score(f"Llama 3 {size}", kind=kind) for kind in ("base", "instruct"))
        new = score(f"Llama 3.1 {size}", kind="instruct")
        found = {"base": base, "old": old, "new": new, "change": new - old}
        facts |= {f"{task}_{size}_{name}": value for name, value in found.items()}
        facts["scores"].append(found | {"task": task, "size": size})
    return facts


def _compute_saved() -> Facts:
    facts: Facts = {"scores": [], "ratios": [], "offers": []}
    for size in ("8B", "70B"):
        old, new = (azure_mean(f"Llama {family} {size}", "instruct") for family in ("3", "3.1"))
        flops, nbytes = SIZES[size].flops_per_token(), SIZES[size].nbytes(2.0)
        facts |= {f"old_{size}": old, f"new_{size}": new, f"flops_{size}": flops}
        facts[f"gain_{size}"] = 100 * (new / old - 1)
        facts["scores"].append({"size": size, "old": old, "new": new})
        for what, each in (("GFLOP/token", flops / 1e9), ("GB of bf16", nbytes / 1e9)):
            facts["ratios"].append({"size": size, "each": what, "old": old / each, "new": new / each})
    for size in ("8B", "70B", "405B"):
        offer = prices.offers_for(f"Llama 3.1 {size}")[0]
        points = azure_mean(f"Llama 3.1 {size}", "instruct") / offer.blended
        facts[f"points_per_usd_{size}"] = points
        facts["offers"].append({"size": size, "host": offer.host, "points": points})
    return facts | {"ratio_of_flops": facts["flops_70B"] / facts["flops_8B"]}


def _cheaper() -> Facts:
    models = ["GPT-4o", "Claude 3.5 Sonnet", "Llama 3.1 405B", "GPT-4o mini", "Llama 3.1 70B", "Llama 3.1 8B"]
    offers = {model: prices.offers_for(model) for model in models}  # cheapest first
    large, rival = offers["Llama 3.1 405B"], offers["GPT-4o"]
    return {
        "405b_cheapest": large[0].blended,
        "405b_dearest": large[-1].blended,
        "gpt4o_launch": next(offer.blended for offer in rival if offer.date == "2024-07"),
        "gpt4o_later": rival[0].blended,
        "70b_cheapest": offers["Llama 3.1 70B"][0].blended,
        "gpt4o_mini": offers["GPT-4o mini"][0].blended,
        "offers": [offer for found in offers.values() for offer in dict.fromkeys((found[0], found[-1]))],
        "sources": sorted({offer.source for offer in prices.all_offers()}),
    }


def _membership() -> Facts:
    return {"usd": 0.0, "monthly_users": 700e6, "download_seconds": SIZES["8B"].nbytes(2.0) / (100e6 / 8)}


_FACTS: dict[str, Callable[[], Facts]] = {
    "820-gb": _size,
    "three-times": _three_times,
    "96000-words": _words,
    "gpu-hours": _gpu_hours,
    "8b-near-70b": _small_near_large,
    "beats-gpt-4o": _beats_gpt4o,
    "code-and-truth": _code_and_truth,
    "compute-saved": _compute_saved,
    "cheaper": _cheaper,
    "membership": _membership,
}
