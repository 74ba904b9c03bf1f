"""Dialogs in a checkpoint's own format: its Jinja chat template, rendered in a sandbox, with a loss mask.

The ids are those of transformers' `apply_chat_template`, with one exception: **text in a message never
becomes a control token**. A string of the dialog that spells a control token gets an unused character
inserted into the spelling before the template sees it. The rendered text is then cut at the control tokens
that are left, which only the template can have written, and each piece is encoded as plain text without the
inserted characters.

The loss mask marks what the assistant writes. It comes from rendering prefixes: the dialog up to an
assistant's message with the generation prompt, and with the message. The text between is the assistant's, up
to its stop token. A template that changes earlier messages later (such as one that removes past reasoning)
gives no prefix for those messages. They are not trained, and a warning says so.
"""

from __future__ import annotations

import bisect
import datetime
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ChatError
from .answers import THINK, THINK_END, AnswerParser
from .chat_format import Rendered, Span, Tools
from .chat_template import ChatTemplate
from .messages import CheckedMessage, checked_messages, tool_schema

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_CALL_ID = "call{:05d}"  # nine letters and digits: what Mistral's templates insist on
_CALL_STYLES = (("mistral", "[TOOL_CALLS]"), ("hermes", "<tool_call>"), ("json", ""))
"""How a template writes calls, by a text that it then contains."""
_QUESTION, _ANSWER = "What is the question?", "This is the answer."


class TemplateChat:
    """The format of a checkpoint's own template. Raises `ChatError` if it cannot be rendered."""

    name = "template"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer.chat_template or "", tokenizer.token_names)
        self._with_tools = self._template
        if tokenizer.tool_template is not None:
            self._with_tools = ChatTemplate(tokenizer.tool_template, tokenizer.token_names)
        self.supports_tools = self._with_tools.supports_tools
        texts = self._template.text + self._with_tools.text
        style = next(name for name, part in _CALL_STYLES if part in texts)
        self.tool_call_formats = (style,) if self.supports_tools else ()
        self._wants_short_ids = re.search(r"length\s*!=\s*9", texts) is not None
        self._reasons = THINK in texts or THINK_END in texts
        self._prompt = self._probe([{"role": "user", "content": _QUESTION}], generation_prompt=True)

    def _probe(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self.text(messages, **options)
        except ChatError:
            if not self.supports_tools:
                raise
            tool = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}
            # some templates are for dialogs with tools only
            return self.text(messages, tools=[tool], **options)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The control token with which the template ends an answer."""
        dialog = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        try:
            rest = self._probe(dialog).rpartition(_ANSWER)[2].lstrip()
        except ChatError:
            return frozenset()
        special = self._tokenizer.special_tokens
        return frozenset(id_ for name, id_ in special.items() if rest.startswith(name))

    def parser(self, *, tools: bool | Collection[str] = False) -> AnswerParser:
        """See `ChatFormat.parser`."""
        opened = self._prompt.rstrip().endswith(THINK)
        space = self._tokenizer.adds_space
        return AnswerParser(tools=tools, reasoning=self._reasons, opened=opened, drops_space=space)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Tools | None = None,
        tool_call_format: str | None = None,
        generation_prompt: bool = False,
        date: str | datetime.date | None = None,
    ) -> Rendered:
        """Return a dialog's token ids and, without ``generation_prompt``, its loss mask."""
        if tool_call_format not in (None, *self.tool_call_formats):
            own = f"only {self.tool_call_formats[0]}" if self.tool_call_formats else "no calls"
            raise ChatError(
                f"tool_call_format={tool_call_format!r}: the checkpoint's template writes {own}; leave it out"
            )
        dialog = {"messages": self._shaped(messages), "tools": self._tools(tools)}
        marked = Marked(dialog, list(self._tokenizer.special_tokens))
        template = self._with_tools if tools else self._template
        more = {"tools": marked.dialog["tools"], "date": date}
        whole = template.render(marked.dialog["messages"], generation_prompt=generation_prompt, **more)
        # Control tokens that are left in the text are the template's. Marked spellings become plain text.
        clean = marked.clean if marked.any else None
        ids, starts = self._tokenizer.encode_with_special(whole, clean)
        rendered = Rendered(ids, [False] * len(ids))
        if generation_prompt:
            return rendered
        stop_ids = self._tokenizer.stop_ids
        for number, start, end in assistant_spans(template, marked.dialog["messages"], whole, **more):
            span = (len(marked.clean(whole[:start])), len(marked.clean(whole[:end])))
            trained = trained_tokens(starts, ids, span, stop_ids)
            rendered.mask[trained.start : trained.stop] = [True] * len(trained)
            rendered.spans.append(Span("assistant", trained.start, trained.stop, number))
        return rendered

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Tools | None = None,
        generation_prompt: bool = False,
        date: str | datetime.date | None = None,
    ) -> str:
        """Return a dialog as the template writes it, for looking at it."""
        template = self._with_tools if tools else self._template
        return template.render(
            self._shaped(messages), tools=self._tools(tools), generation_prompt=generation_prompt, date=date
        )

    def _tools(self, tools: Tools | None) -> list[dict[str, Any]] | None:
        if not tools:
            return None
        if not self.supports_tools:
            note = "the checkpoint's chat template has no place for tools: the model will not see them"
            warnings.warn(note, stacklevel=4)
            return None
        if isinstance(tools, (str, Mapping)):
            raise ChatError(f"tools must be a list of schemas, not {type(tools).__name__}")
        out = []
        for number, tool in enumerate(tools):
            name, schema = tool_schema(tool, f"tools[{number}]")
            if schema is None:
                raise ChatError(f"tools[{number}]: {name!r} is a name; the chat template needs its schema")
            complete = dict(tool) if isinstance(tool, Mapping) and "function" in tool else None
            out.append(complete or {"type": "function", "function": schema})
        return out

    def _shaped(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages in OpenAI's shape, with an id on every call and result, as templates expect."""
        out: list[dict[str, Any]] = []
        waiting: list[dict[str, Any]] = []  # calls whose results are still to come
        new_ids: dict[str, str] = {}
        for message in checked_messages(messages):
            shaped = dict(message.original or {}) | {"role": message.role, "content": message.content}
            shaped.pop("weight", None)
            if message.role == "assistant":
                if message.calls and (message.original or {}).get("content", ...) is None:
                    shaped["content"] = None  # templates tell a call from an answer by this
                shaped.pop("tool_calls", None)
                if message.calls:
                    waiting = self._shaped_calls(message, new_ids)
                    shaped["tool_calls"] = list(waiting)
            elif message.role == "tool":
                given = shaped.get("tool_call_id")
                call = next((c for c in waiting if c["id"] == new_ids.get(str(given), given)), None)
                call = call or (waiting[0] if waiting and given is None else None)
                if call is not None:
                    waiting = [other for other in waiting if other is not call]
                    shaped["tool_call_id"] = call["id"]
                    shaped.setdefault("name", call["function"]["name"])
            out.append(shaped)
        return out

    def _shaped_calls(self, message: CheckedMessage, new_ids: dict[str, str]) -> list[dict[str, Any]]:
        calls = []
        for call in message.calls:
            id_ = call.id
            if id_ is None or (self._wants_short_ids and not re.fullmatch(r"[A-Za-z0-9]{9}", id_)):
                number = len(new_ids)
                id_ = new_ids.setdefault(id_ or f"call {number}", _CALL_ID.format(number))
            function = {"name": call.name, "arguments": call.arguments}
            calls.append({"id": id_, "type": "function", "function": function})
        return calls


class Marked:
    """A dialog's strings with an unused character inserted into everything that spells a control token.

    ``dialog`` is the marked copy. `clean` removes the marks again.
    """

    def __init__(self, dialog: Any, control_tokens: Sequence[str]) -> None:
        text = json.dumps(dialog, ensure_ascii=False, default=str)
        self.mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        tokens = sorted((token for token in control_tokens if len(token) > 1), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=1)
        self.any = False
        self.dialog = self._marked(dialog)

    def clean(self, text: str) -> str:
        return text.replace(self.mark, "")

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._marked_text(value)
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._marked(item) for item in value]
        return value

    def _marked_text(self, text: str) -> str:
        if self._spelled is None:
            return text
        out = self._spelled.sub(lambda match: match[0][0] + self.mark + match[0][1:], text)
        # the end of one text and the beginning of the next must not spell a token together
        tail = text[-self._longest + 1 :] if self._longest > 1 else ""
        if any(tail[start:] in self._beginnings for start in range(len(tail))):
            out += self.mark
        self.any = self.any or out != text
        return out


def assistant_spans(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], whole: str, **more: Any
) -> Iterator[tuple[int, int, int]]:
    """Yield (message, start, end) of what each assistant's message adds to the rendered dialog ``whole``."""
    unstable = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            earlier = template.render(messages[:number], **more)
            before = template.render(messages[:number], generation_prompt=True, **more)
            after = template.render(messages[: number + 1], **more)
        except ChatError:
            unstable.append(number)
            continue
        # A prompt that opens a reasoning span, which the history leaves out, agrees up to that span only.
        pairs = enumerate(zip(before, after, strict=False))
        start = next((place for place, (a, b) in pairs if a != b), len(before))
        stable = whole.startswith(after) and after.startswith(earlier)
        if stable and (start == len(before) or start > len(earlier)):
            yield number, start, len(after)
        else:
            unstable.append(number)
    if unstable:
        warnings.warn(
            f"the chat template writes {len(unstable)} earlier assistant messages differently in a longer "
            "dialog; they are not trained",
            stacklevel=3,
        )


def trained_tokens(
    starts: Sequence[int], ids: Sequence[int], span: tuple[int, int], stop_ids: frozenset[int]
) -> range:
    """Return the positions of the tokens within ``span``, up to and including the first stop token."""
    first, last = bisect.bisect_left(starts, span[0]), bisect.bisect_left(starts, span[1])
    end = next((place + 1 for place in range(first, last) if ids[place] in stop_ids), last)
    return range(first, end)
