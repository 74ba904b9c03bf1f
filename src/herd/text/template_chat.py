"""Dialogs in a checkpoint's own format: its Jinja chat template, rendered in a sandbox, with a loss mask.

The ids are those of transformers' `apply_chat_template`, with one exception: **text in a message never becomes a
control token**. A string of the dialog that spells a control token gets an unused character inserted into the
spelling before the template sees it; the rendered text is then cut at the control tokens that are left, which only
the template can have written, and each piece is encoded as plain text without the inserted characters.

The loss mask marks what the assistant writes. It comes from rendering prefixes: the dialog up to an assistant's
message with the generation prompt, and with the message. The text between is the assistant's, up to its stop token. A
template that changes earlier messages later (such as one that removes past reasoning) gives no prefix for those
messages; they are not trained, and a warning says so.

Source: transformers ``utils/chat_template_utils.py`` (the sandbox's settings, filters and globals).
"""

from __future__ import annotations

import bisect
import datetime
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ChatError
from .library_tokenizer import LibraryTokenizer

MAX_RENDERED = 20_000_000
"""Characters of a rendered dialog: a template that writes more is broken or hostile."""
_CALL_ID = "call{:05d}"  # nine letters and digits: what Mistral's templates insist on


class _Generation(Extension):
    """Accept ``{% generation %}``, with which templates mark an assistant's text; the mask comes from prefixes here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template. Raises `ChatError` if the text is no template.

    ``special_tokens`` are the names that templates may use, such as ``bos_token``.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        self.text = text
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": self._strftime_now}
        self._date: datetime.date | None = None
        try:
            self._template = environment.from_string(text)
        except (TemplateError, RecursionError) as error:
            raise ChatError(f"the chat template is not valid: {_first_line(error)}") from error
        self.supports_tools = re.search(r"\btools\b", text) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = False,
        date: str | datetime.date | None = None,
    ) -> str:
        """Return the dialog as text. Raises `ChatError` with the template's own message for what it refuses."""
        self._date = date if isinstance(date, datetime.date) else None
        more = {} if date is None else {"date_string": self._strftime_now("%d %b %Y") if self._date else date}
        try:
            out = []
            size = 0
            for piece in self._template.generate(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
                **more,
            ):
                out.append(piece)
                size += len(piece)
                if size > MAX_RENDERED:
                    raise ChatError(f"the chat template writes more than {MAX_RENDERED:,} characters")
            return "".join(out)
        except ChatError:
            raise
        except Exception as error:  # a stranger's program: whatever it does wrong is an error of the input
            raise ChatError(f"the chat template refuses this dialog: {_first_line(error)}") from error

    def _strftime_now(self, format: str) -> str:
        return (self._date or datetime.datetime.now()).strftime(format)


class Marked:
    """A dialog's strings with an unused character inserted into everything that spells a control token.

    ``dialog`` is the marked copy; `clean` removes the marks again.
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


def encode_rendered(text: str, marked: Marked, tokenizer: LibraryTokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of a rendered dialog, and for each where it starts in the text without marks.

    Control tokens in ``text`` are the template's and become ids; marked spellings become plain text.
    """
    if not marked.any:
        return tokenizer.encode_with_special(text)
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    control = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    ids: list[int] = []
    starts: list[int] = []
    place = 0
    for number, piece in enumerate(control.split(text)):
        if number % 2:
            ids.append(tokenizer.special_tokens[piece])
            starts.append(place)
            place += len(piece)
        elif plain := marked.clean(piece):
            found, where = tokenizer.encode_with_offsets(plain, continued=number > 0)
            ids += found
            starts += [place + start for start in where]
            place += len(plain)
    return ids, starts


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
            f"the chat template writes {len(unstable)} earlier assistant messages differently in a longer dialog; "
            "they are not trained",
            stacklevel=3,
        )


def trained_tokens(
    starts: Sequence[int], ids: Sequence[int], span: tuple[int, int], stop_ids: frozenset[int]
) -> range:
    """Return the positions of the tokens within ``span`` of the text, up to the first stop token and with it."""
    first, last = bisect.bisect_left(starts, span[0]), bisect.bisect_left(starts, span[1])
    end = next((place + 1 for place in range(first, last) if ids[place] in stop_ids), last)
    return range(first, end)


def _tojson(value: Any, **more: Any) -> str:
    """Write JSON as transformers does, without escapes for HTML."""
    return json.dumps(value, **({"ensure_ascii": False} | more))


def _raise(message: str) -> None:
    raise TemplateError(message)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
