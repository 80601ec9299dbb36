"""OpenAI's Responses API as another form of chat completions: a request becomes a chat request, and its answer is
translated back. Nothing is stored, so each request brings the whole conversation.
"""

from __future__ import annotations

from loray.api.openai.responses_api.builder import Event, ResponseBuilder
from loray.api.openai.responses_api.request import ResponsesRequest, chat_request, renamed

__all__ = ["Event", "ResponseBuilder", "ResponsesRequest", "chat_request", "renamed"]
