"""Anthropic's Messages API as another form of chat completions (https://docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

from loray.schemas.anthropic.answers import (
    ErrorAnswer,
    ErrorCode,
    ErrorDetail,
    MessageBuilder,
    ModelInfo,
    TokenCount,
    error_type,
    model_info,
)
from loray.schemas.anthropic.requests import CountTokensRequest, MessagesRequest, chat_request

__all__ = [
    "CountTokensRequest",
    "ErrorAnswer",
    "ErrorCode",
    "ErrorDetail",
    "MessageBuilder",
    "MessagesRequest",
    "ModelInfo",
    "TokenCount",
    "chat_request",
    "error_type",
    "model_info",
]
