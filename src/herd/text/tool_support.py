"""Replace a chat template without tools by one with tools, so that a model can be taught to call them.

Many small ChatML models (SmolLM2 among them) were published with a template that writes messages only. Their
dialogs with tools get a template of their own, in the style of Hermes: schemas in the system message, and
calls as JSON between ``<tool_call>`` tags, which most programs parse. Dialogs without tools are written as
before.
"""

from __future__ import annotations

from importlib.resources import files

from ..errors import ChatError
from .tokenizer import Tokenizer


def with_tool_support(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer, or a copy with a template for tools if its own has no place for them.

    Raises `ChatError` for a template of another kind than ChatML.
    """
    if tokenizer.require_chat().supports_tools:
        return tokenizer
    if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys():
        raise ChatError(
            f"{tokenizer.where}: its chat template has no place for tools and is not ChatML; "
            "give the model a template with tools (tokenizer_config.json)"
        )
    template = files(__package__).joinpath("chatml_tools.jinja").read_text(encoding="utf-8")
    return tokenizer.with_settings(chat_template=tokenizer.chat_template, tool_template=template)
