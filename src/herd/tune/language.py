"""Teach a model another language: extend its vocabulary, and train the new rows with adapters.

A vocabulary made for English splits Japanese into almost two tokens per character, so a context has half as
much and every answer costs twice. New tokens join the old pieces (`text.extend`). Their rows begin as the
mean of the rows of these pieces, so the model starts with a guess of their meaning. New rows and adapters are
trained on the new text, with replay of other text, and the result is a whole model with the new tokenizer.

Shapes: V old vocabulary, N new tokens, D model dim.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..checkpoint import (
    Lineage,
    ModelSource,
    checkpoint_hash,
    load_config,
    load_model,
    load_tokenizer,
    weight_reader,
    write_checkpoint,
)
from ..checkpoint.adapter_config import refuse_adapter
from ..data.builtin import LANGUAGES, parallel_lines
from ..data.corpus import read_corpus, require_apart
from ..data.origin import RECORD, bind
from ..data.text_files import expand_paths, list_files
from ..data.tuning import read_tuning
from ..dtypes import fast_dtype, torch_dtype
from ..errors import DataError
from ..evals.bpb import compression
from ..evals.guess_language import languages_in
from ..evals.windows import from_texts
from ..files import require_own, write_atomically, write_json
from ..quant.linear import use_exact_products
from ..report.languages import language as language_name
from ..text import Tokenizer
from ..text.extend import ExtendedVocabulary, extend_vocabulary
from ..train.recipe import parse_recipe
from ..train.recipe_yaml import write_yaml
from ..train.run import PREPARED, run_recipe
from ..train.section import Positive, PositiveReal, Section
from .method import SMALL, default_lr
from .run import BEFORE, Change, compression_record, kept, text_change

BLOCK = 2_000
"""Characters of a block of text. Every tenth block, by its hash, is held out."""
HELDOUT_BYTES = 30_000
EXCERPT = 500
"""Characters of a held-out block that bits per byte are measured on: many short documents vary more."""
OTHER_BYTES = 6_000
OTHER_LINES = 110
"""Sentences of each other language that are measured, up to `OTHER_BYTES`. Only later ones are replayed."""
CONTEXT = 512
REPLAY_SAMPLE = 1_000
"""Rows of replay whose languages are recognized."""
STEP_TOKENS = 2048
FERTILITY = "fertility.json"


class LanguageOptions(Section):
    """Options of a run that teaches a language: data, new tokens, and the length of training."""

    model: str
    language: str
    text: tuple[str, ...]
    out: str
    add: Positive = 4096
    tokens: Positive = 500_000
    rank: Positive = 64
    lr: PositiveReal | None = None
    replay: tuple[str, ...] = ()
    replay_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Fertility:
    """Bytes of held-out text per token, before and after the vocabulary was extended."""

    added: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"{self.before:.2f} bytes per token with the old vocabulary, {self.after:.2f} with "
            f"{self.added:,} new tokens ({100 * (1 - self.before / self.after):.0f} % fewer tokens)"
        )


@dataclass(frozen=True)
class LanguageResult:
    """The new model, the fertility, and the changes of bits per byte, the new language's first."""

    folder: Path
    fertility: Fertility
    changes: list[Change]


def measure_fertility(options: LanguageOptions) -> Fertility:
    """Return what new tokens would do for held-out text. Reads no weights and writes nothing."""
    return _extended(options, *divided_text(options.text))[1]


def without_replay(options: LanguageOptions) -> str | None:
    """Return a line that names the languages of the report that the replay has no text in, or None.

    Without ``options.replay`` it has Herd's sentences in all of them.
    """
    if not options.replay:
        return None
    tokenizer = load_tokenizer(options.model)
    if tokenizer is None:
        raise DataError(f"{options.model}: has no tokenizer to extend")
    rows = read_tuning(options.replay, tokenizer, CONTEXT).require_examples()
    some = rows[:: math.ceil(len(rows) / REPLAY_SAMPLE)]
    found = languages_in(tokenizer.decode(row.rendered.ids) for row in some)
    missing = [code for code in LANGUAGES if code not in {*found, options.language}]
    if not missing:
        return None
    names = ", ".join(map(language_name, missing))
    return f"no text of --replay in {names}: what the model knows of these may be lost; add text to keep it"


def teach_language(
    options: LanguageOptions,
    *,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LanguageResult:
    """Extend the vocabulary, train, and measure. Finished parts in ``options.out`` are not repeated.

    Raises `DataError` if ``options.out`` has a run with other options or other text.
    """
    out = Path(options.out)
    require_apart(out, [*options.text, *options.replay])
    require_own(out, RECORD, ("extended", "train.jsonl", "replay.jsonl", "recipe.yaml", "run", BEFORE))
    train, heldout = divided_text(options.text)
    given = [*options.text, *options.replay]
    known = (out / RECORD).read_bytes() if (out / RECORD).exists() else b""
    bind(
        out,
        [(str(file), file) for name in given for path in expand_paths(name) for file in list_files(path)],
        options.model_dump(mode="json", exclude={"out"}),
        prepared=[out / "run" / name for name in PREPARED],
        cure="Give the same options to resume it, or another --out",
    )
    if (out / RECORD).read_bytes() != known:  # nothing was trained yet: what other options made is of no use
        for name in (FERTILITY, "train.jsonl", "replay.jsonl"):
            (out / name).unlink(missing_ok=True)
    fertility = extend_model(options, train, heldout, out)
    say(f"{options.language}: {fertility}")
    if line := without_replay(options):
        say(line)
    _write_rows(out / "train.jsonl", train)
    sentences = {lang: parallel_lines(lang) for lang in LANGUAGES if lang != options.language}
    others = {lang: lines[:OTHER_LINES] for lang, lines in sentences.items()}
    if not options.replay:
        replay = (line for lines in sentences.values() for line in lines[OTHER_LINES:])
        _write_rows(out / "replay.jsonl", replay)
    text = _recipe(options, fertility.added)
    write_atomically(out / "recipe.yaml", text)
    folder, _ = run_recipe(parse_recipe(text, str(out / "recipe.yaml")), on_step=on_step)
    say(f"measuring bits per byte of {1 + len(others)} languages, before and after")
    texts = {options.language: [block[:EXCERPT] for block in heldout]} | others
    before = kept(out / BEFORE, lambda: _compressions(options.model, texts))
    after = kept(out / "after.json", lambda: _compressions(str(folder), texts))
    changes = [text_change(name, before[name], after[name]) for name in texts]
    bits = {name: vars(change) for name, change in zip(texts, changes, strict=True)}
    write_json(out / "language.json", {"fertility": vars(fertility), "bits_per_byte": bits})
    return LanguageResult(folder, fertility, changes)


def steps_of(options: LanguageOptions) -> int:
    """Return the number of updates of a run."""
    return max(2, math.ceil(options.tokens / STEP_TOKENS))


def divided_text(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return blocks of the text to train on and those held out. Equal blocks are on the same side."""
    train: list[str] = []
    heldout: list[str] = []
    for path in paths:
        for document in read_corpus(path):
            for start in range(0, len(document.text), BLOCK):
                block = document.text[start : start + BLOCK]
                digest = hashlib.blake2b(block.encode(), digest_size=4).digest()
                (heldout if int.from_bytes(digest, "little") % 10 == 0 else train).append(block)
    if not train or not heldout:
        raise DataError(f"{', '.join(paths)}: too little text; give at least {30 * BLOCK:,} characters")
    return train, heldout


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return the mean number of bytes of text in a token."""
    pairs = [(len(text.encode()), len(tokenizer.encode(text))) for text in texts]
    return sum(n_bytes for n_bytes, _ in pairs) / max(1, sum(n for _, n in pairs))


def extend_model(
    options: LanguageOptions, train: Sequence[str], heldout: Sequence[str], out: Path
) -> Fertility:
    """Write ``out/extended``, the model with new tokens, unless it is there. Return the fertility."""
    done = out / FERTILITY
    if done.exists():
        return Fertility(**json.loads(done.read_text(encoding="utf-8")))
    extended, found = _extended(options, train, heldout)
    save_extended(out / "extended", extended, options.model)
    write_json(done, vars(found))
    return found


def _extended(
    options: LanguageOptions, train: Sequence[str], heldout: Sequence[str]
) -> tuple[ExtendedVocabulary, Fertility]:
    """Return the vocabulary extended on the text in ``train``, and its fertility on ``heldout``."""
    tokenizer = load_tokenizer(options.model)
    if tokenizer is None:
        raise DataError(f"{options.model}: has no tokenizer to extend")
    extended = extend_vocabulary(tokenizer, train, options.add)
    n_added = len(extended.pieces)
    if not n_added:
        raise DataError(
            f"{options.language}: the text has no frequent pair of tokens outside ASCII, so no token can be "
            "added; give more text, or tune on it without new tokens: herd tune MODEL --data TEXT"
        )
    before, after = (bytes_per_token(each, heldout) for each in (tokenizer, extended.tokenizer))
    return extended, Fertility(n_added, before, after)


def save_extended(folder: Path, extended: ExtendedVocabulary, base: str) -> None:
    """Write the model ``base`` with rows for the new tokens, each the mean of the rows of its old pieces.

    Plain weights keep their dtype, and blocks are unpacked into fp32. One tensor is in memory at a time.
    """
    source, read = ModelSource(base), weight_reader(base)
    if source.adapter is not None:
        refuse_adapter(source.adapter, "a larger vocabulary")
    dtype = source.stored_dtype
    old = extended.tokenizer.vocab_size - len(extended.pieces)

    def get(name: str) -> Tensor:
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            return read(name, dtype)
        table_VD = read(name, torch.float32)
        rows = [table_VD[torch.tensor(pieces)].mean(0) for pieces in extended.pieces]
        return torch.cat((table_VD[:old], torch.stack(rows))).to(dtype)

    config = source.config.replace(vocab_size=extended.tokenizer.vocab_size)
    lineage = Lineage(name=folder.parent.name, stage="extended", parents={"start": checkpoint_hash(base)})
    write_checkpoint(folder, config, get, extended.tokenizer, dtype=dtype, lineage=lineage)


def _recipe(options: LanguageOptions, added: int) -> str:
    out = Path(options.out).resolve()
    batch = STEP_TOKENS // CONTEXT
    replay = [str(Path(path).resolve()) for path in options.replay] or [str(out / "replay.jsonl")]
    steps = steps_of(options)
    config = load_config(options.model)
    fields = {
        "name": f"language-{options.language}",
        "model": {"start": str(out / "extended")},
        "adapter": {"rank": options.rank, "new_rows": added},
        "data": {
            "kind": "tuning", "paths": [str(out / "train.jsonl")], "heldout_share": 0.02, "replay": replay,
            "replay_share": options.replay_share,
        },
        "objective": {"kind": "sft"},
        "optimizer": {
            "kind": "adamw", "lr": options.lr or default_lr(config, "lora", "sft"),
            "weight_decay": 0.0,
        },
        "schedule": {"kind": "cosine", "warmup_steps": min(max(1, steps // 20), steps - 1), "decay_steps": 0},
        "train": {
            "steps": steps, "batch_size": batch, "micro_batch_size": batch, "context": CONTEXT,
            "dtype": fast_dtype(), "seed": options.seed, "save_every": max(1, min(50, steps // 4)),
            "keep_states": 1, "activation_checkpointing": config.n_params > SMALL,
        },
        "out": str(out / "run"),
    }  # fmt: skip
    return write_yaml(fields)


def _write_rows(path: Path, texts: Iterable[str]) -> None:
    if not path.exists():
        write_atomically(
            path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        )


def _compressions(source: str, texts: dict[str, list[str]]) -> dict[str, dict[str, list[float]]]:
    """Return the bits of each text's documents, of the first text from more bytes than of the others."""
    tokenizer, model = load_tokenizer(source), load_model(source, dtype=torch_dtype(fast_dtype()))
    assert tokenizer is not None
    use_exact_products(model)
    found = {}
    for number, (name, documents) in enumerate(texts.items()):
        limit = OTHER_BYTES if number else HELDOUT_BYTES
        context = min(CONTEXT, model.config.max_context)
        measured = compression(model, from_texts(documents, tokenizer, max_bytes=limit), context)
        found[name] = compression_record(measured)
    return found
