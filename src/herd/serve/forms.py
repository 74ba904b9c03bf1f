"""The form of an answer: constraints for response formats and for calls of tools, in the checkpoint's format.

A required call, and every call of a strict tool, is enforced while the model writes, by a grammar of the
checkpoint's own format of calls. With strict tools that need not be called, an answer is either calls or text
that does not begin like one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.constraint import WHITESPACE, Constraint
from ..errors import ConstraintError
from ..text.answers import AnswerParser
from ..text.tokenizer import Tokenizer
from ..text.toolcall import Content, Event
from .problems import BadRequest, parsed_json
from .tools import OfferedTool, ToolChoice

MAX_CALLS = 32
"""Calls of one answer under a grammar, so that a model that does not stop calling ends."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class _CallForm:
    """How a chat format writes a call: texts around the name and the arguments, and around all calls.

    ``type_part`` may stand after ``before_name``. ``first`` are characters that calls begin with.
    """

    before_name: str
    type_part: str
    before_arguments: str
    after: str
    between: str
    opening: str = ""
    closing: str = ""
    first: str = "{"


_FORMS = {
    "json": _CallForm("{", '"type": "function", ', '", "parameters": ', "}", "; "),
    "hermes": _CallForm("<tool_call>\n{", "", '", "arguments": ', "}\n</tool_call>", "\n", first="<"),
    "mistral": _CallForm("{", "", '", "arguments": ', "}", ", ", "[TOOL_CALLS][", "]", first="["),
}
_CONTROL_TEXTS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]")
"""Texts of the forms that are control tokens in some vocabularies and plain text in others."""


@dataclass(frozen=True)
class AnswerForm:
    """The constraint of an answer (None: none), and whether calls are looked for in it.

    ``calls_first``: an answer has calls only if it begins with one.
    """

    constraint: Constraint | None = None
    has_calls: bool = False
    calls_first: bool = False


_KINDS = {
    "json_schema": "json", "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice",
    "guided_grammar": "grammar", "grammar": "grammar",
}  # fmt: skip
"""What the fields of llama.cpp and vLLM hold, by vLLM's names in ``structured_outputs``."""


def read_forms(
    forms: Mapping[str, Any], warnings: list[str]
) -> tuple[dict[str, Any] | None, Constraint | None]:
    """Return the schema, or else the constraint, of a request's fields with the form of the answer.

    The fields are ``wire.FORMS``. Raises `BadRequest` if there are two, or for one that cannot be enforced.
    """
    forms = {name: value for name, value in forms.items() if value != {"type": "text"}}
    if len(forms) > 1:
        one, other = list(forms)[:2]
        raise BadRequest(f"{other} excludes {one}: leave one out", other)
    for name, value in forms.items():
        if name == "response_format":
            return response_schema(value, warnings), None
        if name != "structured_outputs":
            return _read_form(_KINDS[name], value, name, warnings)
        given = [(kind, inner) for kind, inner in value.items() if inner not in (None, False)]
        if len(given) != 1:
            raise BadRequest(f"{name} must have one of json, regex, choice, grammar and json_object", name)
        return _read_form(*given[0], f"{name}.{given[0][0]}", warnings)
    return None, None


def _read_form(
    kind: str, value: Any, where: str, warnings: list[str]
) -> tuple[dict[str, Any] | None, Constraint | None]:
    if kind == "json_object":
        return ANY_OBJECT, None
    if kind == "json":
        if isinstance(value, str):
            value = parsed_json(value, where)
        return enforceable_schema(value, True, where, warnings), None
    if kind == "choice":
        if not value or not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise BadRequest(f"{where} must be a list of texts", where)
        return None, Constraint.lark("start: " + " | ".join(map(json.dumps, value)))
    if kind not in ("regex", "grammar"):
        raise BadRequest(f"{where[:80]} is not supported: use json, regex, choice or grammar", where[:80])
    if not isinstance(value, str):
        raise BadRequest(f"{where} must be text", where)
    return None, Constraint.regex(value) if kind == "regex" else grammar_constraint(value, where)


def response_schema(response_format: Any, warnings: list[str]) -> dict[str, Any] | None:
    """Return the JSON schema of a ``response_format`` in OpenAI's form, or None for plain text.

    Raises `BadRequest` for an unknown format, and for a strict schema that cannot be enforced.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")
        return enforceable_schema(schema, True, "response_format.schema", warnings) if schema else ANY_OBJECT
    if kind == "json_schema":
        inner = response_format.get("json_schema", response_format)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        strict = isinstance(inner, Mapping) and inner.get("strict") is True
        return enforceable_schema(schema or {}, strict, "response_format.json_schema.schema", warnings)
    raise BadRequest(
        f"response_format.type={str(kind)[:40]!r} must be text, json_object or json_schema",
        param="response_format",
    )


def enforceable_schema(schema: Any, strict: bool, where: str, warnings: list[str]) -> dict[str, Any]:
    """Return ``schema`` if it can be enforced. Otherwise raise `BadRequest` if ``strict``, or warn.

    The warning says that any JSON object is accepted.
    """
    try:
        if not isinstance(schema, Mapping):
            raise ConstraintError(f"a JSON schema is an object, not {type(schema).__name__}")
        constraint = Constraint.json_schema(schema)
        constraint.check()
    except ConstraintError as error:
        reason = str(error)[:300]
        if strict:
            message = f"{where} cannot be enforced: {reason}"
            raise BadRequest(message, param=where, code="invalid_schema") from None
        warnings.append(f"{where}=not enforced beyond a JSON object: {reason}")
        return ANY_OBJECT
    canonical: dict[str, Any] = json.loads(constraint.text)
    return canonical


def grammar_constraint(grammar: str, param: str = "grammar") -> Constraint:
    """Return the constraint to a grammar in llama.cpp's GBNF, or in llguidance's dialect of Lark.

    Raises `BadRequest` if it cannot be read.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return Constraint.lark(any_to_lark(grammar))
    except Exception as error:  # llguidance raises the base class for a rule that is missing
        message = f"{param} cannot be read: {' '.join(str(error).split())[:200]}"
        raise BadRequest(message, param, code="invalid_grammar") from None


def answer_form(
    tokenizer: Tokenizer,
    call_format: str,
    tools: Sequence[OfferedTool],
    choice: ToolChoice,
    parallel: bool,
    schema: dict[str, Any] | None,
    warnings: list[str],
) -> AnswerForm:
    """Return the form of an answer to a request with these tools and this schema of its text.

    ``call_format`` is the chat format's own: json, hermes or mistral. Raises `BadRequest` for a strict schema
    that cannot be enforced.
    """
    if not tools or choice.mode == "none":
        return AnswerForm(None if schema is None else Constraint.json_schema(schema))
    allowed = [tool for tool in tools if not choice.names or tool.name in choice.names]
    forced = choice.mode == "required"
    is_free = parallel and schema is None and len(allowed) == len(tools)
    if not forced and is_free and not any(tool.strict for tool in allowed):
        return AnswerForm(has_calls=True)
    lines = _call_rules(tokenizer, _FORMS[call_format], allowed, parallel, warnings)
    if forced:
        start = "start: calls"
    elif schema is not None:
        start, lines = "start: calls | answer", [*lines, f"answer: %json {_embedded(schema)}"]
    else:
        first = _FORMS[call_format].first.replace("[", r"\[")
        start, lines = "start: calls | TEXT", [*lines, rf"TEXT: /[^\s{first}](.|\n)*/"]
    return AnswerForm(Constraint.lark("\n".join([start, *lines])), has_calls=True, calls_first=not forced)


def _call_rules(
    tokenizer: Tokenizer, form: _CallForm, tools: Sequence[OfferedTool], parallel: bool, warnings: list[str]
) -> list[str]:
    """Return the rules of a grammar (llguidance's Lark) whose rule ``calls`` is one or more calls."""

    def literal(text: str) -> str:
        for control in _CONTROL_TEXTS:
            if control in text and control in tokenizer.special_tokens:
                before, _, after = text.partition(control)
                id_ = tokenizer.special_tokens[control]
                return " ".join(part for part in (literal(before), f"<[{id_}]>", literal(after)) if part)
        return json.dumps(text) if text else ""

    more = f" ({literal(form.between)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    names = " | ".join(f"call_{number}" for number in range(len(tools)))
    rules = [f"calls: {literal(form.opening)} call{more} {literal(form.closing)}".rstrip(), f"call: {names}"]
    type_part = f"{literal(form.type_part)}?" if form.type_part else ""
    for number, tool in enumerate(tools):
        where = f"tools ({tool.name}).parameters"
        schema = enforceable_schema(tool.parameters or ANY_OBJECT, tool.strict, where, warnings)
        name = literal(f'"name": {json.dumps(tool.name)[:-1]}{form.before_arguments}')
        arguments = f"arguments_{number}"
        rules += [
            f"call_{number}: {literal(form.before_name)} {type_part} {name} {arguments} "
            f"{literal(form.after)}",
            f"{arguments}: %json {_embedded(schema)}",
        ]
    return rules


def _embedded(schema: Mapping[str, Any]) -> str:
    """Return a canonical schema for a grammar, with the rules about blanks of a separate constraint."""
    canonical = json.loads(Constraint.json_schema(schema).text)
    return json.dumps(canonical | {"x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": False}})


class CallsFirstParser(AnswerParser):
    """A parser of answers with ``calls_first``: the beginning decides whether calls are looked for at all."""

    def __init__(self, call_format: str, *, drops_space: bool) -> None:
        super().__init__(tools=False, drops_space=drops_space)
        self._first, self._start = _FORMS[call_format].first, ""
        self._decided: AnswerParser | None = None

    def feed(self, text: str) -> list[Event]:
        if self._decided is None:
            self._start += text
            if not (begun := self._start.lstrip()):
                return []
            self._decided = AnswerParser(tools=begun.startswith(self._first), drops_space=self._drops_space)
            text = self._start
        return self._decided.feed(text)

    def finish(self) -> list[Event]:
        if self._decided is None:
            return [Content(self._start)] if self._start else []
        return self._decided.finish()
