"""Make the tables of docs/checks.md that hold every number with a bar, and first those that were missed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from herd.report.receipt import Receipt, Value
from herd.report.tabulate import markdown
from readme_tables import measured_on, shown, shown_bar

EQUAL_ROWS = 4
"""So many rows of one receipt with the same number, the same bar and the verdict "passed" become one row."""
LABELS = (
    ("attention", r"(.*prefill.*): share", r"\1: share of the speed of matrix products"),
    ("attention", r"(.*decode.*): share", r"\1: share of the memory's speed"),
    ("family", "tools_en", "English tool calls and answers that are right"),
    ("family", "tools_worst_language", "tool calls and answers in the worst of seven other languages"),
    ("family", "tools_worst_form", "tool calls and answers with the worst of three forms of calls"),
    ("family", "needle", "facts found in texts of the longest trained length"),
    ("family", "copying", "copied tokens that are right"),
    ("family", "bpb_teacher", "held-out text, teacher"),
    ("family", "inside", "ten questions within its abilities, answered right"),
    ("family", "outside", "ten questions beyond its abilities, declined"),
    ("family", "seconds", "time of all stages"),
    ("ranks", "ddp", "two replicas (DDP)"),
    ("ranks", "fsdp2", "two shards (FSDP2)"),
    ("serve-fairness", "slower", "the clients' time per token (95th percentile), relative to before"),
    ("serve-fairness", "later", "the prompt's time to its first token, relative to a prompt alone"),
    ("serve-overhead", "cpu_per_token", "CPU time per token"),
    ("serve-overhead", "ttft", "time to the first token"),
    (
        "speculation-forced",
        r"off_0\.(\d)",
        r"measured speed-up over the formula's, less 1; acceptance of \g<1>0 %",
    ),
    ("smollm2-start", "more than import torch", "time until the answer, beyond that of `import torch`"),
    ("speed-", "between kernels, at most", "time between kernels, share of a step at most"),
    ("train-throughput", r"pace_vs_(\w+)", r"speed relative to transformers, \1"),
    ("train-throughput", r"peak_vs_(\w+)", r"peak memory relative to transformers, \1"),
    ("tune-japanese", "ja_extended_against_control", "Japanese: with new tokens less without"),
    ("tune-japanese", "en_change", "English: change by the training with new tokens"),
    ("tune-tools", "right", "tool calls and answers that are right"),
)
"""What to show for keys that say little: the beginning of the receipt's name, the key, its label."""


@dataclass(frozen=True)
class Row:
    """A number or several equal ones, as the table shows them."""

    label: str
    number: str
    bar: str
    passed: bool | None


def label(receipt: str, key: str) -> str:
    """Return what the table shows for a key. Underscores become spaces, except in names such as Q4_K."""
    for start, pattern, text in LABELS:
        if receipt.startswith(start) and (found := re.fullmatch(pattern, key)):
            return found.expand(text)
    return re.sub(r"(?<![A-Z\d])_|_(?![A-Z\d])", " ", key)


def rows(receipt: Receipt) -> list[Row]:
    """Return the rows of a receipt's numbers that have a bar. Only rows that passed are joined."""
    barred = {key: value for key, value in receipt.values.items() if value.bar is not None}
    if receipt.name == "eval_gold":
        return list(_gold_rows(barred))
    found = [
        Row(label(receipt.name, key), shown(value), shown_bar(value), value.passed)
        for key, value in barred.items()
    ]
    groups: dict[object, list[Row]] = {}
    for row in found:
        groups.setdefault((row.number, row.bar) if row.passed else row, []).append(row)
    for group in groups.values():
        if len(group) >= EQUAL_ROWS:
            found[found.index(group[0])] = replace(group[0], label="; ".join(row.label for row in group))
            found = [row for row in found if row not in group]
    return found


def _gold_rows(barred: Mapping[str, Value]) -> Iterator[Row]:
    """Yield the sums of bench/eval_gold.py over the benchmarks, and one by one the rows that missed their bar."""
    kept = {key: value for key, value in barred.items() if value.passed}
    names = ", ".join(
        dict.fromkeys(label("", re.sub(r"_(base|instruct)_(gold|wrong)$", "", key)) for key in kept)
    )
    gold = [value.bar or "" for key, value in kept.items() if key.endswith("gold")]
    right, asked = (sum(int(re.findall(r"\d+", bar)[place]) for bar in gold) for place in (0, 1))
    bar = f"{right:,} of {asked:,}" + ("; the others contradict themselves" if asked > right else "")
    yield Row(
        f"right answers that are accepted, as base and as instruct model: {names}",
        f"{right:,} items",
        bar,
        True,
    )
    yield Row("wrong answers that are accepted", "0 items", "0", True)
    for key, value in barred.items():
        if key not in kept:
            yield Row(label("", key), shown(value), shown_bar(value), value.passed)


def checks_table(
    receipts: Mapping[str, Receipt],
    marks: Mapping[str, str],
    folder: str = "bench/receipts",
    missed: bool = False,
) -> str:
    """Return the receipts with bars: what was measured, a link, date and processor, and the numbers with their bars.

    ``missed``: only the numbers that missed their bar.
    """
    lines: list[list[str]] = []
    for name, receipt in receipts.items():
        found = [row for row in rows(receipt) if not missed or row.passed is False]
        if not found:
            continue
        link = f"[receipt]({folder}/{name}.json), {measured_on(receipt)}"
        lines.append([f"**{receipt.what}** ({link}) {marks[name]}".rstrip(), "", "", ""])
        for row in found:
            verdict = "–" if row.passed is None else "✓" if row.passed else "**✗**"
            lines.append([row.label, row.number, row.bar, verdict])
    return markdown(["what", "measured", "bar", ""], lines)


def missed_text(receipts: Mapping[str, Receipt]) -> str:
    """Return how many rows of `checks_table` missed their bar."""
    verdicts = [row.passed for receipt in receipts.values() for row in rows(receipt)]
    return f"{verdicts.count(False)} of {len(verdicts)} bars are missed (rows that share a line count once)."
