"""Log-probabilities in the shapes of completions, chat completions and vLLM's prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from loray.api.openai.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    TopLogprob,
)
from loray.spec import TokenLogprob

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def completion_logprobs(tokens: Sequence[TokenLogprob], offsets: list[int]) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[None if t.logprob is None else _finite(t.logprob) for t in tokens],
        tokens=[t.token for t in tokens],
        top_logprobs=[None if t.logprob is None else _by_text(t) for t in tokens],
    )


def chat_logprobs(tokens: Iterable[TokenLogprob] | None) -> ChatLogprobs | None:
    if tokens is None:
        return None
    content = [
        ChatTokenLogprob(
            token=t.token,
            logprob=_finite(t.logprob),
            bytes=_utf8(t.token),
            top_logprobs=[
                TopLogprob(token=text, logprob=_finite(logprob), bytes=_utf8(text)) for _, text, logprob in t.top
            ],
        )
        for t in tokens
    ]
    return ChatLogprobs(content=content, refusal=None)


def by_token_id(token: TokenLogprob) -> dict[str, PromptLogprob] | None:
    """One token of a prompt, in vLLM's form: the token itself, then the most likely ones."""
    if token.logprob is None:
        return None
    best = ((t, text, logprob, rank) for rank, (t, text, logprob) in enumerate(token.top, 1))
    return {
        str(t): PromptLogprob(logprob=_finite(logprob), rank=rank, decoded_token=text)
        for t, text, logprob, rank in ((token.token_id, token.token, token.logprob, token.rank), *best)
    }


def _by_text(token: TokenLogprob) -> dict[str, float]:
    """The most likely tokens and the token itself. Of two tokens with the same text, the more likely one counts."""
    out: dict[str, float] = {}
    for text, logprob in [*((text, logprob) for _, text, logprob in token.top), (token.token, token.logprob)]:
        out.setdefault(text, _finite(logprob))
    return out


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else _LOWEST_LOGPROB


def _utf8(text: str) -> list[int]:
    return list(text.encode("utf-8", "surrogatepass"))
