"""Answers of Anthropic's Messages API: a message and its events, models, numbers of tokens, errors."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from loray.schemas.anthropic.requests import MessagesRequest
from loray.schemas.openai import Model
from loray.schemas.openai.responses import ResponseBody
from loray.spec import Delta

Event = dict[str, Any]
Block = dict[str, Any]

# -- messages ---------------------------------------------------------------------------------------------------------


class MessageBuilder:
    """A collector of one answer. `push` takes each delta, `end` or `fail` comes last; they return the events of their
    changes. After `end`, `message` is the whole answer.
    """

    def __init__(self, request: MessagesRequest) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._request = request
        self._hides_thoughts = request.thinking is not None and request.thinking.display == "omitted"
        self._content: list[Block] = []  # the last one is open if `_is_open`
        self._is_open = False
        self._pieces: list[str] = []  # of its text, its thought, or the JSON of its input
        self._shows_early = False  # that JSON, before it is complete
        self._last: Delta | None = None

    def push(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        is_first, self._last = self._last is None, delta
        if is_first:
            events.append({"type": "message_start", "message": self._message(delta)})
        if delta.reasoning:
            if not self._continues("thinking"):
                events += self._open({"type": "thinking", "thinking": "", "signature": ""})
            self._pieces.append(delta.reasoning)
            if not self._hides_thoughts:
                events.append(self._delta("thinking_delta", thinking=delta.reasoning))
        if delta.text:
            if not self._continues("text"):
                events += self._open({"type": "text", "text": ""})
            self._pieces.append(delta.text)
            events.append(self._delta("text_delta", text=delta.text))
        for call in delta.tool_calls:
            if call.id is not None and call.name is not None:
                events += self._open({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
                self._shows_early = self._request.shows_arguments_early(call.name)
            if call.arguments:
                self._pieces.append(call.arguments)
                if self._shows_early:
                    events.append(self._delta("input_json_delta", partial_json=call.arguments))
        return events

    def end(self) -> list[Event]:
        assert self._last is not None, "an answer has a last delta"
        events = list(self._close())
        reason, sequence = self._stop(self._last)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        events.append({"type": "message_delta", "delta": delta, "usage": _usage(self._last)})
        return [*events, {"type": "message_stop"}]

    def fail(self, status: int, message: str) -> list[Event]:
        """End an answer whose beginning has been sent."""
        return [{"type": "error", "error": {"type": error_type(status), "message": message}}]

    @property
    def message(self) -> dict[str, Any]:
        assert self._last is not None, "an answer has a last delta"
        reason, sequence = self._stop(self._last)
        message = self._message(self._last) | {"stop_reason": reason, "stop_sequence": sequence}
        return message | {"content": self._content}

    def _message(self, delta: Delta) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(delta),
        }

    def _stop(self, last: Delta) -> tuple[str, str | None]:
        """The reason why the answer ended, and the stop sequence if one did."""
        if last.finish_reason == "tool_calls":
            return "tool_use", None
        if last.finish_reason == "length":
            # A limit of the key ends an answer as max_tokens does.
            is_whole = last.stop_reason is not None or last.num_output_tokens >= self._request.max_tokens
            return "max_tokens" if is_whole else "model_context_window_exceeded", None
        return ("stop_sequence", last.stop_reason) if isinstance(last.stop_reason, str) else ("end_turn", None)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _continues(self, kind: str) -> bool:
        return self._is_open and self._content[-1]["type"] == kind

    def _open(self, block: Block) -> Iterator[Event]:
        yield from self._close()
        self._content.append(block)
        self._is_open, self._pieces = True, []
        yield {"type": "content_block_start", "index": len(self._content) - 1, "content_block": dict(block)}
        if len(self._content) == 1:
            yield PING

    def _close(self) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open = False
        block, text = self._content[-1], "".join(self._pieces)
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "thinking":
            block["signature"] = hashlib.sha256(text.encode()).hexdigest()
            block["thinking"] = "" if self._hides_thoughts else text
            yield self._delta("signature_delta", signature=block["signature"])
        else:
            block["input"] = _input(text)
            if not self._shows_early:
                yield self._delta("input_json_delta", partial_json=to_json(block["input"]))
        yield {"type": "content_block_stop", "index": len(self._content) - 1}

    def _delta(self, kind: str, **fields: str) -> Event:
        index = len(self._content) - 1
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}


PING: Event = {"type": "ping"}


def _input(written: str) -> dict[str, Any]:
    """The input of a call, which is an object. What else a model has written is told under the name `arguments`, where
    the tool finds it wrong and can say so.
    """
    try:
        found = json.loads(written or "{}")
        to_json(found).encode()  # not NaN, nor half of a surrogate pair: Python reads them, and clients cannot
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": written}


def _usage(delta: Delta) -> dict[str, Any]:
    """The tokens until `delta`. Those of the prompt that were in the cache are counted apart."""
    usage = {
        "input_tokens": delta.num_prompt_tokens - delta.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": delta.num_cached_tokens,
        "output_tokens": delta.num_output_tokens,
    }
    thought = {"output_tokens_details": {"thinking_tokens": delta.num_reasoning_tokens}}
    return usage | thought if delta.num_reasoning_tokens else usage


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


# -- others -----------------------------------------------------------------------------------------------------------


class TokenCount(ResponseBody):
    input_tokens: int


class ModelInfo(ResponseBody):
    """A model as Anthropic lists it: any name of a base or an adapter."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int


def model_info(model: Model) -> ModelInfo:
    return ModelInfo(
        type="model",
        id=model.id,
        display_name=model.id,
        created_at=datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z"),
        lifecycle="active",
        max_input_tokens=model.max_model_len,
        max_tokens=model.max_model_len,
    )


class ErrorCode(ResponseBody):
    error_code: str


class ErrorDetail(ResponseBody):
    type: str
    message: str
    details: ErrorCode | None = None


class ErrorAnswer(ResponseBody):
    type: Literal["error"]
    error: ErrorDetail
    request_id: str


_ERROR_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error_type(status: int) -> str:
    return _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
