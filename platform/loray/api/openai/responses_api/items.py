"""Items of a Responses request's `input` as messages of a chat. Any other item is a RequestError that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loray.errors import RequestError, shown

Message = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # part → its field


def messages(instructions: str | None, given: str | Sequence[object]) -> list[Message]:
    """The chat's messages, `instructions` first. `given` is a text of the user, or items."""
    chat: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*chat, {"role": "user", "content": given}]
    for i, item in enumerate(given):
        _append(chat, item, f"input.{i}")
    return chat


def _append(chat: list[Message], item: object, at: str) -> None:
    if not isinstance(item, dict):
        raise RequestError(f"{at}: must be an object", at)
    kind = item.get("type") or "message"
    if kind == "message":
        chat.append(_message(item, at))
    elif kind == "function_call":
        _append_call(chat, item, at)
    elif kind == "function_call_output":
        call_id = _text(item, "call_id", at)
        chat.append({"role": "tool", "tool_call_id": call_id, "content": _content(item.get("output"), f"{at}.output")})
    elif kind == "item_reference":
        raise RequestError(f"{at}: item_reference is not supported: nothing is stored; send the item itself", at)
    elif kind != "reasoning":  # the models here read none
        raise RequestError(f"{at}: items of type {shown(kind)} are not supported; only messages and function calls", at)


def _message(item: Mapping[str, Any], at: str) -> Message:
    role = item.get("role")
    if role not in _ROLES:
        raise RequestError(f"{at}.role: must be one of {', '.join(_ROLES)}, not {shown(role)}", f"{at}.role")
    return {"role": role, "content": _content(item.get("content"), f"{at}.content")}


def _append_call(chat: list[Message], item: Mapping[str, Any], at: str) -> None:
    """Calls that follow a text of the assistant, or each other, belong to one message of a chat."""
    function = {"name": _text(item, "name", at), "arguments": _text(item, "arguments", at)}
    call = {"id": _text(item, "call_id", at), "type": "function", "function": function}
    if not chat or chat[-1]["role"] != "assistant":
        chat.append({"role": "assistant", "content": None})
    chat[-1].setdefault("tool_calls", []).append(call)


def _content(value: object, at: str) -> str | list[dict[str, str]]:
    """A text or text parts, in the chat's form."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError(f"{at}: must be a string or a list of text parts", at)
    parts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        field = _TEXTS.get(kind) if isinstance(kind, str) else None
        text = part.get(field) if isinstance(part, dict) and field else None
        if not isinstance(text, str):
            raise RequestError(f"{at}: parts of type {shown(kind)} are not supported; only text is", at)
        parts.append({"type": "text", "text": text})
    return parts


def _text(item: Mapping[str, Any], field: str, at: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise RequestError(f"{at}.{field}: must be a string", f"{at}.{field}")
    return value
