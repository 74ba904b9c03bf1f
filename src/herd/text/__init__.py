"""Text in and out: the tokenizer (load, train), the one renderer of dialogs, the parser of tool calls. No torch."""

from .chat import CHAT_TEMPLATE, Rendered, call_text, render, render_document, tool_output
from .tokenizer import StreamDecoder, Tokenizer
from .toolcall import Call, Content, Malformed, Parsed, ToolCall, ToolCallParser, parse

__all__ = [
    "CHAT_TEMPLATE",
    "Call",
    "Content",
    "Malformed",
    "Parsed",
    "Rendered",
    "StreamDecoder",
    "Tokenizer",
    "ToolCall",
    "ToolCallParser",
    "call_text",
    "parse",
    "render",
    "render_document",
    "tool_output",
]
