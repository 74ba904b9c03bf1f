"""Read dialogs in all common formats as chat messages, for training, tuning and evaluation.

A file has one dialog per row (JSON lines, a JSON array, CSV or Parquet, compressed or not), in one of these
formats:

- ``{"messages": [{"role", "content", "tool_calls"?, "weight"?}], "system"?, "tools"?, "date"?,
  "tool_call_format"?}``, the format of OpenAI and of chat templates; a bare list of such messages too;
- ShareGPT: ``{"conversations": [{"from": "human", "value": ...}], "system"?, "tools"?}``;
- Alpaca: ``{"instruction", "input"?, "output", "system"?, "history"?}``;
- ``{"prompt", "completion"}`` (or ``response``), as texts or as lists of messages.

An answer with ``"weight": 0`` is read but not trained. Unknown fields are ignored with one warning that names
them. A conversion from another format is reported in a warning too.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ChatError, DataError, TokenizerError
from ..text import Rendered, Tokenizer
from .rows import DataRow, read_rows
from .text_files import DataWarning, expand_paths

Message = dict[str, Any]

OPTIONS = ("tools", "tool_call_format", "date")
MESSAGE_FIELDS = {"role", "content", "tool_calls", "tool_call_id", "name", "weight"}
NO_TEMPLATE = (
    'give rows of {"text": …} instead, start from the instruct version of the model, or put its template '
    "into its folder as chat_template.jinja"
)
"""What to do about a model whose dialogs cannot be written."""
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip


@dataclass(frozen=True)
class ReadDialog:
    """A dialog of a file: its chat messages, options for the renderer, and messages that are not trained.

    ``untrained`` are indices of messages, and ``where`` is the line or row for error messages.
    """

    messages: list[Message]
    options: dict[str, Any]
    untrained: frozenset[int]
    where: str


def read_dialogs(path: Path | str) -> Iterator[ReadDialog]:
    """Yield the dialogs of a file. Raises DataError for a line that is not a dialog and a file without any.

    A dialog whose answers all have weight 0 is left out, with a counted warning.
    """
    ignored: Counter[str] = Counter()
    converted: Counter[str] = Counter()
    n_weightless = 0
    for file in expand_paths(path):
        if file.is_dir():
            raise DataError(f"{file}: is a folder; give a file of dialogs, e.g. {file}/dialogs.jsonl")
        for row in read_rows(file, str(file)):
            kind, dialog = dialog_of_row(row, ignored)
            converted[kind] += 1
            if _answers(dialog.messages) <= dialog.untrained and dialog.untrained:
                n_weightless += 1
                continue
            yield dialog
    for kind, n in converted.items():
        if kind:
            warnings.warn(f"{path}: converted {n} dialogs from {kind}", DataWarning, stacklevel=2)
    if n_weightless:
        note = f"{path}: left out {n_weightless} dialogs whose answers all have weight 0"
        warnings.warn(note, DataWarning, stacklevel=2)
    if ignored:
        names = ", ".join(f"{name} ({n} times)" for name, n in sorted(ignored.items()))
        note = f"{path}: ignored unknown fields: {names}"
        warnings.warn(note, DataWarning, stacklevel=2)


def rendered_dialogs(path: Path | str, tokenizer: Tokenizer) -> Iterator[Rendered]:
    """Yield the dialogs of a file as ids and a mask of trained tokens. Raises DataError for a bad line.

    A dialog without any answer is left out, with a counted warning.
    """
    n_unanswered = 0
    for dialog in read_dialogs(path):
        rendered = render_dialog(dialog, tokenizer)
        if _answers(dialog.messages):
            yield rendered
        else:
            n_unanswered += 1
    if n_unanswered:
        warnings.warn(f"{path}: left out {n_unanswered} dialogs without an answer", DataWarning, stacklevel=2)


def render_dialog(dialog: ReadDialog, tokenizer: Tokenizer) -> Rendered:
    """Return a dialog as ids and a mask of trained tokens.

    Raises DataError if it cannot be rendered, and `ChatError` for a model without a chat template.
    """
    chat = tokenizer.require_chat(NO_TEMPLATE)
    try:
        rendered = chat.render(dialog.messages, **dialog.options)
    except (ChatError, TokenizerError, TypeError) as error:
        raise DataError(f"{dialog.where}: not a dialog: {error}") from error
    mask = list(rendered.mask)
    for span in rendered.spans:
        if span.message in dialog.untrained:
            mask[span.start : span.end] = [False] * (span.end - span.start)
    return replace(rendered, mask=mask)


def dialog_of_row(row: DataRow, ignored: Counter[str]) -> tuple[str, ReadDialog]:
    """Return the name of the row's format ("" for chat messages) and its dialog. Count ignored fields."""
    fields = {"messages": row.value} if isinstance(row.value, list) else row.value
    if not isinstance(fields, dict):
        raise DataError(f"{row.where}: {type(fields).__name__} instead of an object with messages")
    fields = {key: value for key, value in fields.items() if value is not None}
    used, kind, messages = _messages(fields, row.where)
    options = {name: fields[name] for name in OPTIONS if fields.get(name)}
    if "tools" in options:
        options["tools"] = _parsed_json(options["tools"], f"{row.where}: tools")
    untrained = set()
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            at = f"{row.where}: messages[{number}]"
            raise DataError(f"{at} is {type(message).__name__}; give objects with role and content")
        if _weight(message, f"{row.where}: messages[{number}]") == 0:
            untrained.add(number)
        unknown = [key for key, value in message.items() if value is not None and key not in MESSAGE_FIELDS]
        ignored.update(f"messages.{key}" for key in unknown)
    if _weight(fields, row.where) == 0:
        untrained |= _answers(messages)
    ignored.update(str(key) for key in fields.keys() - used - {*OPTIONS, "weight", "provenance"})
    return kind, ReadDialog(messages, options, frozenset(untrained), row.where)


def _messages(fields: Mapping[str, Any], where: str) -> tuple[set[str], str, list[Message]]:
    """Return the fields of the dialog, the name of their format, and the dialog's messages."""
    for key in ("messages", "conversations", "conversation"):
        if key in fields:
            turns = _list(fields[key], f"{where}: {key}")
            system = _system(fields.get("system"))
            if any(isinstance(turn, dict) and {"from", "value"} & turn.keys() for turn in turns):
                return {key, "system"}, "ShareGPT", system + sharegpt_messages(turns, where)
            if system and turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":
                return {key}, "", turns
            return {key, "system"}, "", system + turns
    if "instruction" in fields and "output" in fields:
        question = "\n\n".join(str(fields[key]) for key in ("instruction", "input") if fields.get(key))
        turns = [*fields.get("history", ()), (question, fields["output"])]
        try:
            pairs = [exchange(str(asked), str(answer)) for asked, answer in turns]
        except (TypeError, ValueError):
            raise DataError(f"{where}: history is not a list of [question, answer]") from None
        known = {"instruction", "input", "output", "system", "history"}
        return known, "Alpaca", _system(fields.get("system")) + [m for pair in pairs for m in pair]
    answer = next((key for key in ("completion", "response") if key in fields), None)
    if "prompt" in fields and answer is not None:
        asked, said = fields["prompt"], fields[answer]
        if isinstance(asked, list) and isinstance(said, list):
            history = [m | {"weight": 0} if isinstance(m, dict) else m for m in asked]
            return {"prompt", answer}, "prompt and completion", history + said
        system = _system(fields.get("system"))
        messages = system + exchange(str(asked), str(said))
        return {"prompt", answer, "system"}, "prompt and completion", messages
    if "chosen" in fields and "rejected" in fields:
        raise DataError(f"{where}: a pair of preferences, not a dialog; give an object with messages")
    raise DataError(
        f"{where}: no dialog among {sorted(map(str, fields))[:8]}; give an object with messages, "
        "conversations, instruction and output, or prompt and completion"
    )


def sharegpt_messages(turns: list[Any], where: str) -> list[Message]:
    """Return the messages of ShareGPT's turns. Raises DataError naming the first invalid turn."""
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        at = f"{where}: conversations[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{at} is {type(turn).__name__}; give objects with from and value")
        rest = dict(turn)
        who, said = rest.pop("from", rest.pop("role", None)), rest.pop("value", rest.pop("content", ...))
        role = SHAREGPT_ROLES.get(str(who).lower())
        if role is None:
            raise DataError(f"{at}: from={who!r}; use one of {', '.join(SHAREGPT_ROLES)}")
        if said is ...:
            raise DataError(f"{at}: has no value")
        if role == "function_call":
            calls = _parsed_json(said, at)
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls, **rest})
        else:
            messages.append({"role": role, "content": said, **rest})
    return messages


def _system(text: Any) -> list[Message]:
    return [{"role": "system", "content": str(text)}] if text else []


def exchange(question: str, answer: str) -> list[Message]:
    """Return a question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _answers(messages: list[Message]) -> set[int]:
    return {number for number, message in enumerate(messages) if message.get("role") == "assistant"}


def _weight(fields: Mapping[str, Any], where: str) -> int:
    weight = fields.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"{where}: weight {weight!r} is neither 0 (not trained) nor 1 (trained)")
    return int(weight)


def _list(value: Any, where: str) -> list[Any]:
    value = _parsed_json(value, where)
    if not isinstance(value, list):
        raise DataError(f"{where} is {type(value).__name__}; give a list of messages")
    return value


def _parsed_json(text: Any, where: str) -> Any:
    """Return the value of a field that may be JSON text (a cell of a CSV, ShareGPT's calls)."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
