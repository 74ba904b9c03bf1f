"""The tools of a request: what the model is told about, and what the client may choose among them.

Clients send tools of many types. Functions are offered to the model. The functions inside a ``namespace`` are
offered under the name ``NAMESPACE__NAME``, and a call of one names both again. Types that a provider runs on
its own machines are run here if this server has such a tool and the key was granted it (`ToolOffer`).
Others (web search and so on) are left out, and a warning names each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..text.messages import TOOL_NAME
from .problems import BadRequest

NAMESPACE_SEPARATOR = "__"
MAX_SCHEMA_DEPTH = 64
PYTHON = "python"
"""The group of the code interpreter."""
BUILTIN = {"calculator": "calculator", PYTHON: "code_interpreter"}
"""The tool of each group that is not an MCP server."""
CODE_TYPES = ("code_interpreter", "code_execution")
"""How the types of hosted code interpreters begin: OpenAI's, and Anthropic's with a date after it."""


@dataclass(frozen=True)
class OfferedTool:
    """A function that the model may call by ``name``.

    A tool with a ``group`` runs on this server, and keys are granted tools by group. The others are the
    client's. With ``strict``, the arguments of a call are valid under ``parameters``, or the request is
    refused. The client knows a tool of a ``namespace`` as ``name_inside``, and an MCP server knows its own
    tools so. Both are "" for other tools.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    namespace: str = ""
    name_inside: str = ""
    group: str = ""

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as chat formats describe it to the model."""
        return {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters or {"type": "object", "properties": {}},
        }


def function_call(id_: Any, name: Any, arguments: Any) -> dict[str, Any]:
    """Return a call in the form of OpenAI's messages."""
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass(frozen=True)
class ToolChoice:
    """Whether and what the model must call. ``names`` empty: any of the tools."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToolOffer:
    """The tools that a request may have: at most ``limit``, and of those on this server the ``groups``."""

    limit: int
    groups: Mapping[str, Sequence[OfferedTool]] = field(default_factory=dict)

    def select(self, tool: Mapping[str, Any]) -> Sequence[OfferedTool]:
        """Return the tools that an entry in a client's list of tools means. None of them: it means others.

        ``{"type": "herd", "name": NAME}`` means a tool or a group. `CODE_TYPES` mean the code interpreter.
        The types of OpenAI and Anthropic for MCP mean a server in the operator's file, and never one that a
        client names.
        """
        kind = str(tool.get("type"))
        if kind == "herd":
            name = tool.get("name")
            every = [each for tools in self.groups.values() for each in tools]
            return self.groups.get(str(name)) or [each for each in every if each.name == name]
        if kind.startswith(CODE_TYPES):
            return self.groups.get(PYTHON, ())
        if kind not in ("mcp", "mcp_toolset") or tool.get("server_url") or tool.get("connector_id"):
            return ()
        listed = self.groups.get(str(tool.get("server_label") or tool.get("mcp_server_name")), ())
        allowed = tool.get("allowed_tools")
        if isinstance(allowed, Mapping):
            allowed = allowed.get("tool_names")
        if not isinstance(allowed, list):
            return listed
        return [each for each in listed if each.name_inside in allowed or each.name in allowed]


def called_name(group: str, name: str) -> str:
    """Return the name under which the model called a tool on this server: ``GROUP_NAME`` for MCP servers."""
    return name if group in BUILTIN else f"{group}_{name}"


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None, warnings: list[str], offer: ToolOffer
) -> tuple[OfferedTool, ...]:
    """Return the tools of a request: functions, in OpenAI's nested or flat form, and tools of this server.

    Tools of other types, and those that are not granted, are named in ``warnings``. Raises `BadRequest` for a
    function that is malformed.
    """
    out: list[OfferedTool] = []
    for number, tool in enumerate(tools or ()):
        where, kind = f"tools[{number}]", tool.get("type", "function")
        if kind == "function":
            out.append(_read_function(tool.get("function", tool), where))
        elif kind == "namespace" and isinstance(tool.get("tools"), list):
            for inner_number, inner in enumerate(tool["tools"]):
                if not isinstance(inner, Mapping) or inner.get("type", "function") != "function":
                    warnings.append(f"{where}.tools[{inner_number}]=only functions can be called, left out")
                    continue
                function = _read_function(inner.get("function", inner), f"{where}.tools[{inner_number}]")
                space = str(tool.get("name", ""))
                name = _checked_name(f"{space}{NAMESPACE_SEPARATOR}{function.name}", where)
                out.append(replace(function, name=name, namespace=space, name_inside=function.name))
        elif selected := offer.select(tool):
            out += selected
        else:
            why = f"a tool of type {str(kind)[:40]!r} cannot be run here"
            if kind == "herd":
                why = f"there is no tool {str(tool.get('name'))[:64]!r} here that this key may use"
            warnings.append(f"{where}={why}, left out")
    if len(out) > offer.limit:
        raise BadRequest(f"tools has {len(out)} functions, the limit is {offer.limit}", param="tools")
    seen: set[str] = set()
    for each in out:
        if each.name in seen:
            raise BadRequest(f"tools: {each.name!r} is there twice", param="tools")
        seen.add(each.name)
    return tuple(out)


def _read_function(function: Any, where: str) -> OfferedTool:
    """Return a function from its description in OpenAI's form. Raises `BadRequest` if it is malformed."""
    if not isinstance(function, Mapping):
        raise BadRequest(f"{where}.function must be an object", param=f"{where}.function")
    parameters, description = function.get("parameters"), function.get("description") or ""
    if parameters is not None and not isinstance(parameters, Mapping):
        raise BadRequest(f"{where}.parameters must be a JSON schema", param=f"{where}.parameters")
    if parameters is not None and schema_depth(parameters) > MAX_SCHEMA_DEPTH:
        raise BadRequest(f"{where}.parameters is nested too deeply", param=f"{where}.parameters")
    if not isinstance(description, str):
        raise BadRequest(f"{where}.description must be text", param=f"{where}.description")
    name = _checked_name(function.get("name"), where)
    return OfferedTool(name, description, parameters, function.get("strict") is True)


def read_tool_choice(choice: Any, tools: Sequence[OfferedTool], warnings: list[str]) -> ToolChoice:
    """Return the tool choice of OpenAI's chat completions or Responses. Raises `BadRequest` if unknown."""
    if choice is None or choice == "auto":
        return ToolChoice()
    if choice == "none":
        return ToolChoice("none")
    if choice == "required":
        return _choose_among(ToolChoice("required"), tools)
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        space = choice.get("namespace")
        wanted = f"{space}{NAMESPACE_SEPARATOR}{name}" if space else str(name)
        return _choose_among(ToolChoice("required", (wanted,)), tools)
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        listed = inner.get("tools") if isinstance(inner, Mapping) else None
        names = [
            (each.get("function") or each).get("name")
            for each in (listed if isinstance(listed, list) else ())
            if isinstance(each, Mapping) and isinstance(each.get("function") or each, Mapping)
        ]
        mode: Literal["auto", "required"] = "required" if inner.get("mode") == "required" else "auto"
        return _choose_among(ToolChoice(mode, tuple(str(name) for name in names)), tools)
    if isinstance(kind, str) and kind not in ("auto", "none", "required"):
        warnings.append(f"tool_choice=a tool of type {kind[:40]!r} cannot be run here, the model may choose")
        return ToolChoice()
    raise BadRequest(
        f"tool_choice={str(choice)[:60]!r} must be auto, none, required or "
        '{"type": "function", "function": {"name": …}}',
        param="tool_choice",
    )


def _choose_among(choice: ToolChoice, tools: Sequence[OfferedTool]) -> ToolChoice:
    """Return ``choice``. Raises `BadRequest` if its tools are not there."""
    offered = {tool.name for tool in tools}
    if choice.mode == "required" and not offered:
        raise BadRequest("tool_choice requires a call, and there are no tools", param="tool_choice")
    for name in choice.names:
        if name not in offered:
            raise BadRequest(f"tool_choice names {name!r}, which is not in tools", param="tool_choice")
    return choice


def _checked_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise BadRequest(
            f"{where}: the name {str(name)[:80]!r} must begin with a letter or '_' and have letters, digits, "
            "'_', '-' and '.' only, at most 128",
            param=f"{where}.name",
        )
    return name


def schema_depth(value: Any) -> int:
    """Return the nesting of a JSON value, which the parser of the body has already limited."""
    depth, level = 0, [value]
    while level and depth <= MAX_SCHEMA_DEPTH:
        depth += 1
        inner: list[Any] = []
        for each in level:
            inner += each.values() if isinstance(each, Mapping) else each if isinstance(each, list) else ()
        level = [each for each in inner if isinstance(each, Mapping | list)]
    return depth
