"""Measure how much text fits into 128k tokens with Meta's tokenizer, in ten languages.

    python bench/words_per_window.py            # seconds

The same 1,000 sentences (Parallel Universal Dependencies) and the same declaration (Universal Declaration of
Human Rights) exist in every language, so languages can be compared by content: how many English words' worth
of text a window holds in each. Needs the real tokenizer and the texts in HERD_TEST_DATA. With --commit it
also writes the small table that `herd plan leak` reads (src/herd/plan/words.yaml).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import DATA, ROOT, bench_parser, save_receipt
from herd.files import write_atomically
from herd.report.receipt import Value
from herd.text import Tokenizer

LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th", "ja", "zh")
UNSPACED = ("th", "ja", "zh")  # languages that put no spaces between words
WINDOW = 131_072
RESAMPLES, SEED = 2000, 0


@dataclass
class Text:
    """A text in one language: tokens and words of every line (a sentence), and the number of characters."""

    tokens_L: np.ndarray
    words_L: np.ndarray
    chars: int


def read(tokenizer: Tokenizer, path: Path, spaced: bool) -> Text:
    """Count a text as running text: in languages with spaces every line starts with one."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    prefix = " " if spaced else ""
    tokens = np.array([len(tokenizer.encode(prefix + line)) for line in lines])
    return Text(
        tokens,
        np.array([len(line.split()) for line in lines]),
        sum(map(len, lines)) + len(prefix) * len(lines),
    )


def interval(english: Text, other: Text) -> tuple[float, float, float]:
    """Return the English words' worth of ``other`` in a window, with its 95 % bootstrap interval over sentences."""
    rng = np.random.default_rng(SEED)
    n = len(other.tokens_L)
    draws = rng.integers(0, n, (RESAMPLES, n))
    ratios = english.words_L[draws].sum(1) / other.tokens_L[draws].sum(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return tuple(WINDOW * r for r in (english.words_L.sum() / other.tokens_L.sum(), low, high))  # type: ignore


def main() -> None:
    """Measure, print, write the receipt and, with ``--commit``, the planner's table."""
    args = bench_parser(__doc__).parse_args()
    model = DATA / "llama3_tokenizer" / "tokenizer.model"
    if not model.exists():
        sys.exit(f"{model} is absent: set HERD_TEST_DATA")
    tokenizer = Tokenizer.from_file(model)
    values: dict[str, Value] = {}
    table = [
        "# Words and tokens of parallel text under Meta's Llama 3.1 tokenizer. Written by "
        "bench/words_per_window.py:",
        "# not edited by hand. pud: 1,000 sentences of news and encyclopaedia; udhr: the declaration of "
        "human rights.",
        "# english_words: words of the English original, so that tokens / english_words compares languages "
        "by content.",
    ]
    for name in ("pud", "udhr"):
        folder = DATA / ("ud_pud_parallel" if name == "pud" else "udhr")
        texts = {code: read(tokenizer, folder / f"{code}.txt", code not in UNSPACED) for code in LANGUAGES}
        english = texts["en"]
        table += [f"{name}:", f"  english_words: {english.words_L.sum()}", "  languages:"]
        for code, text in texts.items():
            tokens, words = int(text.tokens_L.sum()), int(text.words_L.sum())
            own = "null" if code in UNSPACED else str(words)
            table.append(f"    {code}: {{tokens: {tokens}, words: {own}, chars: {text.chars}}}")
            if name == "pud":  # its lines agree between languages, so sentences can be drawn together
                middle, low, high = interval(english, text)
                values[f"{code}/english words per window"] = Value(
                    round(middle), "words", round(low), round(high)
                )
            else:
                share = float(WINDOW * english.words_L.sum() / tokens)
                values[f"{code}/english words per window, udhr"] = Value(round(share), "words")
            values[f"{code}/characters per token, {name}"] = Value(
                round(text.chars / tokens, 3), "characters/token"
            )
    if args.commit:
        write_atomically(ROOT / "src" / "herd" / "plan" / "words.yaml", "\n".join(table) + "\n")
    save_receipt(
        "words-per-window",
        what="English words' worth of text in a window of 131,072 tokens, by language, with Meta's tokenizer",
        values=values,
        seed=SEED,
    )


if __name__ == "__main__":
    main()
