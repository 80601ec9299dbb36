"""Completions that begin with their prompt, as `echo` asks: evaluation harnesses read its tokens' logprobs there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from loray.api.openai import CompletionRequest
from loray.spec import Delta, TokenLogprob


async def echoed(
    deltas: AsyncGenerator[Delta, None], prompt: Callable[[], str], request: CompletionRequest
) -> AsyncGenerator[Delta, None]:
    """The same stream, the prompt's text and logprobs in front of its first delta's.

    `prompt` gives the text, and is called once the engine has taken the prompt: it may not be one.
    """
    first = True
    async with aclosing(deltas) as stream:
        async for delta in stream:
            yield _with_prompt(delta, prompt(), request) if first else delta
            first = False


def _with_prompt(delta: Delta, prompt: str, request: CompletionRequest) -> Delta:
    """The engine found as many alternatives as the larger of `logprobs` and `prompt_logprobs`; each gets its own."""
    prompt_logprobs = delta.prompt_logprobs or ()
    logprobs = delta.logprobs
    if request.logprobs is not None:
        logprobs = (*_best(prompt_logprobs, request.logprobs), *(logprobs or ()))
    asked = request.prompt_logprobs
    return delta._replace(
        text=prompt + delta.text,
        logprobs=logprobs,
        prompt_logprobs=None if asked is None else _best(prompt_logprobs, asked),
    )


def _best(logprobs: tuple[TokenLogprob, ...], num_top: int) -> tuple[TokenLogprob, ...]:
    return tuple(lp._replace(top=lp.top[:num_top]) for lp in logprobs)
