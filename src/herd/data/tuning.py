"""Read a user's files for tuning: dialogs, texts and pairs of answers. Unusable rows are set aside.

Training on thousands of rows should not fail because of the seventh, and no row should disappear silently. So
each row becomes an `Example` or a `AnswerPair`, or is set aside with its location and the reason. Rows may
have any of the formats of `read_dialogs.py`, or

- ``{"text"}``, and files of plain text: every token is trained;
- ``{"prompt"?, "chosen", "rejected"}``: a pair for preference tuning, with texts or messages. Without a
  prompt, the common beginning of both is the prompt. ShareGPT's ``{"conversations", "chosen", "rejected"}``
  is read too.

Tokens: ids of a row and a mask of those that are trained.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, HerdError
from ..text import Rendered, Tokenizer
from .read_dialogs import (
    OPTIONS,
    Message,
    ReadDialog,
    dialog_of_row,
    exchange,
    render_dialog,
    sharegpt_messages,
)
from .rows import ROW_ENDINGS, DataRow, read_rows
from .text_files import NotText, decode_blocks, expand_paths, file_ending, list_files, open_bytes

SHOWN = 3
"""Number of rows that an error names. The others are only counted."""
LEAST = 10
"""Fewer rows than these are all trained, and none is held out."""


@dataclass(frozen=True)
class Example:
    """A row to train on: its location, the name of its format, and its tokens."""

    where: str
    format: str
    rendered: Rendered

    @property
    def n_trained(self) -> int:
        """The number of tokens that are trained. The first token of a row is never a target."""
        return sum(self.rendered.mask[1:])


@dataclass(frozen=True)
class AnswerPair:
    """A preference: the same prompt with a chosen and with a rejected answer."""

    where: str
    format: str
    chosen: Rendered
    rejected: Rendered


@dataclass(frozen=True)
class SetAside:
    """A row that is not used, and the reason."""

    where: str
    reason: str


@dataclass
class TuningRows:
    """The contents of the files. ``notes`` are warnings with the number of rows that they apply to."""

    examples: list[Example] = field(default_factory=list)
    pairs: list[AnswerPair] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def formats(self) -> Counter[str]:
        """The number of usable rows of each format."""
        rows: list[Example | AnswerPair] = [*self.examples, *self.pairs]
        return Counter(row.format for row in rows)

    def require_examples(self) -> list[Example]:
        """Return the examples. Raises DataError naming the first rows set aside if there are none."""
        if self.examples:
            return self.examples
        if self.pairs:
            raise DataError(
                f"{self.pairs[0].where}: pairs of answers instead of dialogs; use --objective dpo"
            )
        raise DataError(f"no token is trained: {self._reasons()}")

    def require_pairs(self) -> list[AnswerPair]:
        """Return the pairs. Raises DataError naming the first rows set aside if there are none."""
        if self.pairs:
            return self.pairs
        if self.examples:
            where = self.examples[0].where
            raise DataError(f"{where}: dpo needs pairs: give objects with prompt, chosen and rejected")
        raise DataError(f"no pair to train on: {self._reasons()}")

    def _reasons(self) -> str:
        reasons = reasons_of(self.set_aside)
        more = [f"and {len(reasons) - SHOWN:,} other reasons"] if len(reasons) > SHOWN else []
        return "; ".join([*reasons[:SHOWN], *more]) or "the files are empty"


def reasons_of(rows: Sequence[SetAside]) -> list[str]:
    """Return each reason for which rows are set aside, after the first rows that have it."""
    where: dict[str, list[str]] = {}
    for row in rows:
        where.setdefault(row.reason, []).append(row.where)
    return [
        ", ".join(names[:SHOWN])
        + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
        + f": {reason}"
        for reason, names in where.items()
    ]


def read_tuning(
    paths: Sequence[str | Path], tokenizer: Tokenizer, context: int | None = None, *, mask_ends: bool = False
) -> TuningRows:
    """Read files, folders and patterns. Rows longer than ``context`` + 1 tokens are set aside.

    A text that is longer is divided instead, and both answers of a pair must fit into one row. ``mask_ends``
    leaves the tokens that end an answer untrained in pairs (Llama 3 paper, section 4.1.4). Raises DataError
    for paths that do not exist and files that cannot be read.
    """
    data = TuningRows()
    for path in (path for name in paths for path in expand_paths(name)):
        for file in list_files(path):
            try:
                _add_file(data, file, tokenizer, context, mask_ends)
            except NotText as error:
                if file == path:
                    raise
                data.set_aside.append(_set_aside(str(file), error))
    return data


def _add_file(
    data: TuningRows, file: Path, tokenizer: Tokenizer, context: int | None, mask_ends: bool
) -> None:
    if file_ending(file) not in ROW_ENDINGS:
        with open_bytes(file) as stream:
            text = "".join(decode_blocks(stream, str(file)))
        _add_text(data, text, str(file), tokenizer, context)
        return
    bad: list[tuple[str, str]] = []
    for row in read_rows(file, str(file), bad):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                _add_row(data, row, tokenizer, context, mask_ends)
            except HerdError as error:
                data.set_aside.append(_set_aside(row.where, error))
        data.notes.update({str(warning.message) for warning in caught})
    data.set_aside += [SetAside(where, reason) for where, reason in bad]


def _set_aside(where: str, error: HerdError) -> SetAside:
    return SetAside(where, str(error).removeprefix(where).lstrip(": "))


def split_heldout(examples: Sequence[Any], share: float, most: int) -> tuple[list[Any], list[Any]]:
    """Split examples or pairs, by their tokens, into training data and at most ``most`` to measure on.

    Equal rows are all on the same side. Fewer than `LEAST` rows are all trained.
    """
    wanted = min(most, max(1, round(share * len(examples)))) if share and len(examples) >= LEAST else 0
    keys = [row_key(example) for example in examples]
    held = set(sorted(set(keys))[:wanted])
    train = [example for example, key in zip(examples, keys, strict=True) if key not in held]
    seen: set[bytes] = set()
    heldout = []
    for example, key in zip(examples, keys, strict=True):
        if key in held and key not in seen:
            seen.add(key)
            heldout.append(example)
    return (train, heldout) if train else (list(examples), [])


def row_key(example: Any) -> bytes:
    """Return a hash of the tokens of an example, or of the chosen answer of a pair."""
    rendered = example.rendered if isinstance(example, Example) else example.chosen
    return hashlib.blake2b(json.dumps(rendered.ids).encode(), digest_size=12).digest()


def _add_row(
    data: TuningRows, row: DataRow, tokenizer: Tokenizer, context: int | None, mask_ends: bool
) -> None:
    """Add a row to ``data``. Raises a HerdError with the reason if it cannot be used."""
    fields = row.value if isinstance(row.value, dict) else {}
    fields = {key: value for key, value in fields.items() if value is not None}
    if "chosen" in fields and "rejected" in fields:
        name, chosen, rejected = _pair(fields, row.where, tokenizer, mask_ends)
        for rendered in (chosen, rejected):
            _require_trainable(rendered, None if context is None else context // 2)
        data.pairs.append(AnswerPair(row.where, name, chosen, rejected))
        return
    if isinstance(fields.get("text"), str) and not {"messages", "conversations"} & fields.keys():
        _add_text(data, fields["text"], row.where, tokenizer, context)
        return
    if fields.get("label") is False:
        raise DataError("an answer labelled as bad (label: false)")
    if "completions" in fields:
        raise DataError("steps with labels are for reward models, which are not trained here")
    if "prompt" in fields and not {"completion", "response"} & fields.keys():
        raise DataError("a prompt without an answer; herd synth can write answers")
    ignored: Counter[str] = Counter()
    kind, dialog = dialog_of_row(row, ignored)
    rendered = render_dialog(dialog, tokenizer)
    _require_trainable(rendered, context)
    name = (kind or "messages") + (" with tools" if dialog.options.get("tools") else "")
    data.examples.append(Example(row.where, name, rendered))
    data.notes.update(f"ignored unknown field {name}" for name in ignored if name != "label")


def _require_trainable(rendered: Rendered, context: int | None) -> None:
    if not any(rendered.mask[1:]):
        raise DataError("none of its tokens is trained: no answer of an assistant, or all have weight 0")
    if context is not None and len(rendered.ids) > context + 1:
        raise DataError(f"{len(rendered.ids):,} tokens are more than the context of {context:,}")


def _add_text(data: TuningRows, text: str, where: str, tokenizer: Tokenizer, context: int | None) -> None:
    ids = [*tokenizer.start_ids, *tokenizer.encode(text)]
    ids += [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    if len(ids) < 2 or not text.strip():
        raise NotText(f"{where}: an empty text; give one with words")
    size = context or len(ids)
    for start in range(0, len(ids) - 1, size):
        piece = ids[start : start + size + 1]
        data.examples.append(Example(where, "text", Rendered(piece, [True] * len(piece))))


# Pairs ------------------------------------------------------------------------------------------------------


def _pair(
    fields: Mapping[str, Any], where: str, tokenizer: Tokenizer, mask_ends: bool
) -> tuple[str, Rendered, Rendered]:
    """Return the name of a pair's format and both answers with their prompt, only the answers trained."""
    chosen, rejected, prompt = fields["chosen"], fields["rejected"], fields.get("prompt")
    options = {name: fields[name] for name in OPTIONS if fields.get(name)}
    if "conversations" in fields:
        name, prompt = "ShareGPT pair", sharegpt_messages(list(fields["conversations"]), where)
        chosen, rejected = (sharegpt_messages([answer], where) for answer in (chosen, rejected))
    elif isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return ("text pair, implicit prompt", *_text_pair(chosen, rejected, tokenizer, mask_ends))
        name, prompt = "pair", _prompt(prompt)
        chosen, rejected = ([exchange("", answer)[1]] for answer in (chosen, rejected))
    else:
        chosen, rejected = _messages(chosen, where, "chosen"), _messages(rejected, where, "rejected")
        if prompt is None:
            pairs = zip(chosen, rejected, strict=False)
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
            name, prompt = "pair of messages, implicit prompt", chosen[:same]
            chosen, rejected = chosen[same:], rejected[same:]
        else:
            name, prompt = "pair of messages", _prompt(prompt)
    if not chosen or not rejected:
        raise DataError("chosen and rejected are equal, or one is the beginning of the other")
    rendered = [_answer(prompt, answer, tokenizer, mask_ends, options) for answer in (chosen, rejected)]
    if rendered[0].ids == rendered[1].ids:
        raise DataError("chosen and rejected are equal")
    return name, rendered[0], rendered[1]


def _prompt(prompt: Any) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _answer(
    prompt: Sequence[Message],
    answer: Sequence[Message],
    tokenizer: Tokenizer,
    mask_ends: bool,
    options: Mapping[str, Any],
) -> Rendered:
    history = frozenset(n for n, message in enumerate(prompt) if message.get("role") == "assistant")
    rendered = render_dialog(ReadDialog([*prompt, *answer], dict(options), history, ""), tokenizer)
    return _without_ends(rendered, tokenizer) if mask_ends else rendered


def _text_pair(
    chosen: str, rejected: str, tokenizer: Tokenizer, mask_ends: bool
) -> tuple[Rendered, Rendered]:
    """Return two plain texts with their common beginning as the prompt, in tokens."""
    ends = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    ids = [[*tokenizer.start_ids, *tokenizer.encode(text), *ends] for text in (chosen, rejected)]
    same = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    out = [Rendered(each, [place >= same for place in range(len(each))]) for each in ids]
    first, second = (_without_ends(each, tokenizer) if mask_ends else each for each in out)
    return first, second


def _without_ends(rendered: Rendered, tokenizer: Tokenizer) -> Rendered:
    ends = tokenizer.stop_ids | {tokenizer.eos_id}
    mask = [trained and id_ not in ends for id_, trained in zip(rendered.ids, rendered.mask, strict=True)]
    return replace(rendered, mask=mask)


def _messages(value: Any, where: str, name: str) -> list[Message]:
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{name} is {type(value).__name__}; give a text or a list of messages")
    return sharegpt_messages(value, where) if any("from" in message for message in value) else value
