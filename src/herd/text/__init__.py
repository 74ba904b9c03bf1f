"""Text and tokens: tokenizers, chat formats, the parser of answers and tool calls, fenced code. No torch."""

from .answers import AnswerParser
from .chat_format import ChatFormat, Rendered, render
from .llama3_chat import tool_output
from .tokenizer import StreamDecoder, Tokenizer
from .tokenizer_files import register
from .tokenizer_json import CHAT_TEMPLATE
from .toolcall import Call, Content, Malformed, Parsed, Reasoning, ToolCall, ToolCallParser, parse

register()

__all__ = [
    "CHAT_TEMPLATE", "AnswerParser", "Call", "ChatFormat", "Content", "Malformed", "Parsed", "Reasoning",
    "Rendered", "StreamDecoder", "Tokenizer", "ToolCall", "ToolCallParser", "parse", "render", "tool_output",
]  # fmt: skip
