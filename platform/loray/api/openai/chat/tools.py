"""The tools of a chat request: functions, and which of them the model must call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from loray.api.openai.body import Body
from loray.api.openai.fields import MAX_DESCRIPTION, ShortText
from loray.api.openai.structured import JsonSchema
from loray.errors import RequestError, shown
from loray.spec import Tool, ToolUse

MAX_TOOLS = 128
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_HARMLESS = ("cache_control", "defer_loading", "eager_input_streaming")  # of other providers' APIs


def tool_of(value: object) -> object:
    """Tools of other types are refused by name."""
    if not isinstance(value, dict):
        return value
    kind = value.get("type", "function")
    if kind != "function":
        raise RequestError(f'tools of type {shown(kind)} are not supported; only {{"type": "function"}} is')
    return {k: v for k, v in value.items() if k not in _HARMLESS}


def _present(value: object) -> object:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class FunctionDefinition(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = None
    parameters: JsonSchema = Field(default=_NO_PARAMETERS, description="the JSON schema of the arguments")
    strict: bool = Field(default=False, description="the arguments are valid by `parameters`")


class FunctionTool(Body):
    type: Literal["function"] = "function"
    function: Annotated[FunctionDefinition, BeforeValidator(_present)]

    def to_tool(self) -> Tool:
        f = self.function
        if not isinstance(f.parameters, dict):
            raise RequestError(f"the parameters of {f.name} must be a JSON schema of an object", "tools")
        return Tool(f.name, f.parameters or _NO_PARAMETERS, f.description, f.strict)


class FunctionName(Body):
    name: ShortText


class NamedChoice(Body):
    """The function that the answer must call."""

    type: Literal["function"] = "function"
    function: FunctionName


class AllowedSet(Body):
    mode: Literal["auto", "required"]
    tools: tuple[NamedChoice, ...] = Field(strict=False, max_length=MAX_TOOLS)


class AllowedTools(Body):
    """Some of the tools, of which the model may (auto) or must (required) call; it is shown no others."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool.function.name for tool in self.allowed_tools.tools)


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedTools
_CHOICES: dict[str, type[Body]] = {"function": NamedChoice, "allowed_tools": AllowedTools}


def choice_of(value: object) -> object:
    """`tool_choice`, with one error for all that it may not be."""
    if value in ("none", "auto", "required"):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    with suppress(ValidationError):
        if isinstance(kind, str) and kind in _CHOICES:
            return _CHOICES[kind].model_validate(value)
    form = '{"type": "function", "function": {"name": ...}}'
    raise RequestError(f"must be none, auto, required, {form}, or allowed_tools with a mode and such tools")


def tool_use(tools: Sequence[FunctionTool], choice: ToolChoice, parallel: bool) -> ToolUse | None:
    """What the fields of a request mean; None where nothing is to be called. RequestError where they contradict."""
    names = [tool.function.name for tool in tools]
    if isinstance(choice, AllowedTools):
        unknown = [name for name in choice.names if name not in names]
        if unknown:
            raise RequestError(f"tool_choice allows {shown(unknown[0])}, which is no tool", "tool_choice")
        allowed = [tool for tool in tools if tool.function.name in choice.names]
        return tool_use(allowed, choice.allowed_tools.mode, parallel)
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise RequestError(f"two tools are called {twice!r}", "tools")
    named = isinstance(choice, NamedChoice)
    name = choice.function.name if isinstance(choice, NamedChoice) else choice
    if not tools and (named or name == "required"):
        raise RequestError("tool_choice asks for a call, but the request has no tools", "tool_choice")
    if named and name not in names:
        raise RequestError(f"tool_choice names {shown(name)}; the tools are {', '.join(names)}", "tool_choice")
    if not tools or (name == "none" and not named):
        return None
    return ToolUse(tuple(tool.to_tool() for tool in tools), name, parallel, named)
