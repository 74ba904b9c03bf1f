"""Write the tables of README.md and docs/checks.md from the committed receipts.

python bench/readme.py             # only the tables, from the receipts that git tracks (git add them first)
python bench/readme.py runs/full   # also write bench/receipts/raise-MODE.json and docs/img/report-*.svg first
python bench/readme.py --check     # report whether the tables are up to date, and change nothing

The tables mark receipts whose commit is not in git's history, so all of this needs a checkout with its whole history.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

from common import COMMITTED, ROOT
from family_bars import judged
from herd.files import write_atomically
from herd.llama import SIZES
from herd.report import read_receipts, write_receipt
from herd.report.page import raise_command
from herd.report.receipt import Receipt, read_receipt
from herd.report.run import load_run
from herd.report.tabulate import markdown
from readme_checks import checks_table, missed_text
from readme_picture import write_pictures
from readme_tables import (
    family_table,
    fill,
    mark,
    marks_text,
    numbers_table,
    plan_table,
    run_values,
    stages_table,
)

PAGES = (ROOT / "README.md", ROOT / "docs" / "checks.md")


def sizes_table() -> str:
    """Return the table of the published models with their exact sizes."""
    rows = [
        [
            f"Llama {'3.2' if config.tie_embeddings else '3.1'} **{name}**",
            f"{config.n_params:,}",
            str(config.n_layers),
            f"{config.dim:,}",
            f"{config.n_heads} : {config.n_kv_heads}",
            f"{config.ffn_dim:,}",
            f"{config.nbytes(2.0) / 1e9:,.1f} GB",
            f"{config.kv_nbytes_per_token(2.0) * config.max_context / 1e9:,.1f} GB",
        ]
        for name, config in SIZES.items()
    ]
    header = [
        "model", "parameters", "layers", "width", "heads : KV", "FFN", "weights, bf16",
        "KV cache at 128k, bf16",
    ]  # fmt: skip
    return markdown(header, rows)


def picture() -> str:
    """Return the picture of the run for light and dark mode, or nothing if there is none yet."""
    if not (ROOT / "docs" / "img" / "report-light.svg").exists():
        return ""
    return (
        '<picture>\n<source media="(prefers-color-scheme: dark)" srcset="docs/img/report-dark.svg">\n'
        '<img alt="A run\'s report: family tree, losses, scores with intervals" src="docs/img/report-light.svg">\n'
        "</picture>"
    )


def git(*words: str) -> list[str] | None:
    """Return the lines that a git command prints, or None where it fails, as outside a checkout."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else None


def history() -> set[str] | None:
    """Return the commits that HEAD grew from, or None where git does not know them all."""
    return (
        set(git("rev-list", "HEAD") or ())
        if git("rev-parse", "--is-shallow-repository") == ["false"]
        else None
    )


def judged_again(family: Receipt) -> Receipt:
    """Return the receipt of bench/family.py with the bars of family_bars.py.

    The receipt was written with bars that were set after the measurement (docs/checks.md, changed bars).
    """
    values = {
        key: value if value.lo is None or "minus" in key else judged(key, value.value, value.lo, value.hi)
        for key, value in family.values.items()
    }
    return dataclasses.replace(family, values=values)


def tables(commits: set[str]) -> dict[str, str]:
    """Return every table that a marker may name, from the receipts that git tracks. ``commits``: the history."""
    tracked = {Path(line).stem for line in git("ls-files", "--", "bench/receipts") or ()}
    receipts = {name: found for name, found in read_receipts(COMMITTED).items() if name in tracked}
    receipts["family"] = judged_again(receipts["family"])
    family = receipts.get("raise-demo")
    marks = {name: mark(receipt, commits) for name, receipt in receipts.items()}
    checks = {name: receipt for name, receipt in receipts.items() if not name.startswith("raise-")}
    return {
        "sizes": sizes_table(),
        "numbers": numbers_table(receipts, marks),
        "plan": plan_table(receipts),
        "marks": marks_text(marks),
        "missed": checks_table(checks, marks, "../bench/receipts", missed=True),
        "missed-count": missed_text(checks),
        "checks": checks_table(checks, marks, "../bench/receipts"),
        "family": family_table(family),
        "stages": stages_table(family),
        "picture": picture(),
    }


def take(folder: Path) -> None:
    """Write a run's receipt, unless its numbers are the same, and its picture into docs/img."""
    run = load_run(folder)
    mode = run.plan.get("mode", "run")
    seed = run.plan.get("seed")
    path = COMMITTED / f"raise-{mode}.json"
    values = run_values(run)
    if not path.exists() or read_receipt(path).values != values:
        write_receipt(
            path,
            what=f"a herd raised with --{mode}" if mode != "demo" else "a herd raised by default",
            values=values,
            command=raise_command(run) or "herd raise",
            seed=None if seed is None else int(seed),
            made_by=run.commit or None,
        )
        subprocess.run(["git", "add", str(path)], cwd=ROOT, check=False)
    for path in write_pictures(run, ROOT / "docs" / "img"):
        print(path.relative_to(ROOT))


def main(words: list[str]) -> int:
    check = "--check" in words
    if (commits := history()) is None:
        reason = "git does not have the whole history here, so it cannot tell which receipts to mark"
        print(f"skipped: {reason} (git fetch --unshallow gets it)", file=sys.stderr)
        return 0 if check else 1
    for word in words:
        if not word.startswith("-"):
            take(Path(word))
    filled = tables(commits)
    behind = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := fill(text, filled)) == text:
            continue
        if check:
            print(f"{page.relative_to(ROOT)} is older than its receipts: run make readme", file=sys.stderr)
            behind = 1
        else:
            write_atomically(page, new)
            print(page.relative_to(ROOT))
    return behind


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
