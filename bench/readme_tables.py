"""Make the tables of the README and some of docs/checks.md: all of their content comes from receipts.

    <!-- herd:table NAME -->
    ...replaced...
    <!-- herd:end -->

`fill` puts a table between the markers with its name. A test checks that the committed pages are up to date.
`run_values` turns a run into a receipt, so that its numbers are committed although the run itself is not.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from herd.errors import ReportError
from herd.report.receipt import Receipt, Value
from herd.report.run import Run
from herd.report.tabulate import markdown, metric
from herd.units import MINUS, duration, fixed, format_value, is_share, nbytes, short, si, unit_name

_MARKED = re.compile(r"(<!-- herd:table ([\w-]+) -->\n)(.*?)(<!-- herd:end -->)", re.DOTALL)
_NONE = "–"
NBSP = "\u00a0"
"""Keeps a number and its unit on one line."""


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Replace every marked table in ``text``. An unknown name or an open marker is a `ReportError`."""
    if text.count("<!-- herd:table ") != len(_MARKED.findall(text)):
        raise ReportError("a table's marker is not closed: end it with <!-- herd:end -->")

    def table(found: re.Match[str]) -> str:
        if found[2] not in tables:
            raise ReportError(f"no table is called {found[2]!r}: there are {', '.join(sorted(tables))}")
        body = tables[found[2]].strip()
        return f"{found[1]}{body}{chr(10) if body else ''}{found[4]}"

    return _MARKED.sub(table, text)


LOST, DIRTY = "†", "‡"
"""Marks of a receipt whose commit is not in the history, and of one made with uncommitted changes."""


def mark(receipt: Receipt, commits: Container[str]) -> str:
    """Return the marks of a receipt. ``commits``: hashes of the history."""
    lost = receipt.commit.get("hash") not in commits
    return (LOST if lost else "") + (DIRTY if receipt.commit.get("dirty") else "")


def marks_text(marks: Mapping[str, str]) -> str:
    """Return the sentence that explains the marks and counts them. ``marks``: by receipt."""
    lost, dirty = (sum(sign in found for found in marks.values()) for sign in (LOST, DIRTY))
    return (
        f"{LOST} The commit of this record is not in the history: {lost} of {len(marks)} records. "
        f"{DIRTY} Made with uncommitted changes: {dirty} of {len(marks)}."
    )


@dataclass(frozen=True)
class Number:
    """A number of the README: a description, a receipt and one of its values.

    ``part``: a name and a value of the receipt that the number contains.
    """

    what: str
    receipt: str
    key: str
    part: tuple[str, str] | None = None


_TRANSFORMERS = "transformers with torch.compile"
NUMBERS = (
    Number("8B in Q8_0, decode: speed relative to llama.cpp", "speed-q80", "decode at 128: ratio"),
    Number(
        "SmolLM2-135M in 4 bits, decode: speed relative to llama.cpp",
        "smollm2-speed",
        "as downloaded, decode at 128: ratio",
    ),
    Number(
        "the same: time from the start of `herd chat` to its first word",
        "smollm2-start",
        "first token",
        part=("`import torch`", "import torch"),
    ),
    Number("8B in Q4_0, decode: speed relative to llama.cpp", "speed-q40", "decode at 128: ratio"),
    Number(
        "8B in Q4_0, prompt of 512 tokens: speed relative to llama.cpp", "speed-q40", "prefill of 512: ratio"
    ),
    Number(
        "8B in Q4_0, 16 sequences: speed relative to llama.cpp",
        "speed-q40-batch16",
        "decode at 128, 16 at once: ratio",
    ),
    Number(
        f"training step (width 512, 8 layers): speed relative to {_TRANSFORMERS}",
        "train-throughput",
        "pace_vs_compiled",
    ),
    Number(
        f"the same training step: peak memory relative to {_TRANSFORMERS}",
        "train-throughput",
        "peak_vs_compiled",
    ),
    Number(
        "models of 1 M parameters, 3 seeds: English tool calls and answers that are right",
        "family",
        "tools_en",
    ),
    Number("the same in the worst of seven other languages", "family", "tools_worst_language"),
    Number("largest difference of logits from transformers, fp32", "parity-logits", "largest difference"),
)
"""What the README shows. Where a receipt compares with several rivals, the strongest one."""


def numbers_table(receipts: Mapping[str, Receipt], marks: Mapping[str, str]) -> str:
    """Return the numbers of the README, each with its bar, receipt and date. ``marks``: of receipts, by name."""
    rows = []
    for number in NUMBERS:
        name = number.receipt
        value = _value(receipts, name, number.key)
        cell, bar = shown(value), _with_verdict(value)
        if number.part:
            cell += f", of which {shown(_value(receipts, name, number.part[1]))} are {number.part[0]}"
        if (older := f"{name}-avx2") in receipts:
            value = _value(receipts, older, number.key)
            cell, bar = (
                f"{cell}<br>[AVX2](bench/receipts/{older}.json): {shown(value)} {marks[older]}".rstrip(),
                f"{bar}<br>{_with_verdict(value)}",
            )
        link = f"[{number.what}](bench/receipts/{name}.json) {marks[name]}".rstrip()
        rows.append([link, cell, bar, measured_on(receipts[name])])
    return markdown(["what", "measured", "bar", "date, processor"], rows)


def _value(receipts: Mapping[str, Receipt], name: str, key: str) -> Value:
    value = receipts[name].values.get(key) if name in receipts else None
    if value is None:
        raise ReportError(f"receipt {name!r} has no value {key!r}, which the README shows")
    return value


def _with_verdict(value: Value) -> str:
    """Return the bar of a value, and a cross if the value misses it."""
    bar = _NONE if value.bar is None else shown_bar(value)
    return f"{bar} **✗**" if value.passed is False else bar


def measured_on(receipt: Receipt) -> str:
    """Return the date of a receipt and the name of the processor, with "AVX2" if it used no more than that."""
    processor = re.sub(r"\(R\)|\(TM\)| Processor| @.*", "", receipt.machine.get("cpu", ""))
    older = ", AVX2" if receipt.machine.get("instruction_set") == "AVX2" else ""
    return f"{receipt.date[:10]}, {processor}{older}"


_FAMILY = ("bpb", "kl", "top1", "needle", "tool_use", "code_pass")
"""Scores with a column in the README. The page of a run shows all."""


def family_table(receipt: Receipt | None) -> str:
    """Return the main scores by model from a run's receipt, each with its 95 % interval."""
    if receipt is None:
        return "*Not measured yet.*"
    keys = [key.partition("/") for key in receipt.values]
    models = list(dict.fromkeys(model for model, _, name in keys if name == "parameters"))
    names = {name for model, _, name in keys if model in models}
    known = [name for name in _FAMILY if name in names]
    header = ["model", "parameters"]
    for name in known:
        value = next(
            receipt.values[f"{model}/{name}"] for model in models if f"{model}/{name}" in receipt.values
        )
        unit = unit_name(value.unit)
        header.append(f"{metric(name).title}{', ' + unit if unit else ''}")
    rows = []
    for model in models:
        params = receipt.values[f"{model}/parameters"].value
        cells = [f"**{model}**", si(float(params)).replace(" ", NBSP)]
        cells += [
            _with_interval(receipt.values.get(f"{model}/{name}"), metric(name).decimals) for name in known
        ]
        rows.append(cells)
    return markdown(header, rows)


def stages_table(receipt: Receipt | None) -> str:
    """Return time, tokens, compute and memory by stage from a run's receipt, measured and predicted."""
    if receipt is None:
        return "*Not measured yet.*"
    stages = [key.removesuffix("/seconds") for key in receipt.values if key.endswith("/seconds")]

    def number(stage: str, key: str) -> float | None:
        found = receipt.values.get(f"{stage}/{key}")
        return float(found.value) if found else None

    rows = []
    for stage in stages:
        seconds, predicted = number(stage, "seconds"), number(stage, "predicted seconds")
        tokens, flops, peak = number(stage, "tokens"), number(stage, "flops"), number(stage, "peak memory")
        expected = number(stage, "predicted peak memory")
        cells = [
            stage,
            duration(seconds) if seconds is not None else _NONE,
            duration(predicted) if predicted else _NONE,
            si(tokens) if tokens else _NONE,
            fixed(tokens / seconds, 0) if tokens and seconds else _NONE,
            si(flops, "FLOP") if flops else _NONE,
            nbytes(peak) if peak else _NONE,
            nbytes(expected) if expected else _NONE,
        ]
        rows.append([cell.replace(" ", NBSP) for cell in cells])
    header = ["stage", "time", "predicted", "tokens", "tokens/s", "compute", "peak memory", "predicted"]
    return markdown(header, rows)


def plan_table(receipts: Mapping[str, Receipt]) -> str:
    """Return predictions compared with reality.

    Meta's runs have a row each, with the prediction of a constant MFU for comparison. Other published runs and those of
    this machine are summed up by their errors.
    """
    rows = [*_meta_rows(receipts.get("plan-meta"))]
    for name, what in (
        ("plan-torchtitan", "torchtitan’s published runs"),
        ("plan-gptfast", "gpt-fast’s decode rates"),
    ):
        if (receipt := receipts.get(name)) is not None:
            rows.append(_fitted_row(what, receipt))
    rows += _here_rows(receipts.get("plan-here"))
    if not rows:
        return "*Not measured yet.*"
    return markdown(["what", "real", "predicted", "error", "for comparison"], rows)


def _meta_rows(receipt: Receipt | None) -> Iterator[list[str]]:
    """Yield the rows of MFU by layout and of GPU hours by size."""
    values = {} if receipt is None else {key: float(value.value) for key, value in receipt.values.items()}
    for key, found in values.items():
        if match := re.fullmatch(r"(MFU \d+): (.+)", key):
            real, naive = values[f"{match[1]}, published"], values[f"{match[1]} error of a constant 0.5"]
            layout, _, context = match[2].rpartition(", ")
            cells = [
                f"Llama 3.1 405B, {layout}, context {context}: MFU",
                f"{fixed(real, 0)} %",
                f"{fixed(found, 1)} %",
            ]
            yield [*cells, _signed(found / real - 1), f"constant 50 %: {_signed(naive / 100)}"]
    for key, found in values.items():
        if match := re.fullmatch(r"(\w+) GPU hours", key):
            real, naive = values[f"{key}, published"], values[f"{key} of a constant 0.5"]
            cells = [
                f"Llama 3.1 {match[1]}: GPU hours",
                f"{fixed(real / 1e6, 2)} M",
                f"{fixed(found / 1e6, 2)} M",
            ]
            yield [*cells, _signed(found / real - 1), f"constant 50 %: {_signed(naive / real - 1)}"]


def _fitted_row(what: str, receipt: Receipt) -> list[str]:
    """Return the row of errors on the half that was not fitted."""
    values = {key: float(value.value) for key, value in receipt.values.items()}
    errors = [abs(value) for key, value in values.items() if key.endswith(": error")]
    error = f"median {fixed(statistics.median(errors), 1)} %, worst {fixed(max(errors), 1)} %"
    comparison = f"nothing fitted: median {fixed(values['median error, nothing fitted'], 1)} %"
    return [
        f"{what}, {len(errors)} rows, each fitted on the other half: tokens/s",
        _NONE,
        _NONE,
        error,
        comparison,
    ]


def _here_rows(receipt: Receipt | None) -> Iterator[list[str]]:
    """Yield the rows of this machine: bytes of tensors, peak memory and time over all configurations."""
    values = {} if receipt is None else {key: float(value.value) for key, value in receipt.values.items()}
    for ending, what in (
        ("tensors error", "bytes of tensors"),
        ("peak error", "peak memory"),
        ("time error", "time"),
    ):
        errors = [abs(value) for key, value in values.items() if key.endswith(f"{ending}") and "/" in key]
        if errors:
            count = int(values["configurations"])
            median, worst = (fixed(100 * value, 1) for value in (statistics.median(errors), max(errors)))
            yield [f"this machine, {count} configurations: {what}", _NONE, _NONE, f"median {median} %, worst {worst} %",
                   "profile re-measured"]  # fmt: skip


def _signed(share: float) -> str:
    """Format a share as +13.9 % or −4.0 %."""
    return f"{'+' if share >= 0 else ''}{fixed(100 * share, 1)} %"


def run_values(run: Run) -> dict[str, Value]:
    """Return a run's numbers as values of a receipt, with the keys ``model/score`` and ``stage/cost``."""
    values: dict[str, Value] = {}
    for stage in run.stages:
        if stage.model_name and stage.n_params:
            values[f"{stage.model_name}/parameters"] = Value(stage.n_params, "parameters")
    for score in run.scores:
        for part, found in [("", score.estimate), *score.detail.get("by_length", {}).items()]:
            name = f"{score.name} at {int(part):,}" if part.isdigit() else score.name
            values[f"{score.model}/{name}"] = Value(found.value, score.unit or "1", found.lo, found.hi)
        for kind in ("by_lang", "by_form"):
            for part, found in score.detail.get(kind, {}).items():
                values[f"{score.model}/{score.name}/{part}"] = Value(
                    found.value, score.unit or "1", found.lo, found.hi
                )
    for stage in run.stages:
        costs = (
            ("seconds", stage.seconds, "s"),
            ("predicted seconds", stage.predicted_seconds, "s"),
            ("tokens", stage.tokens, "tokens"),
            ("flops", stage.flops, "FLOP"),
            ("peak memory", stage.peak_rss_bytes, "bytes"),
            ("predicted peak memory", stage.predicted_peak_bytes, "bytes"),
        )
        for key, number, unit in costs:
            if number is not None:
                values[f"{stage.name}/{key}"] = Value(number, unit)
        for gate in stage.gates:
            if isinstance(gate.value, int | float) and not isinstance(gate.value, bool):
                bar = None if gate.bar is None else str(gate.bar)
                values[f"{stage.name}/gate: {gate.name}"] = Value(
                    gate.value, gate.unit or "1", None, None, bar, gate.passed
                )
    return values


def shown(value: Value) -> str:
    """Format a value with its unit and interval."""
    if isinstance(value.value, bool):
        return "yes" if value.value else "no"
    if isinstance(value.value, str):
        return value.value
    unit = "fraction" if _is_part(value) else value.unit
    name = "×" if unit in ("ratio", "x") else unit_name(unit)
    if _is_part(value):
        name += f" {value.unit}"
    text = _plain(value.value, unit) + (f"{NBSP}{name}" if name and unit != "bytes" else "")
    if value.lo is not None and value.hi is not None:
        text += f" ({_plain(value.lo, unit)} – {_plain(value.hi, unit)})"
    return text


def _is_part(value: Value) -> bool:
    """Return whether a value is a fraction of something that its unit names, such as 0.75 "of 20"."""
    return isinstance(value.value, float) and value.unit.startswith("of ")


def _plain(value: float, unit: str) -> str:
    if unit == "bytes":
        return nbytes(value).replace(" ", NBSP)
    if is_share(unit):
        return format_value(value, unit)
    if isinstance(value, int):
        return fixed(value, 0)
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("-", MINUS)
    return short(value)


def _with_interval(value: Value | None, decimals: int | None) -> str:
    if value is None or isinstance(value.value, str):
        return _NONE
    text = format_value(float(value.value), value.unit, decimals)
    if value.lo is not None and value.hi is not None:
        low, high = (format_value(end, value.unit, decimals) for end in (value.lo, value.hi))
        text += f"<br><sub>{low} – {high}</sub>"
    return text


def shown_bar(value: Value) -> str:
    """Format a bar in the unit in which its value is shown."""
    bar = str(value.bar).replace("<=", "≤").replace(">=", "≥").replace("|", "\\|")
    if (is_share(value.unit) or _is_part(value)) and (found := re.fullmatch(r"([≤≥]) ([\d.]+)", bar)):
        return f"{found[1]} {100 * float(found[2]):g} %"
    return bar
