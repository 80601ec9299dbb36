"""The answer of the Responses API, and the typed events in which it is streamed, in OpenAI's order."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from loray.api.openai.responses import Usage
from loray.api.openai.responses_api.request import ResponsesRequest

Event = dict[str, Any]


class ResponseBuilder:
    """Collects one answer. Each method returns the events of its change; `response` is the answer as it is now.

    A streamed answer is `opening`, then `text`, `call` and `arguments` in the order of generation, then `finish` or
    `fail`. One that is not streamed takes the same calls.
    """

    def __init__(self, request: ResponsesRequest) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._request = request
        self._created_at = int(time.time())
        self._output: list[dict[str, Any]] = []
        self._is_open = False  # the last item of the output
        self._pieces: list[str] = []  # of its text or arguments
        self._logprobs: list[dict[str, Any]] = []
        self._num_events = 0

    # -- events -------------------------------------------------------------------------------------------------------

    def opening(self) -> list[Event]:
        return [
            self._event("response.created", response=self.response("in_progress")),
            self._event("response.in_progress", response=self.response("in_progress")),
        ]

    def text(self, delta: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Text of the assistant's message, which begins with the first one."""
        events = (
            []
            if self._is_open and self._item["type"] == "message"
            else [*self._close("completed"), *self._open_message()]
        )
        self._pieces.append(delta)
        self._logprobs += logprobs
        if delta or logprobs:
            events.append(self._part_event("response.output_text.delta", delta=delta, logprobs=list(logprobs)))
        return events

    def call(self, call_id: str, name: str) -> list[Event]:
        """A function call begins; `arguments` follow."""
        events = list(self._close("completed"))
        item = {"id": _new_id("fc"), "type": "function_call", "status": "in_progress", "arguments": ""}
        return [*events, self._open(item | {"call_id": call_id, "name": name})]

    def arguments(self, delta: str) -> list[Event]:
        self._pieces.append(delta)
        return [self._item_event("response.function_call_arguments.delta", delta=delta)] if delta else []

    def finish(self, finish_reason: str | None, usage: Usage) -> list[Event]:
        status = "incomplete" if finish_reason == "length" else "completed"
        events = [] if self._output else list(self._open_message())
        events += self._close(status)
        return [*events, self._event(f"response.{status}", response=self.response(status, usage))]

    def fail(self, code: str, message: str) -> list[Event]:
        """After a failure the open item stays incomplete."""
        if self._is_open:
            self._item.update(self._content("incomplete"))
            self._is_open = False
        response = self.response("failed") | {"error": {"code": code, "message": message}}
        return [self._event("response.failed", response=response)]

    # -- the answer ---------------------------------------------------------------------------------------------------

    def response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        request = self._request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": [dict(item) for item in self._output],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": request.temperature,
            "text": {"format": request.text.format or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools,
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": request.truncation,
            "usage": None if usage is None else _usage(usage),
            "user": request.user,
        }

    @property
    def _item(self) -> dict[str, Any]:
        return self._output[-1]

    # -- items --------------------------------------------------------------------------------------------------------

    def _open(self, item: dict[str, Any]) -> Event:
        self._output.append(item)
        self._is_open, self._pieces, self._logprobs = True, [], []
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))

    def _open_message(self) -> Iterator[Event]:
        item = {"id": _new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        yield self._open(item)
        yield self._part_event("response.content_part.added", part=_part("", []))

    def _close(self, status: str) -> Iterator[Event]:
        if not self._is_open:
            return
        item = self._item
        item.update(self._content(status))
        if item["type"] == "message":
            part = item["content"][0]
            yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._part_event("response.content_part.done", part=part)
        else:
            yield self._item_event(
                "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=dict(item))
        self._is_open = False

    def _content(self, status: str) -> dict[str, Any]:
        text = "".join(self._pieces)
        if self._item["type"] == "message":
            return {"status": status, "content": [_part(text, self._logprobs)]}
        return {"status": status, "arguments": text}

    def _part_event(self, kind: str, **fields: Any) -> Event:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, item_id=self._item["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(usage: Usage) -> dict[str, Any]:
    details = usage.prompt_tokens_details
    cached = 0 if details is None else details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
