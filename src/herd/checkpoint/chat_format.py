"""Decide whether a checkpoint's dialogs may be written in Llama 3.1's format, and collect its stop tokens.

`text.chat.render` writes Llama 3.1's format. A checkpoint says its own format in two ways: the names of its
special tokens and its Jinja chat template. Both must be Llama 3.1's: the names are compared, and the template
is rendered in a sandbox for a few dialogs and its text compared with our renderer's. Two differences are
accepted, because they do not change how turns are written: Meta's system header with the dates, and a
template without ``<|begin_of_text|>`` (the tokenizer adds it). A checkpoint without a template, such as a
base model, passes with the names alone.

A checkpoint that does not pass still loads, completes text and can be scored, quantized and exported; its
tokenizer carries the reason (`Tokenizer.chat_problem`), and the renderer refuses dialogs with it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, TokenizerError
from ..llama.config import ModelConfig
from .hf import read_json

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_SYSTEM = {"role": "system", "content": "Answer briefly."}
_DIALOG = (
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And 6 times 8?"},
)
_PROBES: tuple[tuple[dict[str, str], ...], ...] = (_DIALOG[:1], _DIALOG, (_SYSTEM, *_DIALOG))
_DATE = "26 Jul 2024"
_DATED_HEAD = f"Cutting Knowledge Date: December 2023\nToday Date: {_DATE}\n\n"
_EMPTY_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
_GENERATION_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers marks an assistant's text with these tags; they print nothing."""
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "penalty_alpha": (0,),
}
"""Settings of ``generation_config.json`` that change answers and are not implemented, with their neutral
values."""


def read_folder_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder's files; None, with a warning, when it has none."""
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        warnings.warn(f"{folder}: has no tokenizer (tokenizer.model or tokenizer.json)", stacklevel=3)
        return None
    from ..text.tokenizer import Tokenizer  # tiktoken, which loading weights does not need

    return with_chat_settings(Tokenizer.from_folder(folder), folder)


def require_vocabulary_fits(tokenizer: Tokenizer, config: ModelConfig, where: Path) -> None:
    """Raise `TokenizerError` when the tokenizer has ids beyond the model's vocabulary."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{where}: tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is "
            f"{config.vocab_size}; they do not belong together"
        )


def with_chat_settings(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Return a folder's tokenizer with its own stop tokens and, if need be, the reason against chat."""
    settings = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
    settings = settings if isinstance(settings, dict) else {}
    template = _named_template(settings.get("chat_template"))
    if (folder / TEMPLATE_FILE).exists():
        template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8", errors="replace")
    stop_ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            data = read_json(folder / name)
            found = data.get("eos_token_id") if isinstance(data, dict) else None
            stop_ids |= _token_ids(found, tokenizer, f"{folder / name}: eos_token_id")
    eos = _token_text(settings.get("eos_token"))
    if eos in tokenizer.special_tokens:
        stop_ids.add(tokenizer.special_tokens[eos])
    words = {key: text for key in settings if key.endswith("_token") and (text := _token_text(settings[key]))}
    return with_template(tokenizer, template, stop_ids, words, folder)


def with_template(
    tokenizer: Tokenizer, template: str | None, stop_ids: set[int], words: Mapping[str, str], where: Path
) -> Tokenizer:
    """Return the tokenizer with more stop tokens and, where ``template`` is not Llama 3.1's, with it and the
    reason.

    ``words`` are the special tokens a template may ask for by role, such as ``bos_token``.
    """
    problem = chat_format_problem(tokenizer, template, words, where)
    return tokenizer.with_settings(
        stop_ids=stop_ids, chat_problem=problem, chat_template=template if problem else None
    )


def chat_format_problem(
    tokenizer: Tokenizer, template: str | None, words: Mapping[str, str], where: Path
) -> str | None:
    """Return why dialogs must not be written in Llama 3.1's format, in one line; None where they may."""
    from ..text.chat import render
    from ..text.tokenizer_json import CHAT_TEMPLATE

    cure = (
        "only Llama 3.1's format can be written, so it cannot chat, learn dialogs or be evaluated as an "
        "instruct model; continue text with it (herd chat --complete, herd eval --mode base) or take a Llama "
        "3.1 model"
    )
    missing = [name for name in _NAMES if name not in tokenizer.special_tokens]
    if missing:
        others = ", ".join(list(tokenizer.special_tokens)[:2])
        return f"{where}: its special tokens ({others}, …) lack Llama 3's {missing[0]}; {cure}"
    if template is None or template == CHAT_TEMPLATE:
        return None
    for probe in _PROBES:
        expected = tokenizer.decode(render(probe, tokenizer, generation_prompt=True).ids)
        try:
            written = _render_template(template, probe, words)
        except Exception as error:  # whatever a stranger's template does wrong
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"{where}: its own chat template cannot be rendered ({reason[:100]}); {cure}"
        if _comparable(written) != _comparable(expected):
            return (
                f"{where}: its own chat template is not Llama 3.1's, it writes a dialog as "
                f"{_excerpt(written, expected)!r}; {cure}"
            )
    return None


def generation_defaults(folder: Path) -> dict[str, float | int]:
    """Return the sampling settings of a folder's ``generation_config.json`` by the names of
    `engine.Sampling`.

    Greedy (temperature 0) without the file or unless it says ``do_sample``; null means the neutral value.
    Warns of settings that change answers and are not followed. Raises `CheckpointError` for values of the
    wrong type.
    """
    path = folder / "generation_config.json"
    data = read_json(path) if path.exists() else {}
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds {type(data).__name__}, not a JSON object; fix or delete it")
    out: dict[str, float | int] = {}
    for name, neutral in _SAMPLING_DEFAULTS.items():
        value = data.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise CheckpointError(f"{path}: {name}={value!r} is not a number; fix or delete it")
        out[name] = neutral if value is None else value
    out["top_k"] = int(out["top_k"])
    if not data.get("do_sample"):
        out |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    ignored = [
        n for n, neutral in _NOT_FOLLOWED.items() if data.get(n) is not None and data[n] not in neutral
    ]
    if ignored:
        warnings.warn(f"{path}: {', '.join(ignored)} cannot be followed and will be ignored", stacklevel=2)
    return out


def _render_template(template: str, messages: tuple[dict[str, str], ...], words: Mapping[str, str]) -> str:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda _: _DATE}
    compiled = environment.from_string(_GENERATION_TAGS.sub("", template))
    known = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"} | dict(words)
    return compiled.render(messages=list(messages), add_generation_prompt=True, **known)


def _comparable(text: str) -> str:
    """Return a rendered dialog without the begin-of-text token and Meta's header with dates."""
    text = text.removeprefix("<|begin_of_text|>").replace(_DATED_HEAD, "")
    return text.replace(_EMPTY_SYSTEM, "")


def _excerpt(written: str, expected: str) -> str:
    """Return 60 characters of a rendered dialog around the place where it leaves Llama 3.1's."""
    same = next((i for i, pair in enumerate(zip(written, expected, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, same - 20)
    return ("…" if start else "") + written[start : start + 60] + ("…" if len(written) > start + 60 else "")


def _named_template(value: Any) -> str | None:
    """Return the default template of ``chat_template``: a text, or a list of named ones."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default", next(iter(named.values()), None))
    return value if isinstance(value, str) else None


def _token_text(value: Any) -> str:
    """Return a special token's text, given as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _token_ids(value: Any, tokenizer: Tokenizer, where: str) -> set[int]:
    """Return token ids given as null, one id or a list; ids the tokenizer does not have are said and left
    out."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id_) is int for id_ in values):
        raise CheckpointError(f"{where}={value!r} is not a token id or a list of them; fix or delete it")
    outside = [id_ for id_ in values if not 0 <= id_ < tokenizer.vocab_size]
    if outside:
        warnings.warn(f"{where}: ignoring {outside}, which are no tokens of its vocabulary", stacklevel=4)
    return set(values) - set(outside)
