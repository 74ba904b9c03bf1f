"""Text and tokens: the tokenizer, the renderer of dialogs, the parser of tool calls, fenced code. No torch."""

from .chat import Rendered, call_text, render, tool_output
from .tokenizer import StreamDecoder, Tokenizer
from .tokenizer_json import CHAT_TEMPLATE
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
    "tool_output",
]
