"""A checkpoint's Jinja chat template, rendered in a sandbox with limits of time and memory.

A template is a stranger's program. Jinja's sandbox keeps it from Python's internals. Here it is also kept
from running forever and from building huge values. Every turn of a loop and every call of a macro looks at
the clock (the thread's CPU time). The operators, filters and methods that can make a large value from small
ones estimate its size first.

Source: transformers ``utils/chat_template_utils.py`` (the sandbox's settings, filters and globals).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..errors import ChatError

MAX_RENDERED = 20_000_000
"""Characters of a rendered dialog or of one value: a template that writes more is broken or hostile."""
MAX_ALLOCATED = 20 * MAX_RENDERED
"""Characters of all values that are built on the way."""
MAX_SECONDS = 3.0
MAX_TEMPLATE = 1_000_000
MAX_NUMBER = 10_000
"""The largest number that a filter or method is given, such as a width."""
_WIDTH = re.compile(r"%[-+ #0]*(?:\*|[0-9.]{5})|\{[^{}]*[0-9]{5}")


class ChatTemplate:
    """A compiled chat template. Raises `ChatError` if the text is not a template.

    ``special_tokens`` are the names that templates may use, such as ``bos_token``.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        self.text = text
        self._special_tokens = dict(special_tokens)
        if len(text) > MAX_TEMPLATE:
            raise ChatError(f"the chat template has {len(text):,} characters, more than {MAX_TEMPLATE:,}")
        self._sandbox = _Sandbox()
        try:
            self._template = self._sandbox.from_string(text)
        except Exception as error:  # whatever a stranger's text provokes in Jinja's and Python's parsers
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
        """Return the dialog as text. Raises `ChatError`, with the template's message, if refused."""
        today = date if isinstance(date, datetime.date) else None
        more = {} if date is None else {"date_string": today.strftime("%d %b %Y") if today else date}
        self._sandbox.begin(today)
        out: list[str] = []
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
                **more,
            ):
                self._sandbox.charge(len(piece))
                out.append(piece)
            text = "".join(out)
        except ChatError:
            raise
        except Exception as error:  # a stranger's program: whatever it does wrong is an error of the input
            raise ChatError(f"the chat template refuses this dialog: {_first_line(error)}") from error
        if len(text) > MAX_RENDERED:
            raise _TooMuch(MAX_RENDERED)
        return text


class _TooMuch(ChatError):
    def __init__(self, limit: int) -> None:
        super().__init__(f"the chat template writes or builds more than {limit:,} characters")


class _Generation(Extension):
    """Accept the tag ``{% generation %}`` and ignore it: the loss mask comes from prefixes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Watched(NodeTransformer):
    """Insert checks of time into loops and macros, of size into ``a ~ b``, ``a[1:]`` and ``a == b``."""

    def generic_visit(self, node: nodes.Node, *args: Any, **more: Any) -> nodes.Node:
        """Return the node with its parts visited, changed as described."""
        node = super().generic_visit(node, *args, **more)
        if isinstance(node, nodes.For | nodes.Macro):
            node.body.insert(0, _call("tick", [], node.lineno))
        elif isinstance(node, nodes.Concat):
            return _call("joined", node.nodes, node.lineno).node
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return _call("counted", [node], node.lineno).node
        elif isinstance(node, nodes.Compare):
            operands: list[Any] = [node, *node.ops]
            for operand in operands:  # comparing lists that hold each other many times takes very long
                if not isinstance(operand.expr, nodes.Const):
                    operand.expr = _call("weighed", [operand.expr], node.lineno).node
        return node


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits. What a rendering has used so far is kept for each thread."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self._used = threading.local()
        self.begin(None)
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self.weighed,
        )
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _tojson
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": self._strftime_now}

    def begin(self, today: datetime.date | None) -> None:
        """Start counting for one rendering. ``today`` is the date that the template is told."""
        self._used.characters, self._used.end = 0, time.thread_time() + MAX_SECONDS
        self._used.today = today

    def tick(self) -> str:
        """Raise `ChatError` when the time is over."""
        if time.thread_time() > self._used.end:
            raise ChatError(f"the chat template takes more than {MAX_SECONDS:.0f} s")
        return ""

    def charge(self, characters: int) -> None:
        """Count characters that are built. Raises `ChatError` when there are too many."""
        self.tick()
        self._used.characters += characters
        if characters > MAX_RENDERED:
            raise _TooMuch(MAX_RENDERED)
        if self._used.characters > MAX_ALLOCATED:
            raise _TooMuch(MAX_ALLOCATED)

    def weighed(self, value: Any) -> Any:
        """Return ``value`` unless it is too large."""
        self.tick()
        _weight(value)
        return value

    def counted(self, value: Any) -> Any:
        """Return a value that was just built."""
        if isinstance(value, str | list):
            self.charge(_shallow(value))
        return value

    def joined(self, *values: Any) -> str:
        """Return ``a ~ b``."""
        self.charge(sum(map(_weight, values)))
        return "".join(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result is not too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_NUMBER:
                raise _TooMuch(MAX_NUMBER)
        elif operator == "*":
            self.charge(_product(left, right))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, _weight(right), left.count("%"))
        else:
            self.charge(_shallow(left) + _shallow(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **more: Any) -> Any:  # type: ignore[override]
        """Call a function or method whose result is not too large."""
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps str.format
        if not isinstance(owner, str):
            return super().call(context, obj, *args, **more)
        self._check_text_method(obj.__name__, owner, [*args, *more.values()])
        return self.counted(super().call(context, obj, *args, **more))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that estimates the size of its result first."""

        @functools.wraps(function)
        def guarded(*args: Any, **more: Any) -> Any:
            given = [value for value in (*args, *more.values()) if not isinstance(value, Context | _Sandbox)]
            given = [value for value in given if type(value).__name__ != "EvalContext"]
            if given:
                text = given[0] if isinstance(given[0], str) else ""
                self.weighed(given[0])
                name = function.__name__.removeprefix("sync_").removeprefix("do_")
                separator = given[1] if len(given) > 1 and isinstance(given[1], str) else ""
                if name == "join":
                    self._check_text_method(name, separator, given)
                else:
                    self._check_text_method(name, text, given[1:])
            return self.counted(function(*args, **more))

        return guarded

    def _check_text_method(self, name: str, text: str, args: list[Any]) -> None:
        numbers = [abs(value) for value in args if isinstance(value, int)]
        texts = [value for value in args if isinstance(value, str)]
        if max(numbers, default=0) > MAX_NUMBER:
            raise _TooMuch(MAX_NUMBER)
        if name == "replace" and len(texts) == 2:
            self.charge(len(text) + text.count(texts[0]) * len(texts[1]))
        elif name == "join" and args:
            self.charge(_weight(args[0]) + len(text) * _length(args[0]))
        elif name in ("format", "format_map"):
            self._check_format(text, _weight(args), text.count("{") + text.count("%"))
        elif name in ("indent", "expandtabs", "wordwrap"):
            self.charge((text.count("\n") + text.count("\t") + 1) * (max(numbers, default=0) + 1) + len(text))
        elif name == "translate":
            self.charge(len(text) * max(1, _weight(args)))

    def _check_format(self, text: str, weight: int, fields: int) -> None:
        if _WIDTH.search(text):
            raise ChatError("the chat template formats text with a very large width")
        self.charge(len(text) + fields * (weight + MAX_NUMBER))

    def _strftime_now(self, format: str) -> str:
        return (self._used.today or datetime.datetime.now()).strftime(format[:MAX_NUMBER])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watched().visit(super()._parse(source, name, filename))


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.ExprStmt:
    """Return the call of one of the sandbox's own functions."""
    call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=line)
    return nodes.ExprStmt(call, lineno=line)


def _weight(value: Any) -> int:
    """Return the approximate length of a value as text. Raises `ChatError` as soon as it is too long."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        total += len(item) if isinstance(item, str) else 40
        if isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
        if total > MAX_RENDERED or len(waiting) > MAX_RENDERED:
            raise _TooMuch(MAX_RENDERED)
    return total


def _product(left: Any, right: Any) -> int:
    number, other = (left, right) if isinstance(left, int) else (right, left)
    return max(0, number) * _weight(other) if isinstance(number, int) else 0


def _shallow(value: Any) -> int:
    return len(value) if isinstance(value, str) else 8 * _length(value)


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else MAX_NUMBER if hasattr(value, "__iter__") else 1


def _tojson(value: Any, **more: Any) -> str:
    """Write JSON as transformers does, without escapes for HTML."""
    weight = _weight(value)
    if isinstance(more.get("indent"), int) and more["indent"] * weight > MAX_RENDERED:
        raise _TooMuch(MAX_RENDERED)
    return json.dumps(value, **({"ensure_ascii": False} | more))


def _raise(message: str) -> None:
    raise TemplateError(message)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
