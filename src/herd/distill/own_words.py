"""Let the teacher write the text that its student is distilled on.

An instruct model's training data are rarely at hand, and its own answers lie where its predictions matter. A
model with a chat format first writes a user's message, as it continues the beginning of a user's turn
(Magpie, arXiv 2406.08464), and then answers it. Other models continue the empty text. Both are sampled at
temperature 1.

Texts are written in files of a fixed number of dialogs, so an interrupted run continues with the next file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..engine import Engine, Request, Sampling
from ..errors import DataError
from ..files import write_atomically
from ..llama.model import LlamaLM
from ..text import ChatFormat, Tokenizer

AT_ONCE = 32
"""Texts that are written together, and in one file."""
ASKED, ANSWERED = 128, 384
"""Most tokens of a user's message and of an answer."""
EMPTY_FILES = 5
"""Files in a row without a usable text after which a teacher is given up."""


def write_own_text(
    teacher: Callable[[], LlamaLM], tokenizer: Tokenizer, folder: Path, n_tokens: int, seed: int,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> None:  # fmt: skip
    """Write at least ``n_tokens`` tokens of the teacher's own to ``folder``, in files ``*.jsonl``.

    The files are dialogs for a tokenizer with a chat format, and rows with a ``text`` otherwise. ``teacher``
    is called only if there is something to write. Raises `DataError` if it writes nothing that can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = number = empty = 0
    engine = None
    while total < n_tokens:
        path = folder / f"{number:05d}.jsonl"
        if not path.exists():
            engine = engine or Engine(teacher(), tokenizer, max_batch=AT_ONCE)
            rows = list(_rows(engine, tokenizer, seed + number))
            empty = 0 if rows else empty + 1
            if empty == EMPTY_FILES:
                raise DataError(f"{folder}: the teacher writes nothing that can be used: give --text")
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a text may have other line ends
        total += sum(_length(json.loads(line), tokenizer) for line in lines)
        number += 1
        on_tokens(total)


def _rows(engine: Engine, tokenizer: Tokenizer, seed: int) -> Iterator[dict[str, object]]:
    """Yield the texts of one file."""
    if tokenizer.chat is None:
        for text in _sampled(engine, [tokenizer.prefix_ids] * AT_ONCE, ANSWERED, seed):
            if text.strip():
                yield {"text": text}
        return
    opening = user_opening(tokenizer.chat)
    asked = [text.strip() for text in _sampled(engine, [opening] * AT_ONCE, ASKED, seed)]
    prompts, dialogs = [], []
    for text in asked:
        dialog = [{"role": "user", "content": text}]
        ids = list(tokenizer.chat.render(dialog, generation_prompt=True).ids)
        if text and len(ids) < engine.context // 2:  # a special token spelled out takes many ids
            prompts.append(ids)
            dialogs.append(dialog)
    for dialog, answer in zip(dialogs, _sampled(engine, prompts, ANSWERED, seed), strict=True):
        if answer.strip():
            dialog.append({"role": "assistant", "content": answer.strip()})
            yield {"messages": dialog}


def _length(row: dict[str, Any], tokenizer: Tokenizer) -> int:
    if "text" in row:
        return len(tokenizer.encode(row["text"]))
    return len(tokenizer.require_chat().render(row["messages"]).ids)


def _sampled(engine: Engine, prompts: list[list[int]], n_tokens: int, seed: int) -> list[str]:
    requests = [
        Request(prompt, Sampling(max_tokens=n_tokens, temperature=1.0, seed=1000 * seed + number))
        for number, prompt in enumerate(prompts)
    ]
    return [done.text for done in engine.run(requests)]


def user_opening(chat: ChatFormat) -> list[int]:
    """Return the ids before a user's first message: what two dialogs with different messages begin with."""
    one, other = (chat.render([{"role": "user", "content": text}]).ids for text in ("A", "Q"))
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
