"""Compare the tokenizer with tiktoken and `tokenizers` on every sentence of real data in ten languages.

    python bench/tokenizer.py            # about a minute

Meta's ranks are loaded three times, independently: by Herd, by tiktoken's own loader, and by Hugging Face's
`tokenizers` from the `tokenizer.json` that Herd writes. Every sentence must have the same ids in all three
and decode to itself. Speed is measured in the same run, alternating, on one thread each.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tiktoken
import tokenizers
from tiktoken.load import load_tiktoken_bpe

from common import DATA, bench_parser, exactly, save_receipt
from herd.report.receipt import Value
from herd.text import Tokenizer
from herd.text.tokenizer_json import PATTERN

LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th", "ja", "zh")
ROUNDS = 3


def sentences(data: Path) -> dict[str, list[str]]:
    """Return all lines of the real data by language."""
    found: dict[str, list[str]] = defaultdict(list)
    sources = [(path.stem, path) for path in sorted((data / "ud_pud_parallel").glob("??.txt"))]
    sources += [
        (path.parent.name[:2], path) for path in sorted((data / "common_voice_sentences").glob("*/*.txt"))
    ]
    sources += [("th", data / "thai_wisesight" / "neu.txt")]
    for language, path in sources:
        found[language] += path.read_text(encoding="utf-8").splitlines(keepends=True)
    missing = set(LANGUAGES) - set(found)
    if missing:
        sys.exit(f"no sentences for {sorted(missing)} in {data}: set HERD_TEST_DATA")
    return dict(found)


def seconds(encode: Callable[[str], object], texts: Iterable[str]) -> float:
    """Return the wall time of encoding all texts one after another."""
    start = time.perf_counter()
    for text in texts:
        encode(text)
    return time.perf_counter() - start


def main() -> None:
    bench_parser(__doc__).parse_args()
    model = DATA / "llama3_tokenizer" / "tokenizer.model"
    ours = Tokenizer.from_file(model)
    oracle = tiktoken.Encoding(
        "oracle", pat_str=PATTERN, mergeable_ranks=load_tiktoken_bpe(str(model)), special_tokens={}
    )
    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)
        derived = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    by_language = sentences(DATA)
    values: dict[str, Value] = {}
    unlike_tiktoken = unlike_derived = lossy = n_sentences = n_bytes = 0
    times = {"herd": 0.0, "tiktoken": 0.0, "tokenizers": 0.0}
    for language in LANGUAGES:
        texts = by_language[language]
        n_tokens = 0
        for text in texts:
            ids = ours.encode(text)
            unlike_tiktoken += ids != oracle.encode(text, disallowed_special=())
            unlike_derived += ids != derived.encode(text, add_special_tokens=False).ids
            lossy += ours.decode(ids) != text
            n_tokens += len(ids)
        size = sum(len(text.encode()) for text in texts)
        n_sentences, n_bytes = n_sentences + len(texts), n_bytes + size
        values[f"bytes_per_token_{language}"] = Value(round(size / n_tokens, 3), "bytes/token")
        print(f"{language}: {len(texts):7d} sentences, {size / n_tokens:.2f} bytes per token")
        sample = texts[:2000]
        for _ in range(ROUNDS):
            times["herd"] += seconds(ours.encode, sample)
            times["tiktoken"] += seconds(oracle.encode_ordinary, sample)
            times["tokenizers"] += seconds(
                lambda text: derived.encode(text, add_special_tokens=False), sample
            )

    values |= {
        "sentences": Value(n_sentences, "sentences"),
        "bytes": Value(n_bytes, "bytes"),
        "unlike_tiktoken": exactly(0, unlike_tiktoken, "sentences"),
        "unlike_tokenizer_json": exactly(0, unlike_derived, "sentences"),
        "not_round_trip": exactly(0, lossy, "sentences"),
        "time_vs_tiktoken": Value(round(times["herd"] / times["tiktoken"], 2), "1"),
        "time_vs_tokenizers": Value(round(times["herd"] / times["tokenizers"], 2), "1"),
    }
    save_receipt(
        "tokenizer",
        what="Herd's tokenizer with Meta's ranks, tiktoken, and its own tokenizer.json in ten languages",
        values=values,
        rivals={"tiktoken": tiktoken.__version__, "tokenizers": tokenizers.__version__},
        notes="time_vs_*: encoding sentence by sentence on one thread, alternated in one run; below 1 is "
        "faster.",
    )


if __name__ == "__main__":
    main()
