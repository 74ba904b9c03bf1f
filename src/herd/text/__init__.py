"""Text in and out: the tokenizer (load, train), the one renderer of dialogs, the parser of tool calls. No torch."""

from .chat import CHAT_TEMPLATE, Rendered, render, render_document
from .tokenizer import StreamDecoder, Tokenizer

__all__ = ["CHAT_TEMPLATE", "Rendered", "StreamDecoder", "Tokenizer", "render", "render_document"]
