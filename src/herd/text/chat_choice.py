"""Choose how a tokenizer's dialogs are written.

A checkpoint says its format in two ways: the names of its special tokens and its Jinja chat template. Where
both are Llama 3.1's, the exact renderer is used (`Llama3Chat`): the template is rendered for a few dialogs
and its text compared with the renderer's. Two differences are accepted, because they do not change how turns
are written: Meta's system header with the dates, and a template without ``<|begin_of_text|>`` (the tokenizer
adds it). A checkpoint with Llama 3's names and without a template, such as a base model, has Llama 3.1's
format as well.

Every other template is rendered as it is (`TemplateChat`). Without one, or with an invalid one, there are
no dialogs. Such a checkpoint still completes text and can be scored, quantized and exported.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, cast

from ..errors import ChatError
from .chat_format import ChatFormat
from .tokenizer_json import CHAT_TEMPLATE

if TYPE_CHECKING:
    from .ranks_tokenizer import RanksTokenizer
    from .tokenizer import Tokenizer

_SYSTEM = {"role": "system", "content": "Answer briefly."}
_DIALOG = (
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And 6 times 8?"},
)
_PROBES: tuple[tuple[dict[str, str], ...], ...] = (_DIALOG[:1], _DIALOG, (_SYSTEM, *_DIALOG))
_DATE = datetime.date(2024, 7, 26)
_DATED_HEAD = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_EMPTY_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"


def choose_chat_format(tokenizer: Tokenizer) -> tuple[ChatFormat | None, str | None]:
    """Return the tokenizer's chat format, or None and the reason in one line."""
    from .llama3_chat import Llama3Chat
    from .template_chat import TemplateChat

    text = tokenizer.chat_template
    exact: ChatFormat | None = None
    if hasattr(tokenizer, "ranks"):
        exact = Llama3Chat(cast("RanksTokenizer", tokenizer))
    if exact is not None and text in (None, CHAT_TEMPLATE):
        return exact, None
    if text is None:
        return None, f"{tokenizer.where}: has no chat template, so dialogs cannot be written"
    try:
        chat = TemplateChat(tokenizer)
        return (exact if exact is not None and _same(chat, exact, tokenizer) else chat), None
    except ChatError as error:
        return None, f"{tokenizer.where}: {error}"


def _same(chat: Any, exact: ChatFormat, tokenizer: Tokenizer) -> bool:
    """Return whether the template writes Llama 3.1's format."""
    for probe in _PROBES:
        try:
            written = chat.text(probe, generation_prompt=True, date=_DATE)
        except ChatError:
            return False
        expected = tokenizer.decode(exact.render(probe, generation_prompt=True).ids)
        if _comparable(written) != _comparable(expected):
            return False
    return True


def _comparable(text: str) -> str:
    """Return a rendered dialog without the begin-of-text token and Meta's header with dates."""
    text = text.removeprefix("<|begin_of_text|>").replace(_DATED_HEAD, "")
    return text.replace(_EMPTY_SYSTEM, "")
