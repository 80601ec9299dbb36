"""OpenAI's completions and chat completions: checks and translates requests, builds responses and chunks.

The wire format is OpenAI's. Further sampling fields (top_k, min_p, min_tokens, prompt_logprobs and others) have vLLM's
names. A field that changes answers and is not implemented is refused by name. One that nobody knows is ignored, and
named.
"""

from __future__ import annotations

from loray.schemas.openai.fields import Prompt, parse
from loray.schemas.openai.formats import ChatFormat, CompletionFormat, ResponseFormat
from loray.schemas.openai.requests import ChatCompletionRequest, ChatMessage, CompletionRequest, StreamOptions
from loray.schemas.openai.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Error,
    ErrorBody,
    Model,
    ModelList,
    Usage,
)

__all__ = [
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "ChatFormat",
    "ChatMessage",
    "Completion",
    "CompletionFormat",
    "CompletionRequest",
    "Error",
    "ErrorBody",
    "Model",
    "ModelList",
    "Prompt",
    "ResponseFormat",
    "StreamOptions",
    "Usage",
    "parse",
]
