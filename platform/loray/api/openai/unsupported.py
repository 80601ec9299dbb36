"""Fields of OpenAI's and vLLM's APIs that are not implemented: refused by name, unless their value has no effect."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from loray.errors import RequestError


class _Refusal(NamedTuple):
    """A field that is not implemented: its values without effect, and the reason for refusing any other."""

    harmless: tuple[Any, ...]
    reason: str


NO_TOOLS = "only chat completions have tools"
NO_FUNCTIONS = "it is OpenAI's older form; use tools and tool_calls"
NO_AUDIO = "only text is generated"
_UNSUPPORTED: Mapping[str, _Refusal] = {
    "tools": _Refusal(([],), NO_TOOLS),
    "tool_choice": _Refusal(("none", "auto"), NO_TOOLS),  # without tools they have no effect
    "functions": _Refusal(([],), NO_FUNCTIONS),
    "function_call": _Refusal(("none", "auto"), NO_FUNCTIONS),
    "parallel_tool_calls": _Refusal((True, False), NO_TOOLS),
    "chat_template": _Refusal((), "a model, or an adapter, has its own"),
    "documents": _Refusal(([],), "put them into the messages"),
    "echo": _Refusal((False,), "only completions echo their prompt"),
    "suffix": _Refusal(("",), "insertion is not supported"),
    "audio": _Refusal((), NO_AUDIO),
    "modalities": _Refusal((["text"],), NO_AUDIO),
    "prediction": _Refusal((), "predicted outputs are not supported"),
    "web_search_options": _Refusal((), "there is no web search"),
    "use_beam_search": _Refusal((False,), "beam search is not supported"),
    "spaces_between_special_tokens": _Refusal((True,), "special tokens are written as the tokenizer writes them"),
    "logits_processors": _Refusal(([],), "no code of callers is run"),
    "length_penalty": _Refusal((1, 1.0), "beam search is not supported"),
}


def without_unsupported(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Removes unsupported fields whose values have no effect; `known` fields stay. RequestError names any other."""
    out = dict(given)
    for name in [name for name in given if name in _UNSUPPORTED and name not in known]:
        refusal, value = _UNSUPPORTED[name], out.pop(name)
        if not any(type(h) is type(value) and h == value for h in refusal.harmless):
            raise RequestError(f"{name} is not supported: {refusal.reason}", name)
    return out
